"""Kind "hf": a dataset of the `datasets` library, on the Hub or in a local folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Annotated

from tinyflux.precache.images import Rejected
from tinyflux.precache.inputs import read_file
from tinyflux.precache.kinds.base import (
    DEFAULT_FIELDS,
    ImageSource,
    Input,
    SourceError,
    Text,
    captions_in,
    digest,
    texts,
)
from tinyflux.util.settings import AtLeast

TEXTS = ("string", "large_string", "string_view", "null")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which rows of a dataset to use."""

    split: Text = "train"
    config: Text | None = None
    revision: Text | None = None
    streaming: bool = False
    """Stream instead of downloading first; needs `count`, the number of rows to take."""
    count: Annotated[int, AtLeast(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class HfDataset(Rows, ImageSource):
    """A dataset of the `datasets` library: a Hub name, or a local folder of images, parquet or arrow files."""

    location: Text
    image: Text = "image"
    caption: list[str] | None = None
    """Columns of the captions; None means "text", "caption" or "prompt"."""
    by_number = True

    def __post_init__(self):
        super().__post_init__()
        if self.streaming and self.count is None:
            raise ValueError("streaming needs count, the number of rows to take")

    @property
    def keeps_order(self) -> bool:
        """Whether it is streamed: a stream is read in order."""
        return self.streaming

    @cached_property
    def found(self) -> str:
        """Its folder on this machine, else its name on the Hub."""
        return str(self.path) if self.path.exists() else self.location

    @cached_property
    def loaded(self):
        """The dataset with all columns. Raises SourceError."""
        try:
            import datasets  # optional: only this kind needs it
        except ImportError as error:
            raise SourceError(f"[{self.name}] kind 'hf' needs the datasets package: pip install datasets") from error
        where = self.found
        try:
            if (Path(where) / "state.json").is_file():
                return datasets.load_from_disk(where)
            if (Path(where) / "dataset_dict.json").is_file():
                return datasets.load_from_disk(where)[self.split]
            return datasets.load_dataset(
                where, name=self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            why = f"{error}: {error.__cause__}" if error.__cause__ else error
            raise SourceError(f"[{self.name}] {where}: cannot be loaded as a dataset: {why}") from error

    @cached_property
    def rows(self):
        """The dataset with only the needed columns. Raises SourceError."""
        rows, where = self.loaded, self.found
        columns = rows.features or {}
        texts = self.caption or [name for name in DEFAULT_FIELDS if name in columns][:1]
        wanted = self.cells | {"caption": texts or [" or ".join(DEFAULT_FIELDS)]}
        for key, names in wanted.items():
            if missing := [name for name in names if name not in columns]:
                raise SourceError(f"[{self.name}] {key}: no column {missing[0]!r}; {where} has {', '.join(columns)}")
        found = self.as_read(rows.select_columns(list({name for names in wanted.values() for name in names})))
        for name in texts:
            kind = columns[name]
            while inner := getattr(kind, "feature", None):  # of a list
                kind = inner
            if getattr(kind, "dtype", None) not in TEXTS:
                raise SourceError(f"[{self.name}] caption: column {name!r} is {columns[name]}, must be text")
        return found

    @property
    def cells(self) -> dict[str, list[str]]:
        """The columns besides the captions, by the key that names them."""
        return {"image": [self.image]}

    def as_read(self, rows):
        """The dataset with cells in the form for `read_image`. Raises SourceError for a column of another type."""
        import datasets

        kind = rows.features[self.image]
        if isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary"):
            return rows
        if not isinstance(kind, datasets.Image):
            raise SourceError(f"[{self.name}] image: column {self.image!r} is {kind}, must be an Image or binary")
        return rows.cast_column(self.image, datasets.Image(decode=False))

    @cached_property
    def stream(self) -> "_Stream":
        """Its rows by number, if it is streamed."""
        return _Stream(self)

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        if self.streaming:
            yield from (Input(f"{self.split}/{i}", "", i) for i in range(self.count))
            return
        others = {name for names in self.cells.values() for name in names}
        names = [name for name in self.rows.column_names if name not in others]
        stamp = self.loaded._fingerprint  # the captions alone do not tell that an image has changed
        for i, row in enumerate(self.rows.with_format(None).select_columns(names)):
            values = captions_in(row, self.caption)
            yield Input(f"{self.split}/{i}", digest(values, stamp), i, values)

    def read_image(self, item: Input) -> bytes:
        if self.streaming:
            cell = self.stream.row(item.place).pop(self.image)  # pop, so that cached rows stay small
        else:
            cell = self.rows[item.place][self.image]
        if not cell or isinstance(cell, dict) and cell["bytes"] is cell["path"] is None:
            raise Rejected("missing image")
        if isinstance(cell, bytes) or cell["bytes"] is not None:
            return cell if isinstance(cell, bytes) else cell["bytes"]
        return read_file(Path(cell["path"]).parent, Path(cell["path"]).name)

    def read_texts(self, item: Input) -> list[str]:
        given = captions_in(self.stream.row(item.place), self.caption) if self.streaming else item.captions
        return texts(given, "the caption")


class _Stream:
    """Rows of a streaming dataset by number, requested in nearly ascending order by several threads."""

    KEPT = 2048

    def __init__(self, source: HfDataset):
        self._rows, self._source, self._lock = source.rows, source, Lock()
        self._kept: dict[int, dict] = {}
        self._iterator, self._next = None, 0

    def row(self, i: int) -> dict:
        """Row i. Raises SourceError beyond the end."""
        with self._lock:
            near = self._iterator is not None and self._next <= i < self._next + self.KEPT
            if i not in self._kept and not near:
                self._iterator, self._next = iter(self._rows.skip(i)), i
            while i not in self._kept:
                row = next(self._iterator, None)
                if row is None:
                    where = f"[{self._source.name}] count: {self._source.count} rows asked for"
                    raise SourceError(f"{where}, {self._source.location} ends before row {self._next + 1}")
                self._kept[self._next] = row
                self._next += 1
                self._kept.pop(self._next - self.KEPT, None)
            return self._kept[i]
