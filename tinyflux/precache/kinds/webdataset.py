"""Kind "webdataset": raw tars of images and captions, as img2dataset writes them."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from tinyflux.precache.fetch import download, forget
from tinyflux.precache.images import EXTENSIONS, Rejected
from tinyflux.precache.inputs import HEAD
from tinyflux.precache.kinds.base import ImageSource, Input, SourceError, Text, captions_in, digest, texts
from tinyflux.shards.tar import read_member, scan

CAPTIONS = ("txt", "caption", "json")


@dataclass(frozen=True, kw_only=True)
class WebDataset(ImageSource):
    """Raw tars of images with .txt, .caption or .json beside them: a folder of tars, files or URLs. A tar is a part."""

    extensions: ClassVar[frozenset[str]] = EXTENSIONS
    """Extensions of members that are read."""
    location: Text
    caption: list[str] | None = None
    """Fields of the captions in the .json; None means the .txt, else the field "text", "caption" or "prompt"."""
    keeps_order = True

    @cached_property
    def places(self) -> dict[str, str]:
        """Name below the common folder -> file or URL, for each tar. Raises FileNotFoundError."""
        from webdataset.shardlists import expand_urls

        if "://" in self.location:
            found = list(expand_urls(self.location))
            top = found[0].rpartition("/")[0] if len(found) == 1 else os.path.commonpath(found)
            top = top if "://" in top else found[0].partition("://")[0] + "://"
            return {url[len(top) :].lstrip("/"): url for url in found}
        if self.path.is_dir():
            return {path.relative_to(self.path).as_posix(): str(path) for path in sorted(self._tars())}
        found = [Path(path) for path in expand_urls(str(self.path))]
        for path in found:
            if not path.is_file():
                raise FileNotFoundError(f"[{self.name}] location: {path}: no such tar or folder of tars")
        top = os.path.commonpath([path.parent for path in found])
        return {path.relative_to(top).as_posix(): str(path) for path in found}

    @cached_property
    def ignored(self) -> Counter[str]:
        """Number of skipped files of the folder by extension, filled by `places`."""
        return Counter()

    def _tars(self) -> Iterator[Path]:
        """The tars of the folder and its subfolders. Raises SourceError."""
        for path in self.path.rglob("*"):
            if any(name.startswith(".") for name in path.relative_to(self.path).parts):
                continue
            if path.is_dir():
                if path.is_symlink():
                    raise SourceError(f"{path}: is a link to a folder, which is not followed; copy or mount it instead")
            elif path.suffix == ".tar":
                yield path
            else:
                self.ignored[path.suffix or "without one"] += 1

    def parts(self) -> list[tuple[str, str]]:
        return [(name, _stamp(place)) for name, place in self.places.items()]

    def inputs_of(self, part: str) -> Iterator[Input]:
        path = self._local(part)
        with open(path, "rb") as file:
            samples, fault, _ = scan(file.fileno(), part)
        for key, members in samples:
            found = [name for name in members if name.rpartition(".")[2].lower() in self.extensions]
            pictures = [name for name in found if "." not in name] or found  # a.jpg rather than a.depth.png
            wanted = {name.lower(): place for name, place in members.items() if name.lower() in CAPTIONS}
            if len(pictures) == 1:
                yield Input(f"{part}/{key}", digest(members[pictures[0]]), (part, members[pictures[0]], wanted))
            elif pictures:
                why = f"{len(pictures)} images of one key, which is a name up to its first dot"
                yield from (Input(f"{part}/{key}.{name}", "", (part, None, why)) for name in pictures)
            elif wanted.keys() - {"json"}:  # img2dataset writes a .json for an image that it could not download
                why = f"no image beside the caption, only {', '.join(f'.{name}' for name in members)}"
                yield Input(f"{part}/{key}", "", (part, None, why))
        if fault is not None:
            yield Input(part, "", (part, None, f"damaged tar, some of its images are lost: {fault.why}"))

    def done_with(self, part: str) -> None:
        """Delete a downloaded tar after its shards are written."""
        if "://" in self.places[part]:
            forget(self.places[part])

    def _local(self, part: str) -> Path:
        place = self.places[part]
        return download(place) if "://" in place else Path(place)

    def read_image(self, item: Input) -> bytes:
        part, place, why = item.place
        if place is None:
            raise Rejected(why)
        return self._slice(part, place)

    def sought(self, item: Input) -> str:
        return "no .txt or .caption beside it, and no such field in a .json"

    def read_head(self, item: Input) -> bytes:
        part, place, _ = item.place
        return b"" if place is None else self._slice(part, (place[0], min(place[1], HEAD)))

    def read_texts(self, item: Input) -> list[str]:
        part, place, members = item.place
        if place is None:
            return [part]
        kind = next((kind for kind in CAPTIONS if kind in members and (kind == "json" or not self.caption)), None)
        if kind is None:
            return []
        data = self._slice(part, members[kind])
        if kind != "json":
            text = data.decode("utf-8-sig")
            return text.splitlines() if self.captions else [text]
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Rejected(f"caption's .json is damaged: {error}") from error
        return texts(captions_in(record if isinstance(record, dict) else {}, self.caption), "the .json")

    def _slice(self, part: str, place: tuple[int, int]) -> bytes:
        try:
            with open(self._local(part), "rb") as file:
                return read_member(file.fileno(), *place)
        except OSError as error:
            raise Rejected(f"unreadable file: {error.strerror}") from error


def _stamp(place: str) -> str:
    if "://" in place:
        return ""
    status = os.stat(place)
    return f"{status.st_size} {status.st_mtime_ns}"
