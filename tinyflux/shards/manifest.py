"""manifest.json: what a source holds and what made it. Everything in it is checked when it is read."""

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from tinyflux.shards.format import DTYPES, GROUPS, Field
from tinyflux.shards.writer import Shard, atomic_write
from tinyflux.util.buckets import BUCKETS

FORMAT_VERSION = 1
_REQUIRED = {"format_version", "source", "dataset_id", "count", "buckets", "fields", "fingerprint", "shards"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


class ManifestError(ValueError):
    """A manifest that cannot be used; names the file and the key."""


@dataclass
class Manifest:
    """A source: its `shards` in order, the `fields` of its samples, and the `fingerprint` of what produced them."""

    source: str
    dataset_id: int
    fields: dict[str, Field]
    shards: list[Shard]
    fingerprint: dict = field(default_factory=dict)
    buckets: tuple[float, ...] = BUCKETS
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        _check(self)

    @property
    def count(self) -> int:
        """Samples in all shards."""
        return sum(shard.count for shard in self.shards)

    @cached_property
    def starts(self) -> np.ndarray:
        """Position in the source of the first sample of each shard, int64 [shards]."""
        return np.cumsum([0, *(shard.count for shard in self.shards[:-1])], dtype=np.int64)

    @cached_property
    def groups(self) -> dict[str, dict[str, Field]]:
        """The fields of each member of a sample, by group name."""
        return {
            group: {name: self.fields[name] for name in names}
            for group, names in GROUPS.items()
            if names[0] in self.fields
        }

    def to_json(self) -> str:
        """The text of manifest.json: one shard a line."""
        head = {
            "format_version": self.format_version,
            "source": self.source,
            "dataset_id": self.dataset_id,
            "count": self.count,
            "buckets": list(self.buckets),
            "fields": {name: {"dtype": f.dtype, "shape": list(f.shape)} for name, f in self.fields.items()},
            "fingerprint": self.fingerprint,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        shards = [f"    {json.dumps(shard.to_dict())}" for shard in self.shards]
        return "{\n" + ",\n".join(lines) + ',\n  "shards": [\n' + ",\n".join(shards) + "\n  ]\n}\n"

    def save(self, folder: str | Path) -> Path:
        """Write folder/manifest.json atomically."""
        path = Path(folder) / "manifest.json"
        atomic_write(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read a manifest.json, or the one of a source folder. Raises ManifestError, FileNotFoundError."""
        path = Path(path)
        if path.is_dir():
            path = path / "manifest.json"
        return cls.from_json(path.read_bytes(), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse and check a manifest; `where` names it in errors. Raises ManifestError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{where}: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ManifestError(f"{where}: not a JSON object")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ManifestError(f"{where}: format_version is {version!r}, this package reads {FORMAT_VERSION}")
        if set(data) != _REQUIRED:
            missing, unknown = sorted(_REQUIRED - set(data)), sorted(set(data) - _REQUIRED)
            raise ManifestError(f"{where}: missing keys {missing}, unknown keys {unknown}")
        try:
            fields = {name: _field(name, entry) for name, entry in _typed(data, "fields", dict).items()}
            shards = [_shard(i, entry) for i, entry in enumerate(_typed(data, "shards", list))]
            buckets = tuple(_typed(data, "buckets", list))
            manifest = cls(data["source"], data["dataset_id"], fields, shards, data["fingerprint"], buckets)
            if manifest.count != data["count"]:
                raise ManifestError(f"count is {data['count']!r}, the shards have {manifest.count}")
        except ManifestError as error:
            raise ManifestError(f"{where}: {error}") from None
        return manifest


def _typed(data: dict, key: str, kind: type, where: str = ""):
    value = data.get(key)
    if type(value) is not kind:
        raise ManifestError(f"{where}{key} is {value!r:.80}, must be {kind.__name__}")
    return value


def _field(name: str, entry) -> Field:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape"}:
        raise ManifestError(f"fields.{name} must have dtype and shape")
    return Field(entry["dtype"], tuple(_typed(entry, "shape", list, f"fields.{name}.")))


def _shard(i: int, entry) -> Shard:
    keys = {"name": str, "count": int, "bytes": int, "sha256": str, "origins": str}
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise ManifestError(f"shards[{i}] must have {', '.join(keys)}")
    return Shard(**{key: _typed(entry, key, kind, f"shards[{i}].") for key, kind in keys.items()})


def check_name(name: str) -> str:
    """`name` if it is a plain file name. Raises ManifestError on separators, `..`, a leading dot, odd characters."""
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise ManifestError(f"{name!r} is not a plain file name (letters, digits, '_', '-', '+', '.')")
    return name


def shard_name(source: str, k: int) -> str:
    """The file name of shard k of a source: portraits-000000.tar."""
    return check_name(f"{source}-{k:06d}.tar")


def _check(m: Manifest) -> None:
    check_name(m.source)
    if type(m.dataset_id) is not int or m.dataset_id < 0:
        raise ManifestError(f"dataset_id is {m.dataset_id!r}, must be an integer from 0")
    if type(m.fingerprint) is not dict:
        raise ManifestError(f"fingerprint is {m.fingerprint!r:.80}, must be an object")
    buckets = m.buckets
    if len(buckets) < 2 or any(type(b) is not float for b in buckets) or list(buckets) != sorted(set(buckets)):
        raise ManifestError(f"buckets is {list(buckets)}, must be two or more rising numbers")
    for group, names in GROUPS.items():
        absent = [name for name in names if name not in m.fields]
        if absent and (group == "encodings" or len(absent) < len(names)):
            raise ManifestError(f"fields lacks {', '.join(absent)}")
    known = {name: group for group, names in GROUPS.items() for name in names}
    for name, f in m.fields.items():
        if name not in known:
            raise ManifestError(f"fields.{name} is unknown; the format has {', '.join(known)}")
        if f.dtype not in DTYPES:
            raise ManifestError(f"fields.{name}.dtype is {f.dtype!r}, must be one of {', '.join(DTYPES)}")
        if not f.shape or any(type(n) is not int or n < 1 for n in f.shape):
            raise ManifestError(f"fields.{name}.shape is {list(f.shape)}, must be positive integers")
        if known[name] != "encodings" and f.shape[0] != len(buckets):
            raise ManifestError(f"fields.{name}.shape is {list(f.shape)}, there are {len(buckets)} buckets")
    names = set()
    for i, shard in enumerate(m.shards):
        if check_name(shard.name) in names:
            raise ManifestError(f"shards[{i}].name {shard.name!r} occurs twice")
        names.add(shard.name)
        if shard.count < 1 or shard.bytes < 1:
            raise ManifestError(f"shards[{i}] has count {shard.count} and bytes {shard.bytes}, both must be positive")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ManifestError(f"shards[{i}].sha256 is {shard.sha256!r:.80}, must be 64 hexadecimal digits")
        try:
            hashes = len(base64.b64decode(shard.origins, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ManifestError(f"shards[{i}].origins is not base64: {error}") from error
        if hashes != 2 * shard.count:
            raise ManifestError(f"shards[{i}].origins has {hashes} bytes for {shard.count} samples, must have 2 each")


def diff_fingerprints(a: dict, b: dict) -> list[str]:
    """The fields in which two producer fingerprints differ, as "vae.revision: 'x' against 'y'"."""

    def flatten(tree: dict, prefix: str = "") -> dict:
        flat = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    a, b = flatten(a), flatten(b)
    return [f"{key}: {a.get(key)!r} against {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]
