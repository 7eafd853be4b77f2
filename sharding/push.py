"""Push a source to a dataset repo on the Hugging Face Hub, to a folder of the source's name, with a dataset card.

    python -m sharding.push data/portraits --repo USER/NAME
    python -m sharding.push data/portraits --repo USER/NAME --private     creates a private repo

Only files that the repo does not have are sent, so the same command resumes after a stop. Existing files are replaced
in the last commit, together with the manifest, so that readers never see a mix. The token comes from HF_TOKEN or
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
    """What to push, and where to."""

    source: tyro.conf.Positional[Path]
    """Folder of the source."""
    repo: Annotated[str, Match(r"[\w.-]+/[\w.-]+", "USER/NAME")]
    """USER/NAME of the dataset repo; it is created if it does not exist."""
    private: bool = False
    """Create the repo as private; an existing repo must be private."""
    rejected: bool = False
    """Send rejected.jsonl too; it names files on this machine."""
    license: str | None = None
    """The dataset's license for the card, by its Hub identifier: cc-by-4.0, mit, other, ..."""

    def __post_init__(self):
        check(self, "--")


def run(config: PushConfig) -> None:
    """Push, and print what was sent."""
    from tinyflux.precache.push import push

    done = push(config.source, config.repo, config.private, rejected=config.rejected, license_id=config.license)
    print(f"{config.source}: {done.sent} of {done.shards} shards sent, {done.removed} removed from {config.repo}")
    print(done.url)


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to those of the process."""
    # RuntimeError: the Hub client raises it for a file that it cannot send
    return cli.run(run, PushConfig, args, prog="python -m sharding.push", description=__doc__, failures=(RuntimeError,))


if __name__ == "__main__":
    sys.exit(main())
