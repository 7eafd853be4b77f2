"""Look into a source: what it holds, how large its parts are, and whether its numbers look sane.

    python -m sharding.inspect data/portraits                        a table
    python -m sharding.inspect data/portraits --html portraits.html  and a page with pictures, to be opened anywhere
    python -m sharding.inspect hf://datasets/USER/NAME/portraits     also remote
    python -m sharding.inspect data                                  the sources in a folder, overlays with their bases
    python -m sharding.inspect data/portraits --html p.html --decode --zoo flux   with what the VAE makes of the latents

Reads samples from all over the source, not all of it: see --samples and --shards.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tinyflux.util import cli
from tinyflux.util.settings import AtLeast, check


@dataclass
class InspectConfig:
    """What to look at."""

    source: tyro.conf.Positional[str]
    """Folder or URL of the source."""
    html: Path | None = None
    """Write a page that needs nothing beside it."""
    decode: bool = False
    """Decode the shown samples' latents with the zoo's VAE, for the page."""
    zoo: str = "flux"
    """Whose VAE: flux, tiny or a folder laid out like tiny. It must be the one that the source was built with."""
    samples: Annotated[int, AtLeast(1)] = 1000
    """Samples that are read, spread over the shards that are opened."""
    shards: Annotated[int, AtLeast(1)] = 64
    """Shards that are opened, spread over the source."""
    shown: Annotated[int, AtLeast(1)] = 24
    """Samples on the page."""

    def __post_init__(self):
        check(self, "--")
        if self.decode and not self.html:
            raise ValueError("--decode needs --html FILE: the pictures go there")


def inspect(config: InspectConfig) -> int:
    """Look, print, write the page; returns the exit status: 1 if something is damaged."""
    from tinyflux.precache.page import render
    from tinyflux.precache.survey import decode, look
    from tinyflux.precache.tables import fingerprint, folder_of_sources, summary, tables, text
    from tinyflux.shards.discover import tars
    from tinyflux.shards.source import open_source
    from tinyflux.util.files import atomic_write

    folder = Path(config.source)
    if folder.is_dir() and not tars(folder) and len(rows := folder_of_sources(folder)) > 1:
        print(cli.table(rows))
        return cli.DONE
    report = look(open_source(config.source), config.samples, config.shards, config.shown)
    print(text(report))
    if config.html:
        if config.decode:
            decode(report, config.zoo)
        page = render(report, summary(report), tables(report), fingerprint(report.source.groups))
        atomic_write(config.html, page.encode())
        print(f"\n{config.html}: {len(report.shown)} samples shown")
    return cli.FAILED if report.faults else cli.DONE


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own."""
    return cli.run(inspect, InspectConfig, args, prog="python -m sharding.inspect", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
