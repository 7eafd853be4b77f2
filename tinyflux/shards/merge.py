"""Merge a base and its overlays into one source."""

from collections.abc import Iterator
from pathlib import Path

from tinyflux.shards.format import ShardError, member_name
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import Source
from tinyflux.shards.writer import write_null, write_shard


def merge(source: Source, folder: Path) -> Manifest:
    """Write a source and its overlays into a folder, as a source without a base.

    Members are copied as stored; the manifest is written last. Raises ShardError for a damaged sample, OSError.
    """
    shards = []
    for k, shard in enumerate(source.manifest.shards):
        shards.append(write_shard(folder / shard.path, _samples(source, k), shard.shape))
    manifest = Manifest.of(
        source.manifest.source,
        source.manifest.dataset_id,
        source.groups,
        shards,
        null_sha256=write_null(folder, source.null),
        subfolders=source.manifest.subfolders,
    )
    manifest.save(folder)
    return manifest


def _samples(source: Source, k: int) -> Iterator[dict]:
    file, first = source.open(k), int(source.manifest.starts[k])
    for row in range(file.count):
        captions = int(source.captions[first + row])
        found = file.members(row, captions)
        wanted = {_member(source, group, at) for at in range(captions) for group in source.groups}
        if missing := sorted({*wanted, "json"} - found.keys()):
            raise ShardError(file.path, file.key(row), f"member {missing[0]} is missing")
        data = {member: holder.read(row, member) for member, holder in found.items()}
        yield {"__key__": file.key(row), "__origin__": int(file.origins[row])} | data


def _member(source: Source, group: str, caption: int) -> str:
    return member_name(group, caption if source.groups[group].repeated else None)
