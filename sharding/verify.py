"""Check that a source is complete and matches its manifest.

    python -m sharding.verify data/portraits             counts, sizes, keys, members: reads headers only
    python -m sharding.verify data/portraits --deep      also hashes every shard and decodes every tensor
    python -m sharding.verify data/portraits --repair    sets bad shards aside, and rebuilds a lost manifest
    python -m sharding.verify data/portraits-lune        an overlay, also against its base
    python -m sharding.verify hf://datasets/me/faces/portraits    downloads everything, through the node's cache

Prints one line per fault. The exit status is 1 if there is any.
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
    """Rebuild a missing or damaged manifest; move bad shards to `bad/` and remove them from the manifest."""
    workers: int = min(8, os.cpu_count() or 1)
    """Shards to check at once."""


def run(config: VerifyConfig) -> int:
    """Check, print the faults, repair if asked to. Returns the exit status."""
    from tqdm import tqdm

    from tinyflux.shards.verify import Check, set_aside

    folder = Path(config.source)
    if "://" in config.source:
        if config.repair:
            raise ValueError("--repair needs a folder: pull the source, repair the copy, push it again")
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
        print(f"{len(check.bad)} shards are set aside in {folder / 'bad'}; run the build command again to replace them")
    return cli.FAILED if check.faults else cli.DONE


def manifest_is_there(folder: Path, repair: bool) -> bool:
    """Whether there is a readable manifest. With `repair`, a missing or damaged one is rebuilt."""
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
    """The command; `args` default to those of the process."""
    return cli.run(run, VerifyConfig, args, prog="python -m sharding.verify", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
