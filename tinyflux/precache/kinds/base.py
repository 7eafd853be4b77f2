"""Base classes of source kinds: the keys of a table in sources.toml, and inputs that are listed but not read yet."""

import hashlib
import json
from abc import ABC, abstractmethod
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
"""Most captions of one image."""
DEFAULT_FIELDS = ("text", "caption", "prompt")
_INNER = ("name", "kind", "base")


class SourceError(ValueError):
    """A source's description is wrong; the message names the file, table and key."""


class Input(NamedTuple):
    """An image with its captions in a listing: plain values, not read yet."""

    origin: str
    """The image's name in the source."""
    stamp: str
    """Changes when the input changes, as far as can be told without reading it."""
    place: Any = None
    """What its kind needs to read it."""
    captions: list | None = None
    """Its captions if the listing has them; None if they are read with the image."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One table of sources.toml, checked. Its fields are the keys that the table may have.

    A kind lists its inputs in one of three ways: by `inputs`; by `records`, `stem` and `join`, if an input is made of
    several files; or by `parts` and `inputs_of`, if each part is listed by the rank that builds it.
    """

    name: str
    kind: str
    base: Path
    """Folder of the sources.toml, the start of relative locations."""
    dataset_id: Annotated[int, Within(0, 9999)]
    weight: Annotated[float, Above(0)] = 1.0
    """Suggested share in training; a build only shows it."""

    recipe: ClassVar[str] = ""
    """Module and class of its recipe."""
    keeps_order: ClassVar[bool] = False
    """Whether its inputs keep their listed order; other inputs get an order keyed by the build's seed."""
    by_number: ClassVar[bool] = False
    """Whether an origin is the number of a row, which another image may take later."""

    def __post_init__(self):
        check(self)

    def parts(self) -> list[tuple[str, str]] | None:
        """(name, stamp) of its natural parts, such as tars; None if all its inputs are listed at once."""
        return None

    def done_with(self, part: str) -> None:
        """Called when all shards of a part are written: temporary files can be deleted."""

    def inputs_of(self, part: str) -> Iterator[Input]:
        """The inputs of one of these parts, in order. Raises SourceError."""
        raise TypeError(f"{type(self).__name__} has no parts, or must define `inputs_of`")

    def records(self, size: int, seed: int) -> Iterator[list]:
        """Lists that start with a stem. All records of a stem are later passed to `join`, which makes inputs of them.

        By default each input is one record.
        """
        for item in self.inputs(size, seed):
            yield [item.origin, *item]

    def stem(self, item: Input) -> str:
        """The stem of an input's records."""
        return item.origin

    def join(self, stem: str, rows: Iterable[list]) -> Iterator[Input]:
        """The inputs from the records of one stem."""
        for row in rows:
            yield Input(*row[1:])

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        """All current inputs of the source. `size` and `seed` are used for rendered images.

        Raises FileNotFoundError, SourceError.
        """
        raise TypeError(f"{type(self).__name__} lists its inputs by `records` or by `parts`, or must define `inputs`")

    @property
    def where(self) -> str:
        """Its location, for tables and messages."""
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
            raise SourceError(f"[{self.name}] location: {self.path} is a file, but kind {self.kind!r} needs a folder")
        return self.path

    def file(self) -> Path:
        """Its location, a file. Raises FileNotFoundError."""
        if not self.path.is_file():
            raise FileNotFoundError(f"[{self.name}] location: {self.path}: no such file")
        return self.path

    def describe(self) -> dict:
        """The keys that affect a build's samples and are not at their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("base", "weight") and (f.default is MISSING or getattr(self, f.name) != f.default)
        }

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that a table of this kind may have, `kind` among them."""
        return ["kind", *(f.name for f in fields(cls) if f.name not in _INNER)]

    @classmethod
    def required(cls) -> list[str]:
        """The required keys."""
        return [f.name for f in fields(cls) if f.name not in _INNER and f.default is MISSING]


@dataclass(frozen=True, kw_only=True)
class CaptionedSource(Source):
    """A source whose inputs have captions."""

    captions: Literal["first", "longest", "random", "all"] | None = None
    """Which of several captions to keep; None means all, and a text file is one caption."""
    allow_empty_captions: bool = False

    def read_texts(self, item: Input) -> list[str]:
        """All captions of an input, in any thread. Raises Rejected, UnicodeError."""
        return texts(item.captions, "the caption")

    def sought(self, item: Input) -> str:
        """Where a missing caption was looked for, and what was found there."""
        return ""

    def prompts(self, item: Input, seed: int) -> list[str]:
        """The captions of an input by the source's rule; `seed` is the sample's. Raises Rejected."""
        try:
            given = self.read_texts(item)
            for text in given:
                text.encode()  # a lone surrogate from JSON would fail much later
        except UnicodeError as error:
            raise Rejected(f"caption is not UTF-8: {error.reason}") from error
        if any("\0" in text for text in given):
            raise Rejected("caption has null bytes: is it in UTF-16? It must be in UTF-8")
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
        if self.captions == "first":
            return filled[:1]
        if len(filled) > MOST_CAPTIONS:
            raise Rejected(f"too many captions: {len(filled)}, at most {MOST_CAPTIONS} can be kept")
        return filled


@dataclass(frozen=True, kw_only=True)
class ImageSource(CaptionedSource, ABC):
    """Base class of sources of images."""

    recipe: ClassVar[str] = "from_images:FromImages"
    crop: Literal["center", "top", "random"] = "center"
    size: Annotated[int, AtLeast(64)] | None = None
    """Side of the square image in pixels; None is the zoo's own."""
    min_side: Annotated[int, AtLeast(1)] = 32
    """Images with a shorter side are rejected."""
    max_aspect: Annotated[float, AtLeast(1)] = 4.0
    """Images whose longer side is more than this many times the shorter are rejected."""
    max_pixels: Annotated[int, Within(1, 178_956_970)] = 100_000_000  # Pillow opens no larger ones
    """Images with more pixels are rejected before they are decoded."""

    def __post_init__(self):
        super().__post_init__()
        # 8 for the VAE x 8 for the UNet
        require(self.size is None or self.size % 64 == 0, "size", self.size, "a multiple of 64")

    @abstractmethod
    def read_image(self, item: Input) -> bytes | Image.Image:
        """The image, in any thread. Raises Rejected."""

    def read_head(self, item: Input) -> bytes | Image.Image:
        """The first bytes of the image's file, or all of it. Raises Rejected."""
        return self.read_image(item)

    def read_size(self, item: Input) -> tuple[int, int] | None:
        """Width and height of the upright image; None if its header is unreadable. Raises Rejected."""
        return size_of(self.read_head(item)) or size_of(self.read_image(item))


def texts(value: object, where: str) -> list[str]:
    """The captions in a field of a record: a text, a list of texts, or nothing. Raises Rejected."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise Rejected(f"caption is not a text: {where} is {value!r:.60}")
    return values


def captions_in(record: dict, fields: Sequence[str] | None) -> list | None:
    """A record's values of all these fields; by default of the first existing field of "text", "caption" and "prompt".
    None if it has none of them."""
    names = fields or [name for name in DEFAULT_FIELDS if name in record][:1]
    found = [record[name] for name in names if name in record]
    if not found:
        return None
    return [text for value in found for text in (value if isinstance(value, list) else [value]) if text is not None]


def digest(*parts: object) -> str:
    """A short hash of values, for a stamp."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
