"""Safe reading of a source's files: nothing outside its folder, with size limits, and lists line by line."""

import csv
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import SourceError

FILE_LIMIT = 1 << 30
"""Larger files are not read as pictures."""


HEAD = 1 << 16
"""Most image files have their size in the first so many bytes."""


def read_file(root: Path, name: str, most: int | None = None) -> bytes:
    """The bytes of a file in a folder, at most `most`. Raises Rejected, also if a name or symlink leads outside."""
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
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise Rejected(f"unreadable file: {error.strerror}") from error


def printable(name: str) -> str:
    """A file name as valid UTF-8 text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def lines_of(path: Path):
    """(line number, text) of the non-blank lines of a UTF-8 file. Raises SourceError."""
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


def table_rows(path: Path) -> Iterator[dict]:
    """The rows of a CSV or TSV file with a header. Raises SourceError."""
    comma = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=comma, strict=True)
            names = [name for name in rows.fieldnames or () if name]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise SourceError(f"{path}: two columns are called {twice!r}")
            for row in rows:
                if any(row.pop(None, ())):  # DictReader would give a caption without what follows its first comma
                    raise SourceError(
                        f"{path}, line {rows.line_num}: more cells than columns; a text with {comma!r} must be quoted"
                    )
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a CSV file in UTF-8: {error}") from error
