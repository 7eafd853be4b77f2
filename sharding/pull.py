"""Copy a source from the Hub, a bucket or a web server to a folder.

    python -m sharding.pull hf://datasets/USER/NAME/portraits data/portraits
    python -m sharding.pull hf://datasets/USER/NAME@REVISION/portraits data/portraits
    python -m sharding.pull s3://BUCKET/portraits data/portraits
    python -m sharding.pull hf://datasets/USER/NAME/portraits-lune data/portraits-lune --base    an overlay and its base

Shards that already exist with the right content are kept, so the same command resumes after a stop. Every file is
checked against the manifest, which is written last. The Hub token comes from HF_TOKEN or `hf auth login`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tinyflux.util import cli


@dataclass
class PullConfig:
    """What to pull, and where to."""

    url: tyro.conf.Positional[str]
    """hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs:// or http(s)://"""
    out: tyro.conf.Positional[Path]
    """Folder of the copy."""
    base: bool = False
    """If the source is an overlay, pull its base too, to the relative path that the overlay names."""


def run(config: PullConfig) -> None:
    """Pull, and print what was downloaded."""
    from tinyflux.shards.pull import pull

    manifest, fetched, missing = pull(config.url, config.out, with_base=config.base)
    print(f"{config.out}: {manifest.count} samples in {len(manifest.shards)} shards, {fetched} of them downloaded")
    if missing:
        url, folder = missing
        print(f"this is an overlay and its base is not at {folder}; run: python -m sharding.pull {url} {folder}")


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to those of the process."""
    return cli.run(run, PullConfig, args, prog="python -m sharding.pull", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
