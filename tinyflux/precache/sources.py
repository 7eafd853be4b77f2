"""sources.toml: which images and captions a source is made of.

One table a source; its name is the source's name and the prefix of its shards:

    [portraits]
    kind = "imagefolder"
    location = "~/photos/portraits"
    dataset_id = 3

`sources.toml` beside this file documents every key.
"""

import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

PACKAGED = Path(__file__).parents[2] / "sharding" / "sources.toml"

COMMON = ("kind", "dataset_id", "weight", "captions", "allow_empty_captions", "crop", "size", "min_side",
          "max_aspect", "max_pixels")  # fmt: skip
OF_ALL = ("kind", "dataset_id", "weight")  # of COMMON, what does not concern images
# kind -> keys it must have, keys it may have; readers.py has one function for each
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shapes": (("count",), ()),
    "imagefolder": (("location",), ("caption",)),
    "webdataset": (("location",), ("caption",)),
    "hf": (("location",), ("image", "caption", "split", "config", "revision", "streaming", "count")),
    "jsonl": (("location",), ("image", "caption", "root")),
    "csv": (("location",), ("image", "caption", "root")),
    "cache": (("location",), ("null",)),
}
CROPS = ("center", "top", "random")
CAPTION_RULES = ("first", "longest", "random", "all")


class SourceError(ValueError):
    """A source that cannot be read as it is described; the message names the file, table and key."""


@dataclass(frozen=True)
class SourceSpec:
    """One table of sources.toml, checked."""

    name: str
    kind: str
    dataset_id: int
    location: str = ""
    """Folder, file, URL or Hub name, as written; `path` resolves it."""
    image: str = "image"
    """Field or column of the image."""
    caption: str = ""
    """Field or column of the caption; empty means the kind's default."""
    captions: str = ""
    """Which of several captions to keep; empty means the first, and that a text file is one caption."""
    allow_empty_captions: bool = False
    crop: str = "center"
    size: int | None = None
    """Side of the square image in pixels; None is the zoo's own."""
    min_side: int = 32
    """Images with a shorter side are rejected."""
    max_aspect: float = 4.0
    """Images whose longer side is more than this many times the shorter are rejected."""
    max_pixels: int = 100_000_000
    """Images with more pixels are rejected before they are decoded."""
    weight: float = 1.0
    """Share suggested to training; a build only shows it."""
    count: int | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    root: str | None = None
    """Folder that the paths of a jsonl or csv list are relative to and may not leave; None is the list's own."""
    null: str | None = None
    """A null.safetensors for an old cache, made with the same T5 and CLIP; None is zeros."""
    base: Path = field(default=Path(), compare=False, repr=False)
    """Folder of the sources.toml, which relative locations start from."""

    @property
    def path(self) -> Path:
        """`location` as a path on this machine."""
        return self.base / Path(self.location).expanduser()


def _whole(low: int, high: int | None = None):
    def check(value) -> bool:
        return type(value) is int and value >= low and (high is None or value <= high)

    return check, f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"


def _choice(*accepted: str):
    return lambda value: value in accepted, "one of " + ", ".join(accepted)


_TEXT = (lambda value: isinstance(value, str) and value != "", "a text")
_FLAG = (lambda value: isinstance(value, bool), "true or false")


def _number(accepted: str, holds):
    return lambda value: type(value) in (int, float) and holds(value), accepted


# key -> (is the value accepted?, what is)
CHECKS = {
    "kind": _choice(*KINDS),
    "dataset_id": _whole(0, 9999),
    "location": _TEXT,
    "image": _TEXT,
    "caption": _TEXT,
    "captions": _choice(*CAPTION_RULES),
    "allow_empty_captions": _FLAG,
    "crop": _choice(*CROPS),
    "size": (lambda v: type(v) is int and v > 0 and v % 64 == 0, "a multiple of 64"),  # 8 for the VAE x 8 for the UNet
    "min_side": _whole(1),
    "max_aspect": _number("a number >= 1", lambda v: 1 <= v < float("inf")),
    "max_pixels": _whole(1),
    "weight": _number("a number > 0", lambda v: 0 < v < float("inf")),
    "count": _whole(1),
    "split": _TEXT,
    "config": _TEXT,
    "revision": _TEXT,
    "streaming": _FLAG,
    "root": _TEXT,
    "null": _TEXT,
}


def _spec(file: Path, name: str, table: object) -> SourceSpec:
    where = f"{file}: [{name}]"
    if not isinstance(table, dict):
        raise SourceError(f"{file}: {name!r} stands outside a table; a source is a [table] with kind and dataset_id")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise SourceError(f"{where}: a source's name is made of letters, digits, - and _")
    kind = table.get("kind")
    if kind not in KINDS:
        raise SourceError(f"{where} kind: must be {CHECKS['kind'][1]}; it is {kind!r}")
    required, optional = KINDS[kind]
    allowed = (*(OF_ALL if kind == "cache" else COMMON), *required, *optional)
    for key in table:
        if key not in allowed:
            raise SourceError(f"{where}: unknown key {key!r}; kind {kind!r} takes {', '.join(allowed)}")
    for key in ("dataset_id", *required):
        if key not in table:
            raise SourceError(f"{where}: {key} is missing; it must be {CHECKS[key][1]}")
    for key, value in table.items():
        holds, accepted = CHECKS[key]
        if not holds(value):
            raise SourceError(f"{where} {key}: must be {accepted}; it is {value!r}")
    return SourceSpec(name=name, base=file.resolve().parent, **table)


def load_sources(file: str | Path | None = None) -> dict[str, SourceSpec]:
    """All sources of a sources.toml by name.

    `file` None reads ./sources.toml where there is one, else the packaged file. Raises FileNotFoundError,
    and SourceError with the table and key of whatever is not understood.
    """
    if file is None:
        file = Path("sources.toml") if Path("sources.toml").is_file() else PACKAGED
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such sources file")
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # TOMLDecodeError or bytes that are not UTF-8
        raise SourceError(f"{file}: not a TOML file: {error}") from error
    specs = {name: _spec(file, name, table) for name, table in tables.items()}
    owner: dict[int, str] = {}
    for spec in specs.values():
        if spec.dataset_id in owner:
            raise SourceError(
                f"{file}: [{spec.name}] dataset_id: {spec.dataset_id} is taken by [{owner[spec.dataset_id]}]; "
                "sample keys start with it, so it must be the source's own"
            )
        owner[spec.dataset_id] = spec.name
    return specs


def find_source(name: str, file: str | Path | None = None) -> SourceSpec:
    """The source of that name; raises SourceError that lists the known ones."""
    specs = load_sources(file)
    if name not in specs:
        known = ", ".join(sorted(specs)) or "none"
        raise SourceError(f"unknown source {name!r}; known: {known}. Add a [{name}] table to a sources.toml")
    return specs[name]


def unlisted_source(location: str, kind: str, dataset_id: int) -> SourceSpec:
    """A source that no file describes, named after the last part of its location. Raises SourceError."""
    if kind not in KINDS or "location" not in KINDS[kind][0]:
        kinds = ", ".join(name for name, (required, _) in KINDS.items() if required == ("location",))
        raise SourceError(f"--kind {kind}: such a source must be described in a sources.toml; known here: {kinds}")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(location).expanduser().resolve().stem).strip("-") or "source"
    return _spec(Path("--source"), name, {"kind": kind, "location": location, "dataset_id": dataset_id})


def describe(spec: SourceSpec) -> dict:
    """What of a spec decides a build's samples: the keys that are not at their defaults, without name and weight."""
    return {
        f.name: getattr(spec, f.name)
        for f in fields(spec)
        if f.name not in ("name", "base", "weight") and getattr(spec, f.name) != f.default
    }


def table(specs: dict[str, SourceSpec]) -> str:
    """The sources as aligned columns, for `--list`."""
    rows = [("source", "kind", "dataset_id", "weight", "crop", "location")]
    for spec in specs.values():
        place = spec.location or f"{spec.count} rendered images"
        rows.append((spec.name, spec.kind, str(spec.dataset_id), f"{spec.weight:g}", spec.crop, place))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
