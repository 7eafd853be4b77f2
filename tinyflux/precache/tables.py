"""What `sharding.inspect` shows of a report, as rows and lines: for the terminal and for the page."""

import numpy as np

from tinyflux.precache.survey import Report
from tinyflux.shards.format import SUFFIX
from tinyflux.shards.manifest import diff_fingerprints
from tinyflux.shards.schema import fields_at
from tinyflux.util import cli
from tinyflux.util.pixels import to_uint8


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


def producer(report: Report) -> dict:
    """What the source's groups were made with, together."""
    return {name: value for group in report.source.groups.values() for name, value in group.producer.items()}


def fingerprint(report: Report) -> list[str]:
    """The producer's fingerprint, a line a value."""
    return [line.rpartition(" against ")[0] for line in diff_fingerprints(producer(report), {})]


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
    shown = (members(report), values(report), prompts(report))
    parts = ["\n".join(summary(report)), *(cli.table(rows, right=True) for rows in shown)]
    parts.append("\n".join(["fingerprint", *(f"  {line}" for line in fingerprint(report))]))
    if report.rejected:
        parts.append("\n".join(["rejected", *(f"  {n}  {reason}" for reason, n in report.rejected.most_common())]))
    if report.faults:
        parts.append("\n".join(["faults", *(f"  {fault}" for fault in report.faults)]))
    return "\n\n".join(parts)


def decode(report: Report, zoo_name: str) -> None:
    """Give the shown samples their reconstructions. Raises ValueError where the VAE is not the source's."""
    from tinyflux.model.zoo import ModelZoo
    from tinyflux.precache.images import preview

    zoo = ModelZoo(zoo=zoo_name)
    zoo.load_vae()
    known = [
        {k: v for k, v in vae.items() if k != "dtype"}
        for vae in (producer(report).get("vae", {}), zoo.fingerprint()["vae"])
    ]
    if differences := diff_fingerprints(*known):
        raise ValueError(f"--zoo {zoo_name} is not what the source was built with: vae.{'; vae.'.join(differences)}")
    for sample in report.shown:
        pixels = zoo.decode_latents(sample.tensors["latents"].float()[None])[0]  # [3, H, W]
        sample.decoded = preview(to_uint8(pixels).permute(1, 2, 0).numpy())
