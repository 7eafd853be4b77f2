"""Crash-safe writing: a file appears under its name whole and on disk, or not at all."""

import base64
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import webdataset

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Shard:
    """A finished shard. `origins` is base64 of one little-endian uint16 a sample: its image origin's hash."""

    name: str
    count: int
    bytes: int
    sha256: str
    origins: str

    @property
    def origin_hashes(self) -> np.ndarray:
        """uint16 [count], in row order."""
        return np.frombuffer(base64.b64decode(self.origins), "<u2").astype(np.uint16)

    def to_dict(self) -> dict:
        return asdict(self)


def origin_hash(origin: str) -> int:
    """16 bits of the SHA-256 of an image's origin: captions of one image fall on one side of a split."""
    return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:2], "little")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _replacing(path: Path, temporary: Path) -> Iterator:
    """A file object for `temporary`, which becomes `path` when the block ends well and is removed when it doesn't."""
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        message = f"{error.strerror} while writing {path}; what was finished before is intact. Make room and run again"
        raise OSError(error.errno, message) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a small file: temporary file in the same folder, fsync, rename, fsync of the folder."""
    path = Path(path)
    with _replacing(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")) as file:
        file.write(data)


class _Hashing:
    """What TarWriter writes to: counts and hashes on the way to the file."""

    def __init__(self, file):
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write_shard(path: str | Path, samples: Iterable[dict]) -> Shard:
    """Write samples (of `encode_sample`, with an `origin` in their json) to a tar and return its manifest entry.

    The same samples give the same bytes, whoever runs it. One process writes a shard at a time: the temporary file
    `.NAME.tmp` is named after it, so that a killed writer's leftover is overwritten. Raises OSError where the disk
    is full, ValueError where there are no samples; finished shards are not touched either way.
    """
    path = Path(path)
    hashes = []
    with _replacing(path, path.with_name(f".{path.name}.tmp")) as file:
        target = _Hashing(file)
        # mtime as an int: with a float tarfile adds pax headers, without one the clock gets in
        writer = webdataset.TarWriter(target, user="tinyflux", group="tinyflux", mode=0o644, encoder=False, mtime=0)
        try:
            for sample in samples:
                hashes.append(origin_hash(json.loads(sample["json"])["origin"]))
                writer.write(sample)
        finally:
            writer.close()  # the end-of-archive blocks
        if not hashes:
            raise ValueError(f"{path}: a shard needs at least one sample")
    origins = base64.b64encode(np.array(hashes, "<u2").tobytes()).decode()
    return Shard(path.name, len(hashes), target.bytes, target.sha256.hexdigest(), origins)
