"""Check a source: is everything there, and is it what the manifest says?

    python -m sharding.verify data/portraits             counts, sizes, keys, members: reads headers only
    python -m sharding.verify data/portraits --deep      also hashes, and decodes every tensor of every sample
    python -m sharding.verify data/portraits --repair    sets bad shards aside, and rebuilds a lost manifest

Prints one line a fault and exits with status 1 if there is one.
"""

import base64
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import tyro
import zstandard
from tqdm import tqdm

from tinyflux.shards.format import GROUPS, SUFFIX, Field, ShardError, fields_of, parse_key, read_member, scan_tar
from tinyflux.shards.manifest import Manifest, ManifestError, check_name
from tinyflux.shards.store import ShardFile, open_source
from tinyflux.shards.writer import Shard, origin_hash


@dataclass
class VerifyConfig:
    """What to check."""

    source: tyro.conf.Positional[Path]
    """Folder of the source."""
    deep: bool = False
    """Hash every shard and decode every tensor."""
    repair: bool = False
    """Rebuild a missing or damaged manifest, and set bad shards aside in `bad/`, out of the manifest."""
    workers: int = min(8, os.cpu_count() or 1)
    """Shards checked at once."""


def check_shard(folder: Path, manifest: Manifest, shard: Shard, deep: bool) -> list[str]:
    """The faults of one shard, each as a line."""
    try:
        file = ShardFile(folder / shard.name, shard)
    except (OSError, ShardError) as error:
        return [f"{shard.name}: {error.strerror if isinstance(error, OSError) else error.why}"]
    faults = [f"{shard.name}: {file.fault.why}"] if file.fault else []
    for row, sample in enumerate(file.samples):
        try:
            check_sample(file, row, manifest, int(shard.origin_hashes[row]) if row < shard.count else -1, deep)
        except ShardError as error:
            faults.append(f"{shard.name}, sample {sample.key}: {error.why}")
    if deep:
        with open(folder / shard.name, "rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != shard.sha256:
                faults.append(f"{shard.name}: its sha256 is not the manifest's")
    return faults


def check_sample(file: ShardFile, row: int, manifest: Manifest, origin: int, deep: bool) -> None:
    """Raises ShardError if a sample lacks a member or has one too many, or, `deep`, if one cannot be used."""
    sample, wanted = file.samples[row], {"json", *(group + SUFFIX for group in manifest.groups)}

    def fault(why: str) -> ShardError:
        return ShardError(file.path, sample.key, why)

    if missing := wanted - set(sample.members):
        raise fault(f"lacks {', '.join(sorted(missing))}")
    if extra := set(sample.members) - wanted - {"jpg"}:
        raise fault(f"has {', '.join(sorted(extra))}, which the manifest does not know")
    try:
        dataset_id, index = parse_key(sample.key)
    except ValueError as error:
        raise fault(str(error)) from error
    if dataset_id != manifest.dataset_id:
        raise fault(f"its dataset id is {dataset_id}, the manifest's {manifest.dataset_id}")
    if not deep:
        return
    file.decode(row, manifest.groups)
    try:
        meta = json.loads(file.read(row, "json"))
        found, prompt, hashed = meta["index"], meta["prompt"], origin_hash(meta["origin"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise fault(f"its .json is damaged: {error!r}") from error
    if found != index or not isinstance(prompt, str):
        raise fault(f"its .json has index {found!r} and prompt {prompt!r:.40}")
    if hashed != origin:
        raise fault("the manifest has another origin hash for it")


def verify(folder: Path, deep: bool, workers: int) -> tuple[list[str], set[str]]:
    """(faults, names of the shards that have one). Raises ManifestError; FileNotFoundError without a manifest."""
    manifest, faults, bad = Manifest.load(folder), [], set()
    try:
        open_source(folder)
    except (ValueError, FileNotFoundError) as error:
        faults.append(f"null.safetensors: {error}")
    known = {shard.name for shard in manifest.shards}
    faults += [f"{path.name}: not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in known]
    keys: dict[str, str] = {}
    check = partial(check_shard, folder, manifest, deep=deep)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(check, manifest.shards)
        bar = tqdm(zip(manifest.shards, results, strict=True), manifest.source, len(manifest.shards), unit="shard")
        for shard, found in bar:
            faults += found
            if found:
                bad.add(shard.name)
            else:
                for sample in ShardFile(folder / shard.name, shard).samples:
                    if (other := keys.setdefault(sample.key, shard.name)) != shard.name:
                        faults.append(f"{shard.name}, sample {sample.key}: is also in {other}")
                        bad.add(shard.name)
    return faults, bad


def repair(folder: Path, bad: set[str]) -> None:
    """Move bad shards to `bad/` and take them out of the manifest."""
    (folder / "bad").mkdir(exist_ok=True)
    for name in sorted(bad):
        if (folder / name).exists():
            os.replace(folder / name, folder / "bad" / name)
    manifest = Manifest.load(folder)
    replace(manifest, shards=[shard for shard in manifest.shards if shard.name not in bad]).save(folder)


def rebuild(folder: Path) -> Manifest:
    """Write the manifest anew from the shards, and from the notes of the build where they are there.

    Raises ValueError where there is no whole shard to start from.
    """
    shards, fields, ids, unreadable = [], None, set(), []
    for path in sorted(folder.glob("*.tar")):
        try:
            found = fields_in(path) if fields is None else fields
            samples = scan_tar(path)
            fd = os.open(path, os.O_RDONLY)
            try:
                metas = [json.loads(read_member(fd, *sample.members["json"])) for sample in samples]
                hashes = np.array([origin_hash(meta["origin"]) for meta in metas], "<u2")
            finally:
                os.close(fd)
            ids |= {parse_key(sample.key)[0] for sample in samples}
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (ValueError, KeyError, TypeError, OSError) as error:  # ShardError and JSON's errors are ValueErrors
            unreadable.append(f"{path.name} ({error})")
            continue
        fields = found
        origins = base64.b64encode(hashes.tobytes()).decode()
        shards.append(Shard(check_name(path.name), len(samples), path.stat().st_size, digest, origins))
    if not shards or len(ids) != 1:
        why = f"dataset ids {sorted(ids)}" if ids else "no whole shard"
        raise ValueError(f"{folder}: no manifest can be rebuilt: {why}; unreadable: {', '.join(unreadable) or 'none'}")
    config = folder / ".build" / "config.json"
    unknown = {"rebuilt": "from the shards alone; what produced them is not known"}
    fingerprint = json.loads(config.read_bytes())["fingerprint"] if config.is_file() else unknown
    name = shards[0].name.rpartition("-")[0]
    manifest = Manifest(name, ids.pop(), fields, shards, fingerprint)
    manifest.save(folder)
    return manifest


def fields_in(path: Path) -> dict[str, Field]:
    """The fields of a shard's first sample. Raises ValueError."""
    sample, tensors = scan_tar(path)[0], {}
    fd = os.open(path, os.O_RDONLY)
    try:
        for group in GROUPS:
            if group + SUFFIX in sample.members:
                data = read_member(fd, *sample.members[group + SUFFIX])
                tensors |= safetensors.torch.load(zstandard.decompress(data))
    except (zstandard.ZstdError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path.name}, sample {sample.key}: {error}") from error
    finally:
        os.close(fd)
    return fields_of(tensors)


def run(config: VerifyConfig) -> int:
    """Check, print, repair if asked to; returns the exit status."""
    folder = config.source
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        Manifest.load(folder)
    except (ManifestError, FileNotFoundError) as error:
        print(error if isinstance(error, ManifestError) else f"{folder / 'manifest.json'}: missing")
        if not config.repair:
            return 1
        manifest = rebuild(folder)
        print(f"rebuilt: {manifest.count} samples in {len(manifest.shards)} shards")
    faults, bad = verify(folder, config.deep, config.workers)
    for fault in faults:
        print(fault)
    manifest = Manifest.load(folder)
    if bad and config.repair:
        repair(folder, bad)
        print(f"{len(bad)} shards are set aside in {folder / 'bad'}; the command that built them makes them anew")
    if not faults:
        print(f"{folder}: {manifest.count} samples in {len(manifest.shards)} shards, no faults")
    return 1 if faults else 0


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own."""
    try:
        return run(tyro.cli(VerifyConfig, prog="python -m sharding.verify", description=__doc__, args=args))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
