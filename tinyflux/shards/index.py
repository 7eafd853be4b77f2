"""index.safetensors: facts of each shard and each sample of a source, as arrays that are read by mmap."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from tinyflux.shards.writer import Shard
from tinyflux.util import files

FILE = "index.safetensors"
# in file order: the widest dtype first, so that all arrays are aligned
_DTYPES = {"bytes": "<u8", "samples": "<u4", "number": "<u4", "origins": "<u4", "shape": "<u2"}
_DTYPES |= {"sha256": "u1", "captions": "u1", "names": "u1"}
_KINDS = {"<u8": "U64", "<u4": "U32", "<u2": "U16", "u1": "U8"}
_HEADER_LIMIT = 1 << 16
_PORTION = 1 << 22  # elements written at a time


class Index:
    """The arrays of a source. Per shard: `bytes`, `samples`, `number`, `shape` (row of the manifest's shapes) and
    `sha256` [shards, 32]; per sample: `origins` (hash of its image's origin) and `captions` (their number).

    `names`: the shards' file names, if they don't follow from their numbers. digest: SHA-256 and size of the arrays'
    file. Raises ValueError.
    """

    def __init__(self, arrays: dict[str, np.ndarray], digest: dict | None = None):
        missing, unknown = sorted(set(_DTYPES) - {"names"} - set(arrays)), sorted(set(arrays) - set(_DTYPES))
        if missing or unknown:
            raise ValueError(f"missing arrays {missing}, unknown arrays {unknown}")
        self.arrays, self._digest = arrays, digest
        self.bytes, self.samples, self.number = arrays["bytes"], arrays["samples"], arrays["number"]
        self.shape, self.sha256 = arrays["shape"], arrays["sha256"]
        self.origins, self.captions = arrays["origins"], arrays["captions"]
        self.names: list[str] | None = None
        shards = len(self.samples)
        for name in ("bytes", "samples", "number", "shape", "origins", "captions"):
            wanted = (shards,) if name in ("bytes", "samples", "number", "shape") else (self.count,)
            if arrays[name].shape != wanted:
                raise ValueError(f"{name} has shape {list(arrays[name].shape)}, must be {list(wanted)}")
        if self.sha256.shape != (shards, 32):
            raise ValueError(f"sha256 has shape {list(self.sha256.shape)}, must be {[shards, 32]}")
        for name in ("bytes", "samples"):
            if not arrays[name].all():
                k = int(np.argmin(arrays[name]))
                raise ValueError(f"{name} of shard {k} is 0, must be positive")
        if "names" in arrays:
            try:
                self.names = arrays["names"].tobytes().decode().splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"names is not UTF-8: {error}") from error
            if len(self.names) != shards:
                raise ValueError(f"there are {len(self.names)} names for {shards} shards")
        if self.names is not None:
            repeated = len(set(self.names)) != shards
        else:  # sort, because np.unique takes seconds for millions
            repeated = (np.diff(np.sort(self.number)) == 0).any()
        if repeated:
            raise ValueError("a shard is listed twice")

    @classmethod
    def of(cls, source: str, shards: Sequence[Shard], shapes: Sequence[tuple[int, int]]) -> "Index":
        """The index of finished shards; `shapes`: the manifest's, in its order."""
        rows = {shape: row for row, shape in enumerate(shapes)}
        numbers = [number_of(source, shard.name) for shard in shards]
        named = any(number is None for number in numbers)
        digests = b"".join(bytes.fromhex(shard.sha256) for shard in shards)
        arrays = {
            "bytes": np.array([shard.bytes for shard in shards], "<u8"),
            "samples": np.array([shard.count for shard in shards], "<u4"),
            "number": np.array(range(len(shards)) if named else numbers, "<u4"),
            "origins": _joined((shard.origins for shard in shards), "<u4"),
            "shape": np.array([rows[shard.shape] for shard in shards], "<u2"),
            "sha256": np.frombuffer(digests, "u1").reshape(-1, 32),
            "captions": _joined((shard.captions for shard in shards), "u1"),
        }
        if named:
            arrays["names"] = np.frombuffer("\n".join(shard.name for shard in shards).encode(), "u1")
        return cls(arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Map a file; its arrays are read on access. Raises ValueError, FileNotFoundError."""
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _HEADER_LIMIT:
                raise ValueError("not a safetensors file")
            header = file.read(size)
        try:
            entries = json.loads(header)
            data = np.asarray(np.memmap(path, "u1", "r"))[8 + size :]
            arrays, end = {}, 0
            for name, entry in entries.items():
                begin, stop = entry["data_offsets"]
                dtype, shape = np.dtype(_DTYPES[name]), tuple(entry["shape"])
                if entry["dtype"] != _KINDS[_DTYPES[name]] or begin != end or any(n < 0 for n in shape):
                    raise ValueError(f"{name} is {str(entry):.200}")
                arrays[name], end = data[begin:stop].view(dtype).reshape(shape), stop
            if end != len(data):
                raise ValueError(f"has {len(data)} bytes of arrays, its header says {end}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"damaged: {error!r:.200}") from error
        return cls(arrays, {"sha256": files.sha256(path), "bytes": len(data) + 8 + size})

    def save(self, path: str | Path) -> None:
        """Write the file."""
        with files.replaced(path) as temporary, open(temporary, "wb") as file:
            for part in self._parts():
                file.write(part)

    def _parts(self) -> Iterator[bytes]:
        """The file, in portions."""
        entries, end = {}, 0
        ordered = [name for name in _DTYPES if name in self.arrays]
        for name in ordered:
            array = self.arrays[name]
            begin, end = end, end + array.nbytes
            entries[name] = {
                "dtype": _KINDS[_DTYPES[name]],
                "shape": list(array.shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        yield len(header).to_bytes(8, "little") + header
        for array in (self.arrays[name] for name in ordered):
            for first in range(0, len(array), _PORTION):
                yield array[first : first + _PORTION].tobytes()

    @cached_property
    def digest(self) -> dict:
        """SHA-256 and size of the file, for the manifest."""
        if self._digest is not None:
            return self._digest
        digest, size = hashlib.sha256(), 0
        for part in self._parts():
            digest.update(part)
            size += len(part)
        return {"sha256": digest.hexdigest(), "bytes": size}

    @cached_property
    def count(self) -> int:
        """Samples in all shards."""
        return int(self.samples.sum(dtype=np.int64))


def _joined(parts: Iterable[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def shard_file(source: str, k: int) -> str:
    """The file name of shard k of a source, such as portraits-000000.tar."""
    return f"{source}-{k:06d}.tar"


def number_of(source: str, name: str) -> int | None:
    """A shard's number from its file name, None if it has none."""
    digits = name.removeprefix(f"{source}-").removesuffix(".tar")
    return int(digits) if digits.isdecimal() and len(digits) < 10 and shard_file(source, int(digits)) == name else None
