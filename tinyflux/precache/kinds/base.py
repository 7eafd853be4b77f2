"""What every kind of source has: the keys of its table in sources.toml, and inputs that are named but not read yet."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from PIL import Image

from tinyflux.precache.images import Rejected, size_of
from tinyflux.util import rng
from tinyflux.util.settings import Above, AtLeast, Match, Within, check, require

Text = Annotated[str, Match(r"(?s).+", "that is not empty")]
MOST_CAPTIONS = 255
"""Captions of one image that are kept."""
DEFAULT_FIELDS = ("text", "caption", "prompt")
_INNER = ("name", "kind", "base")


class SourceError(ValueError):
    """A source that cannot be read as it is described; the message names the file, table and key."""


class Input(NamedTuple):
    """An image with its captions as a listing has it: plain values, nothing of it read yet."""

    origin: str
    """The image's name in the source."""
    stamp: str
    """Changes when the input does, as far as can be seen without reading it."""
    place: Any = None
    """What its kind needs to read it."""
    captions: list | None = None
    """Its captions where the listing has them; None where they are read with the image."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One table of sources.toml, checked. Its fields are the keys that the table may have."""

    name: str
    kind: str
    base: Path
    """Folder of the sources.toml, which relative locations start from."""
    dataset_id: Annotated[int, Within(0, 9999)]
    weight: Annotated[float, Above(0)] = 1.0
    """Share suggested to training; a build only shows it."""

    recipe: ClassVar[str] = ""
    """What `sharding.build` makes of it: module and class of its recipe."""
    keeps_order: ClassVar[bool] = False
    """Whether its inputs keep the order that they are listed in; others are put in one keyed by the build's seed."""

    def __post_init__(self):
        check(self)

    def parts(self) -> list[tuple[str, str]] | None:
        """(name, stamp) of the parts that it comes in, such as tars; None where its inputs are listed whole."""
        return None

    def done_with(self, part: str) -> None:
        """Called once all shards of a part are written: what was kept of it can be deleted."""

    def inputs_of(self, part: str) -> Iterator[Input]:
        """The inputs of one of these parts, in order. Raises SourceError."""
        raise NotImplementedError

    def records(self, size: int, seed: int) -> Iterator[list]:
        """Lists that begin with a stem: `join` makes inputs of those of one stem, which come to it in the end.

        By default each input is a record of its own.
        """
        for item in self.inputs(size, seed):
            yield [item.origin, *item]

    def stem(self, item: Input) -> str:
        """The stem that an input's records have."""
        return item.origin

    def join(self, stem: str, rows: Iterable[list]) -> Iterator[Input]:
        """The inputs that the records of one stem make."""
        for row in rows:
            yield Input(*row[1:])

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        """Everything that the source holds now. `size` and `seed` are what rendered images are drawn with.

        Raises FileNotFoundError, SourceError.
        """
        raise NotImplementedError

    @property
    def where(self) -> str:
        """What it is made of, for tables and messages."""
        return getattr(self, "location", "")

    @property
    def path(self) -> Path:
        """Its `location` as a path on this machine."""
        return self.base / Path(self.where).expanduser()

    def folder(self) -> Path:
        """Its location, a folder. Raises FileNotFoundError, SourceError."""
        if not self.path.exists():
            raise FileNotFoundError(f"[{self.name}] location: {self.path}: no such folder")
        if not self.path.is_dir():
            raise SourceError(f"[{self.name}] location: {self.path} is a file, kind {self.kind!r} wants a folder")
        return self.path

    def file(self) -> Path:
        """Its location, a file. Raises FileNotFoundError."""
        if not self.path.is_file():
            raise FileNotFoundError(f"[{self.name}] location: {self.path}: no such file")
        return self.path

    def describe(self) -> dict:
        """The keys that decide a build's samples and are not at their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("name", "base", "weight") and (f.default is MISSING or getattr(self, f.name) != f.default)
        }

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that a table of this kind may have, `kind` among them."""
        return ["kind", *(f.name for f in fields(cls) if f.name not in _INNER)]

    @classmethod
    def required(cls) -> list[str]:
        """The keys that it must have."""
        return [f.name for f in fields(cls) if f.name not in _INNER and f.default is MISSING]


@dataclass(frozen=True, kw_only=True)
class CaptionedSource(Source):
    """A source whose inputs have captions."""

    captions: Literal["first", "longest", "random", "all"] | None = None
    """Which of several captions to keep; None means all, and that a text file is one caption."""
    allow_empty_captions: bool = False

    def read_texts(self, item: Input) -> list[str]:
        """All captions of an input, in any thread. Raises Rejected, UnicodeError."""
        return texts(item.captions, "the caption")

    def sought(self, item: Input) -> str:
        """What was looked for where an input has no caption, and what lies there."""
        return ""

    def prompts(self, item: Input, seed: int) -> list[str]:
        """The captions of an input by the source's rule; `seed` is the sample's own. Raises Rejected."""
        try:
            given = self.read_texts(item)
            for text in given:
                text.encode()  # a lone surrogate out of JSON would fail much later
        except UnicodeError as error:
            raise Rejected(f"caption is not UTF-8: {error.reason}") from error
        filled = [text for text in (" ".join(text.split()) for text in given) if text]
        if not filled:
            if self.allow_empty_captions:
                return [""]
            sought = self.sought(item)
            raise Rejected("empty caption" if given else f"missing caption{sought and f': {sought}'}")
        if self.captions == "longest":
            return [max(filled, key=len)]
        if self.captions == "random":
            return [filled[rng.key(seed, "caption") % len(filled)]]
        return filled[:1] if self.captions == "first" else filled[:MOST_CAPTIONS]


@dataclass(frozen=True, kw_only=True)
class ImageSource(CaptionedSource):
    """A source of images: what all of its kinds have in common."""

    recipe: ClassVar[str] = "from_images:FromImages"
    crop: Literal["center", "top", "random"] = "center"
    size: Annotated[int, AtLeast(64)] | None = None
    """Side of the square image in pixels; None is the zoo's own."""
    min_side: Annotated[int, AtLeast(1)] = 32
    """Images with a shorter side are rejected."""
    max_aspect: Annotated[float, AtLeast(1)] = 4.0
    """Images whose longer side is more than this many times the shorter are rejected."""
    max_pixels: Annotated[int, AtLeast(1)] = 100_000_000
    """Images with more pixels are rejected before they are decoded."""

    def __post_init__(self):
        super().__post_init__()
        # 8 for the VAE x 8 for the UNet
        require(self.size is None or self.size % 64 == 0, "size", self.size, "a multiple of 64")

    def read_image(self, item: Input) -> bytes | Image.Image:
        """The image, in any thread. Raises Rejected."""
        raise NotImplementedError

    def read_head(self, item: Input) -> bytes | Image.Image:
        """The beginning of the image's file, or all of it. Raises Rejected."""
        return self.read_image(item)

    def read_size(self, item: Input) -> tuple[int, int] | None:
        """Width and height of the upright image; None where it has no readable header. Raises Rejected."""
        return size_of(self.read_head(item)) or size_of(self.read_image(item))


def texts(value: object, where: str) -> list[str]:
    """The captions in a field of a record: a text, a list of texts, or nothing. Raises Rejected."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise Rejected(f"caption is not a text: {where} is {value!r:.60}")
    return values


def captions_in(record: dict, fields: Sequence[str] | None) -> list | None:
    """What a record has under these fields, all of them; by default the first of "text", "caption" and "prompt" that
    it has. None where it has none of them."""
    names = fields or [name for name in DEFAULT_FIELDS if name in record][:1]
    found = [record[name] for name in names if name in record]
    if not found:
        return None
    return [text for value in found for text in (value if isinstance(value, list) else [value]) if text is not None]


def digest(*parts: object) -> str:
    """A short stamp of values that are at hand."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
