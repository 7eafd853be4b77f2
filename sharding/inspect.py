"""Show what is in a source: fields, sizes, statistics and examples.

    python -m sharding.inspect data/portraits                        a table
    python -m sharding.inspect data/portraits --html portraits.html  also a self-contained page with pictures
    python -m sharding.inspect hf://datasets/USER/NAME/portraits     a remote source
    python -m sharding.inspect data                                  the sources in a folder, overlays with their bases
    python -m sharding.inspect data/portraits --html p.html --decode --zoo flux   with the latents decoded by the VAE

Reads only some samples, spread over the source: see --samples and --shards.
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
    """What to show."""

    source: tyro.conf.Positional[str]
    """Folder or URL of the source."""
    html: Path | None = None
    """Also write a self-contained page to this file."""
    decode: bool = False
    """Decode the latents of the samples on the page with the zoo's VAE."""
    zoo: str = "flux"
    """Zoo of the VAE: flux, tiny or a folder laid out like tiny. It must be the zoo that built the source."""
    samples: Annotated[int, AtLeast(1)] = 1000
    """Samples to read, spread over the opened shards."""
    shards: Annotated[int, AtLeast(1)] = 64
    """Shards to open, spread over the source."""
    shown: Annotated[int, AtLeast(1)] = 24
    """Samples on the page."""

    def __post_init__(self):
        check(self, "--")
        if self.decode and not self.html:
            raise ValueError("--decode needs --html FILE, the page that shows the decoded pictures")


def inspect(config: InspectConfig) -> int:
    """Print the tables and write the page. Returns the exit status: 1 if something is damaged."""
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
    """The command; `args` default to those of the process."""
    return cli.run(inspect, InspectConfig, args, prog="python -m sharding.inspect", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
