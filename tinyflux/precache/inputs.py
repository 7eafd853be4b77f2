"""An input of a source: one image and its captions, named but not read yet; and how they are read safely."""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tinyflux.precache.images import Rejected
from tinyflux.precache.sources import SourceError, SourceSpec
from tinyflux.util import rng

FILE_LIMIT = 1 << 30
"""Bytes beyond which a file is no picture to be trained on."""


class Input(NamedTuple):
    """One image and its captions. The two functions read them, in any thread, and raise Rejected."""

    origin: str
    """The image's name in the source; the captions of one image share it."""
    stamp: str
    """Changes when the input does, as far as can be seen without reading it."""
    image: Callable[[], bytes | Image.Image]
    captions: Callable[[], list[str]]


def caption(spec: SourceSpec, item: Input, seed: int) -> str:
    """The caption of an input by the source's rule; `seed` is the sample's own. Raises Rejected."""
    try:
        given = item.captions()
        for text in given:
            text.encode()  # a lone surrogate out of JSON would fail much later
    except UnicodeError as error:
        raise Rejected(f"caption is not UTF-8: {error.reason}") from error
    filled = [text for text in (" ".join(text.split()) for text in given) if text]
    if not filled:
        if spec.allow_empty_captions:
            return ""
        raise Rejected("empty caption" if given else "missing caption")
    if spec.captions == "longest":
        return max(filled, key=len)
    return filled[rng.key(seed, "caption") % len(filled) if spec.captions == "random" else 0]


def texts(value: object, where: str) -> list[str]:
    """The captions in a field of a record: a text, a list of texts, or nothing. Raises Rejected."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise Rejected(f"caption is not a text: {where} is {value!r:.60}")
    return values


def read_file(root: Path, name: str) -> bytes:
    """The bytes of a file in a folder. Raises Rejected, also where the name or a symlink leads outside."""
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise Rejected(f"outside the folder: {printable(name)}")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(os.path.realpath(root)):
        raise Rejected(f"outside the folder: {printable(name)}")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Rejected(f"not a file: {printable(name)}")
        if status.st_size > FILE_LIMIT:
            raise Rejected(f"unreadable file: {status.st_size} bytes, at most {FILE_LIMIT} are accepted")
        return path.read_bytes()
    except OSError as error:
        raise Rejected(f"unreadable file: {error.strerror}") from error


def printable(name: str) -> str:
    """A file name as text that is always UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def digest(*parts: object) -> str:
    """A short stamp of values that are at hand."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def lines_of(path: Path):
    """(line number, text) of the lines of a UTF-8 file that aren't blank. Raises SourceError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error}") from error


def records(path: Path, key: str):
    """(line number, object) of a JSON Lines file whose objects have a text under `key`. Raises SourceError."""
    for number, line in lines_of(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise SourceError(f"{path}, line {number}: must be an object with a text under {key!r}")
        if not record[key].isascii() and any("\ud800" <= c <= "\udfff" for c in record[key]):
            raise SourceError(f"{path}, line {number}: {key!r} has half a surrogate pair, so it names no file")
        yield number, record


def check_field(rows: list[dict], field: str, path: Path) -> None:
    """Raises SourceError where not one record has the field: a misspelt key, not missing captions."""
    if rows and not any(field in row for row in rows):
        raise SourceError(f"{path}: no record has the field {field!r}; the first has {', '.join(map(str, rows[0]))}")
