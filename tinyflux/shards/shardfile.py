"""An open shard: its table of samples, and reads by position from any number of threads."""

import os
from pathlib import Path

import numpy as np

from tinyflux.shards.discover import origin_of
from tinyflux.shards.format import SUFFIX, Field, ShardError, decode_member, member_limit, read_member, scan
from tinyflux.shards.writer import Shard


class ShardFile:
    """An open shard: `samples` in row order, read by position, so any number of threads may share it.

    A shard that is cut short or damaged keeps the samples before the fault, and `fault` says what it was.
    Raises FileNotFoundError, or ShardError where the file is another one than the manifest describes.
    The descriptor lives as long as the object: eviction never pulls a file from under a reader.
    """

    def __init__(self, path: str | Path, shard: Shard):
        self.path = os.fspath(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        self.count = shard.count
        self.samples, self.fault = scan(self._fd, self.path)
        if self.fault is None:
            size, count = os.fstat(self._fd).st_size, len(self.samples)
            # a tar's size is rounded to 10 KiB, so that another build's shard may well have the same
            if size != shard.bytes or count > shard.count or not self._has_origins_of(shard):
                why = f"is not the shard of the manifest ({size} bytes with {count} samples"
                why = f"{why}, expected {shard.bytes} with {shard.count}): it was replaced, or the manifest was"
                raise ShardError(self.path, why=why)

    def _has_origins_of(self, shard: Shard) -> bool:
        """Whether the first, middle or last sample is the one that the manifest says; one may be damaged."""
        if not self.samples:
            return False
        hashes, last = shard.origin_hashes, len(self.samples) - 1
        return any(origin_of(self._fd, self.samples[row]) == hashes[row] for row in (0, last // 2, last))

    def __del__(self):
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def key(self, row: int) -> str:
        """The sample key of a row. Raises ShardError for a row behind the shard's fault."""
        if row >= len(self.samples):
            why = self.fault.why if self.fault else f"has {len(self.samples)} samples, the manifest says {self.count}"
            raise ShardError(self.path, self.fault.key if self.fault else "", f"no row {row}: {why}")
        return self.samples[row].key

    def decode(self, row: int, groups: dict[str, dict[str, Field]], out: dict[str, np.ndarray] | None = None):
        """Decode the groups of a row into `out` (see `format.decode_member`), or return {name: tensor}."""
        key, tensors = self.key(row), {}
        for group, fields in groups.items():
            place = self.samples[row].members.get(group + SUFFIX)
            if place is None:
                raise ShardError(self.path, key, f"member {group}{SUFFIX} is missing")
            offset, size = place
            if size > member_limit(fields):
                raise ShardError(self.path, key, f"member {group}{SUFFIX} has {size} bytes, far more than its fields")
            tensors |= decode_member(read_member(self._fd, offset, size), fields, out, (self.path, key)) or {}
        return tensors

    def read(self, row: int, extension: str) -> bytes:
        """The bytes of a member such as "json" or "jpg". Raises ShardError where it is missing."""
        place = self.samples[row].members.get(extension)
        if place is None:
            raise ShardError(self.path, self.key(row), f"member {extension} is missing")
        return read_member(self._fd, *place)
