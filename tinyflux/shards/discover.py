"""Sources without a manifest: shards of our members that plain webdataset wrote. Read once, remembered."""

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import zstandard

from tinyflux.shards.format import GROUPS, SUFFIX, Field, Sample, ShardError, fields_of, parse_key, read_member, scan
from tinyflux.shards.manifest import Manifest, ManifestError, check_name
from tinyflux.shards.writer import Shard, atomic_write, origin_hash

_LARGEST = 1 << 28  # bytes of one group of one sample that we are ready to look at


def cache_folder() -> Path:
    """Where what was read once is kept: $TINYFLUX_CACHE, or tinyflux in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyflux"
    return Path(os.environ.get("TINYFLUX_CACHE") or default)


def adopt(folder: Path, dataset_id: int | None = None) -> Manifest:
    """The manifest of a local folder of shards that has none; its fields are those of the first sample.

    dataset_id: for keys that don't carry one. The result is kept in the user's cache, under the names, sizes and
    times of the shards. Raises FileNotFoundError without shards, ShardError, ValueError saying what is in the way.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder} has neither manifest.json nor *.tar: build it with python -m sharding.build")
    stats = [path.stat() for path in paths]
    listing = [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in zip(paths, stats, strict=True)]
    name = hashlib.sha256(json.dumps([dataset_id, listing]).encode()).hexdigest()[:32]
    cached = cache_folder() / "manifests" / f"{name}.json"
    if cached.is_file():
        return Manifest.from_json(cached.read_bytes(), str(cached))

    fields, shards = None, []
    for path in paths:
        with open(path, "rb") as file:
            samples, fault = scan(file.fileno(), str(path))
            if fault:
                raise fault
            if not samples:
                raise ShardError(str(path), why="has no samples")
            if fields is None:
                key = samples[0].key
                fields = _fields(file.fileno(), path, samples[0])
            hashes = [origin_of(file.fileno(), sample) for sample in samples]
            origins = base64.b64encode(np.array(hashes, "<u2").tobytes()).decode()
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            shards.append(Shard(check_name(path.name), len(samples), os.fstat(file.fileno()).st_size, digest, origins))
    if dataset_id is None:
        try:
            dataset_id, _ = parse_key(key)
        except ValueError as error:
            raise ValueError(f"source {folder}: {error}; give the source an id with data.dataset_ids") from error
    try:
        manifest = Manifest(folder.resolve().name, dataset_id, fields, shards, {"producer": "unknown"})
    except ManifestError as error:
        raise ValueError(f"source {folder} has no manifest, and none can be made: {error}") from error
    cached.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(cached, manifest.to_json().encode())
    return manifest


def _fields(fd: int, path: Path, sample: Sample) -> dict[str, Field]:
    fields = {}
    for group, names in GROUPS.items():
        place = sample.members.get(group + SUFFIX)
        if place is None:
            continue
        data = read_member(fd, *place)
        try:
            size = zstandard.get_frame_parameters(data).content_size
            if size > _LARGEST:
                raise ValueError(f"states {size} bytes")
            tensors = safetensors.torch.load(zstandard.decompress(data))
        except (zstandard.ZstdError, safetensors.SafetensorError, ValueError) as error:
            raise ShardError(str(path), sample.key, f"{group}{SUFFIX}: {error}") from error
        fields |= {name: fields_of(tensors)[name] for name in names if name in tensors}
    return fields


def origin_of(fd: int, sample: Sample) -> int:
    """Hash of the `origin` in a sample's json, or of its key where there is none."""
    try:
        return origin_hash(json.loads(read_member(fd, *sample.members["json"]))["origin"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return origin_hash(sample.key)
