"""Check a source: is everything there, and is it what the manifest says?

    python -m sharding.verify data/portraits             counts, sizes, keys, members: reads headers only
    python -m sharding.verify data/portraits --deep      also hashes, and decodes every tensor of every sample
    python -m sharding.verify data/portraits --repair    sets bad shards aside, and rebuilds a lost manifest
    python -m sharding.verify hf://datasets/me/faces/portraits    fetches it all, through the node's cache

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
from tinyflux.shards.remote import RemoteStore
from tinyflux.shards.shardfile import ShardFile
from tinyflux.shards.store import LocalStore, open_source
from tinyflux.shards.writer import Shard, origin_hash


@dataclass
class VerifyConfig:
    """What to check."""

    source: tyro.conf.Positional[str]
    """Folder or URL of the source."""
    deep: bool = False
    """Hash every shard and decode every tensor."""
    repair: bool = False
    """Rebuild a missing or damaged manifest, and set bad shards aside in `bad/`, out of the manifest."""
    workers: int = min(8, os.cpu_count() or 1)
    """Shards checked at once."""


def check_shard(
    store: LocalStore | RemoteStore, manifest: Manifest, shard: Shard, deep: bool
) -> tuple[list[str], list[str]]:
    """(the faults of one shard, each as a line; its keys)."""
    try:
        file = ShardFile(store.fetch(shard.name, shard.bytes, shard.sha256), shard)
    except FileNotFoundError:
        return [f"{shard.name}: No such file or directory"], []
    except (OSError, ShardError) as error:
        return [f"{shard.name}: {error.why if isinstance(error, ShardError) else error.strerror or error}"], []
    faults = [f"{shard.name}: {file.fault.why}"] if file.fault else []
    for row, sample in enumerate(file.samples):
        try:
            check_sample(file, row, manifest, int(shard.origin_hashes[row]) if row < shard.count else -1, deep)
        except ShardError as error:
            faults.append(f"{shard.name}, sample {sample.key}: {error.why}")
    if deep:
        with open(file.path, "rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != shard.sha256:
                faults.append(f"{shard.name}: its sha256 is not the manifest's")
    return faults, [sample.key for sample in file.samples]


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


def check_local(folder: Path, manifest: Manifest) -> list[str]:
    """Faults of a folder around its shards: the null embeddings, and shards that the manifest doesn't list."""
    faults, known = [], {shard.name for shard in manifest.shards}
    try:
        open_source(folder)
    except (ValueError, FileNotFoundError) as error:
        faults.append(f"null.safetensors: {error}")
    return faults + [f"{p.name}: not in the manifest" for p in sorted(folder.glob("*.tar")) if p.name not in known]


def check_shards(
    store: LocalStore | RemoteStore, manifest: Manifest, deep: bool, workers: int
) -> tuple[list[str], set[str]]:
    """(faults, names of the shards that have one)."""
    faults, bad = [], set()
    keys: dict[str, str] = {}
    check = partial(check_shard, store, manifest, deep=deep)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(check, manifest.shards)
        bar = tqdm(zip(manifest.shards, results, strict=True), manifest.source, len(manifest.shards), unit="shard")
        for shard, (found, in_it) in bar:
            repeated = [key for key in in_it if keys.setdefault(key, shard.name) != shard.name] if not found else []
            found += [f"{shard.name}, sample {key}: is also in {keys[key]}" for key in repeated]
            faults += found
            if found:
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
    if "://" in config.source:
        if config.repair:
            raise ValueError("--repair is for a folder: pull the source, repair it, push it again")
        source = open_source(config.source)
        faults, bad = check_shards(source.store, source.manifest, config.deep, config.workers)
        return report(config.source, source.manifest, faults)
    folder = Path(config.source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        manifest = Manifest.load(folder)
    except (ManifestError, FileNotFoundError) as error:
        print(error if isinstance(error, ManifestError) else f"{folder / 'manifest.json'}: missing")
        if not config.repair:
            return 1
        manifest = rebuild(folder)
        print(f"rebuilt: {manifest.count} samples in {len(manifest.shards)} shards")
    faults, bad = check_shards(LocalStore(folder), manifest, config.deep, config.workers)
    status = report(config.source, manifest, check_local(folder, manifest) + faults)
    if bad and config.repair:
        repair(folder, bad)
        print(f"{len(bad)} shards are set aside in {folder / 'bad'}; the command that built them makes them anew")
    return status


def report(source: str, manifest: Manifest, faults: list[str]) -> int:
    """Print the faults, or that there are none; returns the exit status."""
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{source}: {manifest.count} samples in {len(manifest.shards)} shards, no faults")
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
