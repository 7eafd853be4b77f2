"""Look into a source: what it holds, how large its parts are, and whether its numbers look sane.

    python -m sharding.inspect data/portraits                        a table
    python -m sharding.inspect data/portraits --html portraits.html  and a page with pictures, to be opened anywhere
    python -m sharding.inspect hf://datasets/USER/NAME/portraits     also remote
    python -m sharding.inspect data/portraits --html p.html --decode --zoo flux   with what the VAE makes of the latents

Reads samples from all over the source, not all of it: see --samples and --shards.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from tinyflux.precache.extract import whole
from tinyflux.precache.page import render
from tinyflux.precache.survey import Report, look
from tinyflux.shards.format import SUFFIX
from tinyflux.shards.manifest import diff_fingerprints
from tinyflux.shards.schema import fields_at
from tinyflux.shards.source import open_source
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


def columns(rows: list[tuple]) -> str:
    """Rows as aligned text; the first column to the left, numbers to the right."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )


def members(report: Report) -> list[tuple]:
    """(member, fields, bytes a sample as tensors, as stored, ratio) of each kind of member."""
    shape = report.source.shapes[0]
    groups = {name: fields_at(group.fields, shape) for name, group in report.source.groups.items()}
    rows: list[tuple] = [("member", "fields", "raw bytes", "stored", "ratio")]
    for extension, size in sorted(report.stored.items(), key=lambda item: -item[1]):
        group = extension.partition(".")[0]
        fields, each = groups.get(group, {}) if extension.endswith(SUFFIX) else {}, size / max(1, report.scanned)
        raw = sum(f.nbytes for f in fields.values())
        rows.append((extension, ", ".join(fields), raw or "", round(each), f"{raw / each:.2f}" if raw else ""))
    return rows


def values(report: Report) -> list[tuple]:
    """What each field's values are like."""
    rows: list[tuple] = [("field", "dtype", "shape", "bytes", "mean", "std", "min", "max", "NaN/inf")]
    for name, spec in fields_at(report.source.fields, report.source.shapes[0]).items():
        if stats := report.stats.get(name):
            numbers = (stats.mean, stats.std, stats.low, stats.high, stats.bad)
            rows.append((name, spec.dtype, "x".join(map(str, spec.shape)), spec.nbytes, *numbers))
    return rows


def prompts(report: Report) -> list[tuple]:
    """How long the prompts are."""
    rows: list[tuple] = [("prompts", "min", "median", "95%", "max")]
    for unit, lengths in (
        ("characters", [len(prompt) for prompt in report.prompts]),
        ("words", [len(prompt.split()) for prompt in report.prompts]),
    ):
        if lengths:
            rows.append((unit, *(int(q) for q in np.percentile(lengths, (0, 50, 95, 100)))))
    return rows


def fingerprint(report: Report) -> list[str]:
    """The producer's fingerprint, a line a value."""
    return [line.rpartition(" against ")[0] for line in diff_fingerprints(whole(report.source.groups), {})]


def summary(report: Report) -> list[str]:
    """What stands above the tables."""
    manifest = report.source.manifest
    size = manifest.bytes
    repeated = len(report.prompts) - len(set(report.prompts))
    return [
        f"{manifest.source}: {manifest.count} samples in {len(manifest.shards)} shards, {size / 1e6:.1f} MB, "
        f"{size / max(1, manifest.count) / 1e3:.1f} kB a sample; dataset id {manifest.dataset_id}",
        f"looked at {report.read} samples; {sum(not p for p in report.prompts)} prompts are empty, {repeated} repeat",
    ]


def text(report: Report) -> str:
    """The whole report for a terminal."""
    parts = ["\n".join(summary(report)), columns(members(report)), columns(values(report)), columns(prompts(report))]
    parts.append("\n".join(["fingerprint", *(f"  {line}" for line in fingerprint(report))]))
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
        for vae in (whole(report.source.groups).get("vae", {}), zoo.fingerprint()["vae"])
    ]
    if differences := diff_fingerprints(*known):
        raise ValueError(f"--zoo {zoo_name} is not what the source was built with: vae.{'; vae.'.join(differences)}")
    for sample in report.shown:
        pixels = zoo.decode_latents(sample.tensors["latents"].float()[None])[0]  # [3, H, W]
        sample.decoded = preview(pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())


def inspect(config: InspectConfig) -> int:
    """Look, print, write the page; returns the exit status: 1 if something is damaged."""
    report = look(open_source(config.source), config.samples, config.shards, config.shown)
    print(text(report))
    if config.html:
        if config.decode:
            decode(report, config.zoo)
        tables = {"Members": members(report), "Values": values(report), "Prompts": prompts(report)}
        page = render(report, summary(report), tables, fingerprint(report))
        atomic_write(config.html, page.encode())
        print(f"\n{config.html}: {len(report.shown)} samples shown")
    return 1 if report.faults else 0


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to the process's own."""
    try:
        return inspect(tyro.cli(InspectConfig, prog="python -m sharding.inspect", description=__doc__, args=args))
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
