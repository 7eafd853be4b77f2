"""Bare tars -> a manifest: for folders written by plain webdataset, and sources whose manifest was lost."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyflux.shards.format import SUFFIX, ShardError, describe_member, parse_key
from tinyflux.shards.manifest import Base, Manifest, ManifestError, check_name, parse, read_small
from tinyflux.shards.schema import SCHEMA, SPATIAL, Field, Group
from tinyflux.shards.tar import Sample, read_member, scan
from tinyflux.shards.writer import Shard
from tinyflux.util import files
from tinyflux.util.buckets import grid

MANIFEST, INDEX, NULL = "manifest.json", "index.safetensors", "null.safetensors"


@dataclass
class Found:
    """The content of a tar."""

    shard: Shard
    groups: dict[str, Group]
    key: str
    """The key of its first sample."""


def tars(folder: Path) -> list[Path]:
    """The shards of a source's folder and its subfolders, sorted by name."""
    return sorted([*folder.glob("*.tar"), *folder.glob("[0-9][0-9][0-9]*/*.tar")], key=lambda path: path.name)


def sources_in(folder: Path) -> dict[str, dict]:
    """The sources in a folder: folder name -> result of `manifest.parse`. Skips those with an unreadable manifest."""
    found = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            found[path.parent.name] = parse(read_small(path), str(path))
        except (ManifestError, OSError):
            continue
    return found


def examine(path: Path) -> Found:
    """Read a whole tar of samples. Raises ShardError, ManifestError, OSError."""
    with open(path, "rb") as file:
        fd = file.fileno()
        samples, fault, _ = scan(fd, str(path))
        if fault:
            raise fault
        if not samples:
            raise ShardError(str(path), why="has no samples")
        groups, shape = _groups(fd, path, samples[0])
        origins, captions = [], []
        for sample in samples:
            members = [member for member in sorted(sample.members) if member.endswith(SUFFIX)]
            if not members:
                raise ShardError(str(path), sample.key, "has no tensors")
            origins.append(_describe(fd, path, sample, members[0])[1])
            captions.append(sum(member.startswith("text.") for member in members))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        arrays = np.array(origins, np.uint32), np.array(captions, np.uint8)
        folder = path.parent.name if path.parent.name.isdecimal() else ""
        size = os.fstat(fd).st_size
        shard = Shard(check_name(path.name), len(samples), size, digest, shape, *arrays, folder=folder)
        return Found(shard, groups, samples[0].key)


def _describe(fd: int, path: Path, sample: Sample, member: str) -> tuple[dict[str, Field], int]:
    try:
        return describe_member(read_member(fd, *sample.members[member]))
    except ValueError as error:
        raise ShardError(str(path), sample.key, f"{member}: {error}") from error


def _groups(fd: int, path: Path, sample: Sample) -> tuple[dict[str, Group], tuple[int, int]]:
    """The groups of a sample, and the shape of its latents; (1, 1) if no field depends on it."""
    groups, shape = {}, (1, 1)
    for member in sorted(sample.members):
        if not member.endswith(SUFFIX):
            continue
        group, _, caption = member.removesuffix(SUFFIX).partition(".")
        fields, _ = _describe(fd, path, sample, member)
        known = SCHEMA.get(group)
        for name, field in fields.items():
            axes = known.fields.get(name, ()) if known else ()
            if set(SPATIAL) <= set(axes) and len(axes) == len(field.shape):
                shape = tuple(field.shape[axes.index(axis)] for axis in SPATIAL)
                symbols = (axis if axis in SPATIAL else n for axis, n in zip(axes, field.shape, strict=True))
                fields[name] = Field(field.dtype, tuple(symbols))
        groups[group] = Group(fields, _timesteps(fields) if known and known.on_grid else None, bool(caption))
    order = [*(name for name in SCHEMA if name in groups), *(name for name in groups if name not in SCHEMA)]
    return {name: groups[name] for name in order}, shape


def _timesteps(fields: dict[str, Field]) -> tuple[float, ...] | None:
    """The timesteps that a build gives to features of this many; None if it cannot have made them."""
    counts = [field.shape[0] for field in fields.values() if field.shape]
    return grid(int(counts[0])) if counts and counts[0] in range(2, 101) else None


def assemble(
    folder: Path,
    found: list[Found],
    dataset_id: int | None = None,
    *,
    known: dict[str, Group] | None = None,
    base: Base | None = None,
) -> Manifest:
    """The manifest of examined tars; nothing is written.

    dataset_id: for keys without one. known: timesteps and fingerprints of groups, if known. base: for an overlay.
    Raises FileNotFoundError without null.safetensors; ValueError with the reason why there can be no manifest.
    """
    first = found[0]
    for other in found[1:]:
        if other.groups != first.groups:
            a, b = (
                ", ".join(f"{n} {f.dtype} {list(f.shape)}" for g in x.groups.values() for n, f in g.fields.items())
                for x in (first, other)
            )
            raise ManifestError(f"{other.shard.name} has {b}; {first.shard.name} has {a}")
    if dataset_id is None:
        try:
            dataset_id, _ = parse_key(first.key)
        except ValueError as error:
            raise ValueError(f"source {folder}: {error}; give the source an id with data.dataset_ids") from error
    unknown = Group({}, producer={"producer": "unknown: the manifest was made from the shards alone"})
    groups = {}
    for name, group in first.groups.items():
        entry = (known or {}).get(name, unknown)
        groups[name] = replace(group, timesteps=entry.timesteps or group.timesteps, producer=entry.producer)
    null = folder / NULL
    if "text" in groups and not null.is_file():
        raise FileNotFoundError(f"{null} does not exist: a source needs the embeddings of the empty prompt")
    stem = first.shard.name.removesuffix(".tar").rpartition("-")[0]
    numbered = stem and all(f.shard.name.startswith(f"{stem}-") for f in found)
    return Manifest.of(
        stem if numbered else folder.resolve().name,
        dataset_id,
        groups,
        [entry.shard for entry in found],
        null_sha256=files.sha256(null) if "text" in groups else None,
        base=base,
        subfolders=any(entry.shard.folder for entry in found),
    )


def adopt(folder: Path, dataset_id: int | None = None) -> Manifest:
    """Make the manifest of a local folder of shards that has none. All shards are read once.

    dataset_id: for keys without one. The result is kept in the user's cache, keyed by the files' names, sizes and
    times. Raises FileNotFoundError without shards, ShardError; ValueError with the reason why there can be no manifest.
    """
    paths = tars(folder)
    if not paths:
        inside = ", ".join(sources_in(folder))
        hint = f"sources are in it, name them: {inside}" if inside else "build it with python -m sharding.build"
        raise FileNotFoundError(f"{folder} has neither {MANIFEST} nor *.tar: {hint}")
    stats = [(path, path.stat()) for path in [*paths, folder / NULL] if path.exists()]
    listing = [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in stats]
    name = hashlib.sha256(json.dumps([dataset_id, listing]).encode()).hexdigest()[:32]
    cached = files.cache_folder() / "manifests" / name
    if (cached / MANIFEST).is_file():
        return Manifest.load(cached)
    try:
        manifest = assemble(folder, [examine(path) for path in paths], dataset_id)
    except ManifestError as error:
        raise ValueError(f"source {folder} has no manifest, and none can be made: {error}") from error
    cached.mkdir(parents=True, exist_ok=True)
    manifest.save(cached)
    return manifest
