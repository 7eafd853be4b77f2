"""Check a source: is everything there, and is it what the manifest says?

    python -m sharding.verify data/portraits             counts, sizes, keys, members: reads headers only
    python -m sharding.verify data/portraits --deep      also hashes, and decodes every tensor of every sample
    python -m sharding.verify data/portraits --repair    sets bad shards aside, and rebuilds a lost manifest
    python -m sharding.verify data/portraits-lune        an overlay, against its base
    python -m sharding.verify hf://datasets/me/faces/portraits    fetches it all, through the node's cache

Prints one line a fault and exits with status 1 if there is one.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tinyflux.util import cli


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


def run(config: VerifyConfig) -> int:
    """Check, print, repair if asked to; returns the exit status."""
    from tqdm import tqdm

    from tinyflux.shards.verify import Check, set_aside

    folder = Path(config.source)
    if "://" in config.source:
        if config.repair:
            raise ValueError("--repair is for a folder: pull the source, repair it, push it again")
    elif not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    elif not manifest_is_there(folder, config.repair):
        return cli.FAILED
    check = Check(config.source, deep=config.deep, workers=config.workers)
    check.around()
    for _ in tqdm(check.shards(), check.manifest.source, len(check.manifest.shards), unit="shard"):
        pass
    for fault in check.faults:
        print(fault)
    if not check.faults:
        manifest = check.manifest
        print(f"{config.source}: {manifest.count} samples in {len(manifest.shards)} shards, no faults")
    if check.bad and config.repair:
        set_aside(folder, check.bad)
        print(f"{len(check.bad)} shards are set aside in {folder / 'bad'}; the command that built them replaces them")
    return cli.FAILED if check.faults else cli.DONE


def manifest_is_there(folder: Path, repair: bool) -> bool:
    """Whether there is a manifest that can be read, or, with `repair`, one could be made."""
    from tinyflux.shards.manifest import Manifest, ManifestError
    from tinyflux.shards.verify import rebuild

    try:
        Manifest.load(folder)
    except (ManifestError, FileNotFoundError) as error:
        print(f"{error.filename}: missing" if getattr(error, "filename", None) else error)
        if not repair:
            return False
        manifest = rebuild(folder)
        print(f"rebuilt: {manifest.count} samples in {len(manifest.shards)} shards")
    return True


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own."""
    return cli.run(run, VerifyConfig, args, prog="python -m sharding.verify", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
