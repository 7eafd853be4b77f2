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

import tyro

from tinyflux.precache.page import render
from tinyflux.precache.survey import Report, look
from tinyflux.precache.tables import fingerprint, folder_of_sources, summary, tables
from tinyflux.shards.discover import tars
from tinyflux.shards.manifest import diff_fingerprints
from tinyflux.shards.source import open_source
from tinyflux.util import cli
from tinyflux.util.files import atomic_write


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
    samples: int = 1000
    """Samples that are read, spread over the shards that are opened."""
    shards: int = 64
    """Shards that are opened, spread over the source."""
    shown: int = 24
    """Samples on the page."""

    def __post_init__(self):
        for name in ("samples", "shards", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.decode and not self.html:
            raise ValueError("--decode needs --html FILE: the pictures go there")


def text(report: Report) -> str:
    """The whole report for a terminal."""
    parts = ["\n".join(summary(report)), *(cli.table(rows, right=True) for rows in tables(report).values())]
    parts.append("\n".join(["fingerprint", *(f"  {line}" for line in fingerprint(report.source.groups))]))
    if report.rejected:
        parts.append("\n".join(["rejected", *(f"  {n}  {reason}" for reason, n in report.rejected.most_common())]))
    if report.faults:
        parts.append("\n".join(["faults", *(f"  {fault}" for fault in report.faults)]))
    return "\n\n".join(parts)


def decode(report: Report, zoo_name: str) -> None:
    """Give the shown samples their reconstructions. Raises ValueError where the VAE is not the source's."""
    from tinyflux.model.zoo import ModelZoo
    from tinyflux.precache.images import preview  # here, with torch's models, for the table needs neither

    zoo = ModelZoo(zoo=zoo_name)
    zoo.load_vae()
    known = [
        {k: v for k, v in vae.items() if k != "dtype"}
        for vae in (report.source.groups["latents"].producer.get("vae", {}), zoo.fingerprint()["vae"])
    ]
    if differences := diff_fingerprints(*known):
        raise ValueError(f"--zoo {zoo_name} is not what the source was built with: vae.{'; vae.'.join(differences)}")
    for sample in report.shown:
        pixels = zoo.decode_latents(sample.tensors["latents"].float()[None])[0]  # [3, H, W]
        sample.decoded = preview(pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())


def inspect(config: InspectConfig) -> int:
    """Look, print, write the page; returns the exit status: 1 if something is damaged."""
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
