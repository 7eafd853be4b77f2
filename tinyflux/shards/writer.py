"""Crash-safe writing of shards: files are written under a temporary name and renamed when complete."""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import webdataset
from torch import Tensor

from tinyflux.util import files

_CAPTION = "text."  # prefix of a caption's member
_ARRAYS = {"origins": "<u4", "captions": "u1"}


@dataclass(frozen=True, eq=False)
class Shard:
    """A finished shard: its file `name`, samples, bytes, SHA-256 in hex, latent `shape` (h, w), and for each sample the
    hash of its image's origin (uint32) and its number of captions (uint8)."""

    name: str
    count: int
    bytes: int
    sha256: str
    shape: tuple[int, int]
    origins: np.ndarray
    captions: np.ndarray
    folder: str = ""
    """Its subfolder of the source."""

    @property
    def path(self) -> str:
        """Its path in the source."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    def to_dict(self) -> dict:
        """Plain values for JSON, without `folder`."""
        arrays = {name: _to_text(getattr(self, name), dtype) for name, dtype in _ARRAYS.items()}
        values = {name: getattr(self, name) for name in ("name", "count", "bytes", "sha256")}
        return values | {"shape": list(self.shape)} | arrays

    @classmethod
    def from_dict(cls, data: dict) -> "Shard":
        """The shard of a `to_dict`."""
        arrays = {name: np.frombuffer(base64.b64decode(data[name]), dtype) for name, dtype in _ARRAYS.items()}
        return cls(**(data | {"shape": tuple(data["shape"])} | arrays))


def _to_text(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


class _Hashing:
    """The stream that TarWriter writes to: counts and hashes the file's bytes."""

    def __init__(self, file):
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write_shard(path: str | Path, samples: Iterable[dict], shape: tuple[int, int] | None = None) -> Shard:
    """Write samples (from `encode_sample`) to a tar and return its entry for the manifest.

    shape: latent (h, w) of all samples, if the samples don't have it. The same samples give the same bytes in any
    process. Only one process may write a shard at a time: the temporary file is always `.NAME.tmp`, so that remains of
    a killed writer are overwritten. Raises OSError if the disk is full, ValueError if there are no samples or they
    differ in shape; an existing shard is then not changed.
    """
    path = Path(path)
    path.parent.mkdir(exist_ok=True)  # a subfolder of the source
    origins, captions = [], []
    with files.replaced(path, path.with_name(f".{path.name}.tmp")) as temporary, open(temporary, "wb") as file:
        target = _Hashing(file)
        # mtime must be an int: a float makes tarfile add pax headers, and the default is the current time
        writer = webdataset.TarWriter(target, user="tinyflux", group="tinyflux", mode=0o644, encoder=False, mtime=0)
        try:
            for sample in samples:
                shape = shape or sample["__shape__"]
                if sample.get("__shape__", shape) not in (shape, None):
                    raise ValueError(f"{path}: {sample['__key__']} has latents {sample['__shape__']}, others {shape}")
                origins.append(sample["__origin__"])
                captions.append(sum(member.startswith(_CAPTION) for member in sample))
                writer.write(sample)  # skips keys that start with "_"
        finally:
            writer.close()  # the end-of-archive blocks
        if not origins:
            raise ValueError(f"{path}: a shard needs at least one sample")
        if shape is None:
            raise ValueError(f"{path}: no sample has latents, so their shape must be given")
    arrays = np.array(origins, np.uint32), np.array(captions, np.uint8)
    return Shard(path.name, len(origins), target.bytes, target.sha256.hexdigest(), tuple(shape), *arrays)


def write_null(folder: str | Path, null: dict[str, Tensor]) -> str:
    """Write null.safetensors, the `t5_embeds` [L, D] and `clip_pooled` [D] of the empty prompt. Returns its SHA-256."""
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in sorted(null.items())})
    files.atomic_write(Path(folder) / "null.safetensors", data)
    return hashlib.sha256(data).hexdigest()
