"""Put a source into a dataset repo of the Hugging Face Hub, in a folder of its name, with a dataset card.

    python -m sharding.push data/portraits --repo USER/NAME
    python -m sharding.push data/portraits --repo USER/NAME --private     a new repo is made private

Only what the repo does not have yet is sent, so the same command resumes after a stop. Files that readers of the old
content still need are replaced in the last commit, together with the manifest. The token is the one of HF_TOKEN or of
`hf auth login`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tinyflux.util import cli
from tinyflux.util.settings import Match, check


@dataclass
class PushConfig:
    """What to push, and where."""

    source: tyro.conf.Positional[Path]
    """Folder of the source."""
    repo: Annotated[str, Match(r"[\w.-]+/[\w.-]+", "USER/NAME")]
    """USER/NAME of the dataset repo; it is made if there is none."""
    private: bool = False
    """The repo must be private; one that is made will be."""
    rejected: bool = False
    """Send rejected.jsonl too; it names files of this machine."""
    license: str | None = None
    """The dataset's license for the card, as the Hub calls it: cc-by-4.0, mit, other, ..."""

    def __post_init__(self):
        check(self, "--")


def run(config: PushConfig) -> None:
    """Push, and print what was sent."""
    from tinyflux.precache.push import push

    done = push(config.source, config.repo, config.private, rejected=config.rejected, license_id=config.license)
    print(f"{config.source}: {done.sent} of {done.shards} shards sent, {done.removed} removed from {config.repo}")
    print(done.url)


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own."""
    # RuntimeError: the Hub's client, of a file that it can't send
    return cli.run(run, PushConfig, args, prog="python -m sharding.push", description=__doc__, failures=(RuntimeError,))


if __name__ == "__main__":
    sys.exit(main())
