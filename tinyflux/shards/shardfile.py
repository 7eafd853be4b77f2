"""An open shard: its table of samples, and reads by row from any number of threads."""

import json
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from tinyflux.shards.format import (
    SUFFIX,
    Layout,
    ShardError,
    decode_member,
    describe_member,
    layout_of,
    member_name,
)
from tinyflux.shards.schema import Group, fields_at
from tinyflux.shards.tar import Sample, read_member, scan
from tinyflux.shards.writer import Shard


class ShardFile:
    """An open shard of a source, or of an overlay on top of its `base` shard.

    groups: the groups to read from this file. The readable samples of a truncated or damaged shard can be used; `fault`
    is its fault. Raises FileNotFoundError; ShardError if the file is not the one that the manifest describes. The
    descriptor lives as long as the object, so eviction does not disturb readers.
    """

    def __init__(self, path: str | Path, shard: Shard, groups: dict[str, Group], base: "ShardFile | None" = None):
        self.path, self.shard, self.base = os.fspath(path), shard, base
        self.fd = os.open(self.path, os.O_RDONLY)
        self.count = shard.count
        self.origins: np.ndarray = shard.origins if base is None else base.origins
        self.layouts = {name: layout_of(fields_at(group.fields, shard.shape)) for name, group in groups.items()}
        self._repeated = {name for name, group in groups.items() if group.repeated}
        try:
            samples, self.fault, gaps = scan(self.fd, self.path)
        except OSError as error:
            raise ShardError(self.path, why=f"cannot be read: {error.strerror}") from error
        size = os.fstat(self.fd).st_size
        if self.fault is None and (size != shard.bytes or len(samples) > shard.count):
            why = f"is not the shard of the manifest ({size} bytes with {len(samples)} samples, "
            why += f"expected {shard.bytes} with {shard.count}): it was replaced, or the manifest was"
            raise ShardError(self.path, why=why)
        self.samples: list[Sample | None] = self._placed(samples, gaps)
        self.groups: tuple[str, ...] = (*(() if base is None else base.groups), *groups)
        """The groups to read from this file and its bases."""
        self._wanted: dict[int, list[tuple[str, Layout]]] = {}
        own = tuple(layout for _, layout in self.wanted(0))
        self.stacked: tuple[Layout, ...] = own if base is None else own + base.stacked
        """The layouts of a row's members, in this file and its bases: see `wanted`."""

    def wanted(self, caption: int) -> list[tuple[str, Layout]]:
        """A row's members to read from this file, and their layouts, in tar order."""
        if caption not in self._wanted:
            named = ((member_name(g, caption if g in self._repeated else None), x) for g, x in self.layouts.items())
            self._wanted[caption] = sorted(named, key=lambda pair: pair[0])
        return self._wanted[caption]

    def _placed(self, samples: list[Sample], gaps: list[int]) -> list[Sample | None]:
        """The samples by row; for an overlay, by the keys of its base.

        Rows before the first gap and after the last one are certain. Samples between two gaps are placed by their
        origins, and dropped if they fit in two places.
        """
        if self.base is not None:
            found = {sample.key: sample for sample in samples}
            return [sample and found.get(sample.key) for sample in self.base.samples]
        missing = self.count - len(samples)
        if missing <= 0:
            return samples[: self.count]
        edges = [0, *(gaps or [len(samples)]), len(samples)]
        placed: list[Sample | None] = [None] * self.count
        placed[: edges[1]] = samples[: edges[1]]
        if edges[-2] < len(samples):
            placed[edges[-2] + missing :] = samples[edges[-2] :]
        for begin, end in zip(edges[1:-2], edges[2:-1], strict=True):
            origins = [self._origin(sample) for sample in samples[begin:end]]
            rows = range(begin, begin + missing + 1)
            fits = [row for row in rows if self.origins[row : row + len(origins)].tolist() == origins]
            if origins and len(fits) == 1:
                placed[fits[0] : fits[0] + len(origins)] = samples[begin:end]
        return placed

    def _origin(self, sample: Sample) -> int | None:
        """The origin hash in a sample's tensors."""
        for member, place in sample.members.items():
            if member.endswith(SUFFIX):
                try:
                    return describe_member(read_member(self.fd, *place))[1]
                except ValueError:
                    continue
        return None

    @property
    def is_unlinked(self) -> bool:
        """Whether the cache has evicted it or its base. It can still be read, and still takes disk space."""
        return os.fstat(self.fd).st_nlink == 0 or (self.base is not None and self.base.is_unlinked)

    @property
    def is_damaged(self) -> bool:
        """Whether its tar or its base's is damaged."""
        missing = any(sample is None for sample in self.samples)
        return missing or self.fault is not None or (self.base is not None and self.base.is_damaged)

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)

    def sample(self, row: int) -> Sample:
        """The places of a row's members in this file. Raises ShardError if the row is lost."""
        sample = self.samples[row]
        if sample is None:
            why = self.fault.why if self.fault else "its key is not in this shard"
            raise ShardError(self.path, self.fault.key if self.fault else "", f"no row {row}: {why}")
        return sample

    def key(self, row: int) -> str:
        """The sample key of a row. Raises ShardError if the row is lost."""
        return self.sample(row).key

    def decode(
        self,
        row: int,
        out: dict[str, np.ndarray] | None = None,
        *,
        caption: int = 0,
        groups: tuple[str, ...] = (),
        finite: bool = True,
    ) -> dict[str, Tensor]:
        """Decode groups of a row (default: all) into `out` (see `decode_member`), or return {name: tensor}.

        caption: which member of repeated groups. finite: refuse NaN and infinity. Raises ShardError if the row cannot
        be used.
        """
        origin, tensors = int(self.origins[row]), {}
        for group in groups or self.groups:
            file = self
            while group not in file.layouts:
                file = file.base
            tensors |= file._decode(group, row, origin, out, caption, finite) or {}
        return tensors

    def _decode(self, group: str, row: int, origin: int, out: dict | None, caption: int, finite: bool):
        member = member_name(group, caption if group in self._repeated else None)
        data = self.read(row, member, self.layouts[group].limit)
        return decode_member(data, self.layouts[group], origin, out, (self.path, self.key(row)), finite=finite)

    def read(self, row: int, member: str, limit: int = 1 << 28) -> bytes:
        """The bytes of a member such as "json" or "jpg". Raises ShardError if it is missing or larger than `limit`."""
        key, members = self.sample(row)
        place = members.get(member)
        if place is None:
            why = f" ({self.fault.why})" if self.fault else ""
            raise ShardError(self.path, key, f"member {member} is missing{why}")
        if place[1] > limit:
            raise ShardError(self.path, key, f"member {member} has {place[1]} bytes, must have at most {limit}")
        try:
            return read_member(self.fd, *place)
        except OSError as error:
            raise ShardError(self.path, key, f"member {member} cannot be read: {error.strerror}") from error

    def members(self, row: int, captions: int) -> dict[str, "ShardFile"]:
        """The members to read for a row, each with its file: `captions` members of repeated groups, one of each other
        group, the json and the preview. Raises ShardError if the row is lost."""
        found: dict[str, ShardFile] = {} if self.base is None else self.base.members(row, captions)
        wanted = {member for caption in range(captions) for member, _ in self.wanted(caption)} | {"json", "jpg"}
        return found | dict.fromkeys(wanted & self.sample(row).members.keys(), self)

    def size(self, row: int, member: str) -> int:
        """Bytes of a member in this file. Raises KeyError; ShardError if the row is lost."""
        return self.sample(row).members[member][1]

    def preview(self, row: int) -> bytes | None:
        """The row's JPEG, if it has one. Raises ShardError if the row is lost."""
        if "jpg" in self.sample(row).members:
            return self.read(row, "jpg")
        return None if self.base is None else self.base.preview(row)

    def meta(self, row: int) -> dict:
        """The content of the sample's json: `prompts` list[str], `origin` str, and more. Raises ShardError.

        An overlay with texts has its own prompts.
        """
        if self.base is not None and "json" not in self.sample(row).members:
            return self.base.meta(row)
        try:
            meta = json.loads(self.read(row, "json", 1 << 22))
            if not isinstance(meta, dict) or not isinstance(meta["origin"], str):
                raise ValueError("must be an object with an origin")
            if not isinstance(meta["prompts"], list) or not all(isinstance(text, str) for text in meta["prompts"]):
                raise ValueError("prompts must be a list of strings")
        except (ValueError, KeyError, RecursionError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(self.path, self.key(row), f"its .json is damaged: {error!r:.200}") from error
        return meta
