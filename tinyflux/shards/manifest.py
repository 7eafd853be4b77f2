"""manifest.json: what a source contains and how it was made. Everything in it is checked when it is read."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyflux.shards.index import FILE as INDEX
from tinyflux.shards.index import Index, shard_file
from tinyflux.shards.schema import LARGEST, SCHEMA, Field, Group, check_group
from tinyflux.shards.writer import Shard
from tinyflux.util import files

FORMAT_VERSION = 2
PER_FOLDER = 10_000
"""Most shards in one subfolder, and in a source without subfolders."""
OWN = ("crop", "resize", "resolution", "shapes", "seed", "latent")
"""Keys of a producer that may differ between the sources of a run."""
_KEYS = (
    ("format_version", int),
    ("source", str),
    ("dataset_id", int),
    ("count", int),
    ("shards", int),
    ("subfolders", bool),
    ("shapes", list),
    ("groups", dict),
    ("index", dict),
    ("null", (dict, type(None))),
    ("base", (dict, type(None))),
)
_LONGEST = 1 << 24  # most bytes of a manifest
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_SHA256 = re.compile("[0-9a-f]{64}")


class ManifestError(ValueError):
    """A manifest that cannot be used; names the file and the key."""


@dataclass(frozen=True)
class Base:
    """The source that an overlay adds to: a path relative to the overlay or a URL, and the SHA-256 of its manifest."""

    location: str
    sha256: str


class Manifest:
    """A source: its `groups`, the latent `shapes` (h, w) of its shards, and their `index`.

    null_sha256: of null.safetensors, if the source has its own texts. base: for an overlay. subfolders: whether shards
    are in subfolders of PER_FOLDER each. text: manifest.json, if it was read from a file. Raises ManifestError.
    """

    def __init__(
        self,
        source: str,
        dataset_id: int,
        groups: dict[str, Group],
        shapes: Sequence[tuple[int, int]],
        index: Index,
        *,
        null_sha256: str | None = None,
        base: Base | None = None,
        subfolders: bool = False,
        text: bytes | None = None,
    ):
        self.source, self.dataset_id, self.groups = source, dataset_id, groups
        self.shapes, self.index = tuple(shapes), index
        self.null_sha256, self.base, self.subfolders, self._text = null_sha256, base, subfolders, text
        _check(self)

    @classmethod
    def of(
        cls,
        source: str,
        dataset_id: int,
        groups: dict[str, Group],
        shards: Sequence[Shard],
        *,
        null_sha256: str | None = None,
        base: Base | None = None,
        subfolders: bool = False,
    ) -> "Manifest":
        """The manifest of finished shards."""
        shapes = sorted({shard.shape for shard in shards})
        for shard in shards:
            check_name(shard.name)
        try:
            index = Index.of(source, shards, shapes)
        except ValueError as error:
            raise ManifestError(str(error)) from error
        return cls(source, dataset_id, groups, shapes, index, null_sha256=null_sha256, base=base, subfolders=subfolders)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def count(self) -> int:
        """Samples in all shards."""
        return self.index.count

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.index.bytes.sum())

    @cached_property
    def shards(self) -> "Shards":
        """The shards in order."""
        return Shards(self)

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of each shard's first sample in the source, int64 [shards]."""
        return np.cumsum(self.index.samples, dtype=np.int64) - self.index.samples

    def samples_of_shapes(self) -> dict[tuple[int, int], int]:
        """Number of samples of each latent shape (h, w), in the order of `shapes`."""
        index = self.index
        return {shape: int(index.samples[index.shape == k].sum()) for k, shape in enumerate(self.shapes)}

    def locate(self, position: "int | np.ndarray") -> tuple[Any, Any]:
        """(shard, row in it) of a sample by its position in the source; two int64 arrays for an array of positions."""
        shard = np.searchsorted(self.starts, position, side="right") - 1
        row = position - self.starts[shard]
        return (int(shard), int(row)) if np.ndim(position) == 0 else (shard, row)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of manifest.json, which contains those of the index and the empty prompt."""
        return hashlib.sha256(self.to_json().encode() if self._text is None else self._text).hexdigest()

    def without(self, names: set[str]) -> "Manifest":
        """The same source without some of its shards."""
        kept = [shard for shard in self.shards if shard.name not in names]
        options = {"null_sha256": self.null_sha256, "base": self.base, "subfolders": self.subfolders}
        return Manifest.of(self.source, self.dataset_id, self.groups, kept, **options)

    def to_json(self) -> str:
        """The text of manifest.json."""
        groups = {}
        for name, group in self.groups.items():
            groups[name] = {"fields": {n: {"dtype": f.dtype, "shape": list(f.shape)} for n, f in group.fields.items()}}
            if group.timesteps is not None:
                groups[name]["timesteps"] = list(group.timesteps)
            if group.repeated:
                groups[name]["repeated"] = True
            groups[name]["producer"] = group.producer
        data = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "dataset_id": self.dataset_id,
            "count": self.count,
            "shards": len(self.index.samples),
            "subfolders": self.subfolders,
            "shapes": [list(shape) for shape in self.shapes],
            "groups": groups,
            "index": self.index.digest,
            "null": self.null_sha256 and {"sha256": self.null_sha256},
            "base": self.base and {"location": self.base.location, "sha256": self.base.sha256},
        }
        return _text(data) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write index.safetensors and, last, manifest.json."""
        folder = Path(folder)
        self.index.save(folder / INDEX)
        files.atomic_write(folder / "manifest.json", self.to_json())
        return folder / "manifest.json"

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read a source's folder. Raises ManifestError, FileNotFoundError."""
        path = Path(folder) / "manifest.json"
        return cls.from_parts(read_small(path), path.with_name(INDEX), str(path))

    @classmethod
    def from_parts(cls, text: bytes, index: Path, where: str) -> "Manifest":
        """A manifest from the bytes of manifest.json and its index file; `where` names it in errors.

        Raises ManifestError, FileNotFoundError.
        """
        data = parse(text, where)
        try:
            arrays = Index.load(index)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{index}: missing; python -m sharding.verify --repair rebuilds it") from error
        except ValueError as error:
            raise ManifestError(f"{index}: {error}") from error
        if arrays.digest != data["index"]:
            raise ManifestError(f"{index}: is not the index of {where}: its size or sha256 differs")
        try:
            manifest = cls(
                data["source"],
                data["dataset_id"],
                groups_of(data),
                [tuple(shape) for shape in data["shapes"]],
                arrays,
                null_sha256=data["null"] and data["null"]["sha256"],
                base=base_of(data),
                subfolders=data["subfolders"],
                text=text,
            )
            found = {"count": manifest.count, "shards": len(arrays.samples)}
            for key, value in found.items():
                if data[key] != value:
                    raise ManifestError(f"{key} is {data[key]}, the index has {value}")
        except ManifestError as error:
            raise ManifestError(f"{where}: {error}") from None
        return manifest


def _text(value, margin: str = "") -> str:
    """JSON with one entry per line, except short entries."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or len(margin) and len(line) < 100:
        return line
    rows = [f"{margin}  {json.dumps(key)}: {_text(entry, margin + '  ')}" for key, entry in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{margin}}}" if rows else line


class Shards(Sequence[Shard]):
    """The shards of a manifest, built from the index on access."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.index = manifest, manifest.index

    def __len__(self) -> int:
        return len(self.index.samples)

    def name(self, k: int) -> str:
        """The file name of a shard."""
        index = self.index
        return index.names[k] if index.names is not None else shard_file(self.manifest.source, int(index.number[k]))

    def __getitem__(self, k: int) -> Shard:
        k = range(len(self))[k]
        index, start = self.index, int(self.manifest.starts[k])
        count = int(index.samples[k])
        return Shard(
            name=self.name(k),
            count=count,
            bytes=int(index.bytes[k]),
            sha256=index.sha256[k].tobytes().hex(),
            shape=self.manifest.shapes[index.shape[k]],
            origins=index.origins[start : start + count],
            captions=index.captions[start : start + count],
            folder=f"{int(index.number[k]) // PER_FOLDER:03d}" if self.manifest.subfolders else "",
        )


def read_small(path: Path) -> bytes:
    """The bytes of a manifest. Raises ManifestError if the file is too large."""
    with open(path, "rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ManifestError(f"{path}: has more than {_LONGEST} bytes, so it is not a manifest")
    return data


def parse(text: str | bytes, where: str) -> dict:
    """The content of a manifest.json, with keys and types checked. Raises ManifestError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON: {error}") from error
    try:
        if not isinstance(data, dict):
            raise ManifestError("not a JSON object")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ManifestError(f"format_version is {version!r:.40}, this package reads {FORMAT_VERSION}")
        required = {key for key, _ in _KEYS}
        if set(data) != required:
            missing, unknown = sorted(required - set(data)), sorted(set(data) - required)
            raise ManifestError(f"missing keys {missing}, unknown keys {str(unknown):.200}")
        for key, kinds in _KEYS:
            if type(data[key]) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
                raise ManifestError(f"{key} is {data[key]!r:.80}, must be {_kind(kinds)}")
        _object(data["index"], "index", {"sha256": str, "bytes": int})
        for key, keys in (("null", {"sha256": str}), ("base", {"location": str, "sha256": str})):
            if data[key] is not None:
                _object(data[key], key, keys)
        for i, shape in enumerate(data["shapes"]):
            if type(shape) is not list:
                raise ManifestError(f"shapes[{i}] is {shape!r:.80}, must be [h, w]")
        groups_of(data)
    except ManifestError as error:
        raise ManifestError(f"{where}: {error}") from None
    return data


def groups_of(data: dict) -> dict[str, Group]:
    """The groups in the content of a manifest.json. Raises ManifestError."""
    return {name: _group(name, entry) for name, entry in data["groups"].items()}


def base_of(data: dict) -> Base | None:
    """The base in the content of a manifest.json, None if it is not an overlay."""
    return data["base"] and Base(**data["base"])


def _kind(kinds) -> str:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)


def _object(value, where: str, keys: dict[str, type]) -> None:
    if type(value) is not dict or set(value) != set(keys):
        raise ManifestError(f"{where} is {value!r:.80}, must have {', '.join(keys)}")
    for key, kind in keys.items():
        if type(value[key]) is not kind:
            raise ManifestError(f"{where}.{key} is {value[key]!r:.80}, must be {kind.__name__}")
    if "sha256" in keys and not _SHA256.fullmatch(value["sha256"]):
        raise ManifestError(f"{where}.sha256 is {value['sha256']!r:.80}, must be 64 hexadecimal digits")


def _group(name: str, entry) -> Group:
    where = f"groups.{name}"
    allowed = {"fields", "producer", "timesteps", "repeated"}
    if type(entry) is not dict or not {"fields", "producer"} <= set(entry) <= allowed:
        raise ManifestError(f"{where} is {entry!r:.80}, must have fields and producer, may have timesteps and repeated")
    for key, kind in (("fields", dict), ("producer", dict), ("timesteps", list), ("repeated", bool)):
        if key in entry and type(entry[key]) is not kind:
            raise ManifestError(f"{where}.{key} is {entry[key]!r:.80}, must be {kind.__name__}")
    fields = {}
    for field, found in entry["fields"].items():
        if type(found) is not dict or set(found) != {"dtype", "shape"} or type(found["shape"]) is not list:
            raise ManifestError(f"{where}.fields.{field} is {found!r:.80}, must have dtype and shape")
        fields[field] = Field(found["dtype"], tuple(found["shape"]))
    if not _shallow(entry["producer"]):
        raise ManifestError(f"{where}.producer is nested too deep")
    grid = tuple(entry["timesteps"]) if "timesteps" in entry else None
    return Group(fields, grid, entry.get("repeated", False), entry["producer"])


def _shallow(tree: dict, levels: int = 16) -> bool:
    """Whether dictionaries and lists are nested at most this deep."""
    layer = [tree]
    for _ in range(levels):
        parts = [part.values() if isinstance(part, dict) else part for part in layer]
        layer = [item for part in parts for item in part if isinstance(item, (dict, list))]
    return not layer


def check_name(name: str) -> str:
    """`name` if it is a plain file name. Raises ManifestError for separators, `..`, a leading dot, other characters."""
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise ManifestError(f"{name!r:.80} is not a plain file name (letters, digits, '_', '-', '+', '.')")
    return name


def shard_name(source: str, k: int) -> str:
    """The file name of shard k of a source, such as portraits-000000.tar. Raises ManifestError."""
    return check_name(shard_file(source, k))


def shard_path(source: str, k: int, subfolders: bool) -> str:
    """The path of shard k in its source's folder. Raises ManifestError."""
    name = shard_name(source, k)
    return f"{k // PER_FOLDER:03d}/{name}" if subfolders else name


def _check(m: Manifest) -> None:
    check_name(m.source)
    if type(m.dataset_id) is not int or m.dataset_id < 0:
        raise ManifestError(f"dataset_id is {m.dataset_id!r:.80}, must be an integer from 0")
    for name, group in m.groups.items():
        try:
            check_group(name, group)
        except ValueError as error:
            raise ManifestError(str(error)) from error
    required = [name for name, entry in SCHEMA.items() if not entry.optional]
    if m.base is None and (absent := [name for name in required if name not in m.groups]):
        raise ManifestError(f"groups lacks {', '.join(absent)}")
    names = [name for group in m.groups.values() for name in group.fields]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ManifestError(f"groups has the field {repeated.pop()} twice")
    if ("text" in m.groups) != (m.null_sha256 is not None):
        raise ManifestError("null must be present if the source has texts, and only then")
    shapes = m.shapes
    for shape in shapes:
        if len(shape) != 2 or any(type(n) is not int or not 1 <= n < 1 << 16 for n in shape):
            raise ManifestError(f"shapes has {list(shape)!r:.80}, must be [h, w], positive integers")
        for name, group in m.groups.items():
            if group.nbytes(shape) > LARGEST:
                raise ManifestError(f"groups.{name}: a sample of it has more than {LARGEST} bytes")
    if len(set(shapes)) != len(shapes):
        raise ManifestError("shapes has one twice")
    if len(m.index.shape) and int(m.index.shape.max()) >= len(shapes):
        raise ManifestError(f"the index has shape number {int(m.index.shape.max())}, the manifest has {len(shapes)}")
    for name in m.index.names or ():
        check_name(name)
    if m.index.names is not None and m.subfolders:
        raise ManifestError("subfolders need shards that are named by their numbers")


def diff_fingerprints(a: dict, b: dict) -> list[str]:
    """The keys in which two producer fingerprints differ, as "vae.revision: 'x' against 'y'"."""

    def flatten(tree: dict, prefix: str = "") -> dict:
        flat = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    a, b = flatten(a), flatten(b)
    return [f"{key}: {a.get(key)!r} against {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def diff_producers(a: dict[str, Group], b: dict[str, Group], without: tuple[str, ...] = ()) -> list[str]:
    """How the producers of the common groups differ, each difference once; `without`: keys to ignore."""
    found = []
    for name in a.keys() & b.keys():
        mine, other = ({k: v for k, v in g[name].producer.items() if k not in without} for g in (a, b))
        found += [line for line in diff_fingerprints(mine, other) if line not in found]
    return sorted(found)
