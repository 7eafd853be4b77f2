"""Kinds "jsonl" and "csv": a list of images, by path or URL, and captions."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyflux.precache.fetch import is_url, read_url
from tinyflux.precache.inputs import HEAD, printable, read_file, records, table_rows
from tinyflux.precache.kinds.base import ImageSource, Input, SourceError, Text, captions_in, digest, texts


@dataclass(frozen=True, kw_only=True)
class JsonLines(ImageSource):
    """A JSON Lines file of images and captions: {"image": "a/b.png", "text": "a caption"}."""

    location: Text
    image: Text = "image"
    """Field of the image's path or URL."""
    caption: list[str] | None = None
    """Fields of the captions; None means "text", "caption" or "prompt"."""
    root: Text | None = None
    """Folder of the paths, which may not lead out of it; None is the list's folder."""

    def rows(self) -> Iterator[dict]:
        """The records of the list. Raises FileNotFoundError, SourceError."""
        for _, record in records(self.file(), self.image):
            yield record

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        first, found = None, False
        for row in self.rows():
            first, name = first or row, row[self.image]
            if os.path.isabs(name):
                name = os.path.relpath(name, self.top)  # a path that leads outside now starts with .. and is rejected
            values = captions_in(row, self.caption)
            found = found or values is not None
            yield Input(printable(name), f"{self._stamp(name)} {digest(values)}", name, values or [])
        if first is not None and not found:
            wanted = " or ".join(map(repr, self.caption or ("text", "caption", "prompt")))
            raise SourceError(f"{self.path}: no record has the field {wanted}; the first has {', '.join(first)}")

    def join(self, stem: str, rows: Iterable[list]) -> Iterator[Input]:
        items = [Input(*row[1:]) for row in rows]  # several rows of an image are several captions
        captions = [text for item in items for text in item.captions]
        yield items[0]._replace(captions=captions, stamp=" ".join(item.stamp for item in items))

    @property
    def top(self) -> Path:
        """The folder of the paths."""
        return self.path.parent if self.root is None else self.base / Path(self.root).expanduser()

    def _stamp(self, name: str) -> str:
        if is_url(name):
            return ""
        try:
            status = os.stat(self.top / name)
        except (OSError, ValueError):
            return "gone"
        return f"{status.st_size} {status.st_mtime_ns}"

    def read_image(self, item: Input) -> bytes:
        return read_url(item.place) if is_url(item.place) else read_file(self.top, item.place)

    def read_head(self, item: Input) -> bytes:
        return read_url(item.place, HEAD) if is_url(item.place) else read_file(self.top, item.place, HEAD)

    def read_texts(self, item: Input) -> list[str]:
        return texts(item.captions, "the caption")


@dataclass(frozen=True, kw_only=True)
class Csv(JsonLines):
    """A CSV or TSV file with a header line; its columns are the fields of "jsonl"."""

    def rows(self) -> Iterator[dict]:
        for number, row in enumerate(table_rows(self.file()), 1):
            if not row.get(self.image):
                header = ", ".join(map(str, row))
                raise SourceError(f"{self.path}, row {number}: nothing in column {self.image!r}; there are {header}")
            yield row
