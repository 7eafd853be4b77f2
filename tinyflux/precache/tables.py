"""The tables of `sharding.inspect`: rows of cells; the first row is the header."""

from collections import Counter
from pathlib import Path

import numpy as np

from tinyflux.precache.survey import Report
from tinyflux.shards.discover import sources_in
from tinyflux.shards.format import SUFFIX
from tinyflux.shards.manifest import diff_fingerprints
from tinyflux.shards.schema import Group
from tinyflux.shards.source import Source, base_url
from tinyflux.util import cli


def tables(report: Report) -> dict[str, list[tuple]]:
    """All non-empty tables by title."""
    source = report.source
    found = {
        "Layers": layers(source),
        "Shapes": shapes(source),
        "Members": members(report),
        "Fields": fields(report),
        "Captions": captions(source),
        "Prompts": prompts(report),
    }
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def text(report: Report) -> str:
    """The whole report for a terminal."""
    parts = ["\n".join(summary(report)), *(cli.table(rows, right=True) for rows in tables(report).values())]
    parts.append("\n".join(["fingerprint", *(f"  {line}" for line in fingerprint(report.source.groups))]))
    if report.rejected:
        parts.append("\n".join(["rejected", *(f"  {n}  {reason}" for reason, n in report.rejected.most_common())]))
    if report.faults:
        parts.append("\n".join(["faults", *(f"  {fault}" for fault in report.faults)]))
    return "\n\n".join(parts)


def summary(report: Report) -> list[str]:
    """The lines above the tables."""
    manifest, repeated = report.source.manifest, len(report.prompts) - len(set(report.prompts))
    size = sum(layer.manifest.bytes for layer in report.source.layers)
    lines = [
        f"{manifest.source}: {manifest.count} samples in {len(manifest.shards)} shards, {size / 1e6:.1f} MB, "
        f"{size / max(1, manifest.count) / 1e3:.1f} kB per sample; dataset id {manifest.dataset_id}",
        f"looked at {report.read} samples; {sum(not p for p in report.prompts)} prompts are empty, {repeated} repeat",
    ]
    grids: dict[tuple, list[str]] = {}
    for name, group in report.source.groups.items():
        grids.setdefault(group.timesteps, []).append(name)
    lines += [f"timesteps of {', '.join(names)}: {', '.join(f'{t:g}' for t in g)}" for g, names in grids.items() if g]
    return lines


def layers(source: Source) -> list[tuple]:
    """The base, its overlays that are read, and overlays in folders beside it. Empty if there are no overlays."""
    rows: list[tuple] = [("layer", "is", "groups", "MB", "manifest")]
    for i, layer in enumerate(source.layers):
        kind = "overlay" if i else "base"
        hidden = [name for name in layer.manifest.groups if name not in layer.groups]
        groups = ", ".join(layer.groups) + (f" (not read: {', '.join(hidden)})" if hidden else "")
        rows.append((layer.url, kind, groups, layer.manifest.bytes / 1e6, layer.manifest.sha256[:12]))
    rows += beside(source)
    return rows if len(rows) > 2 else rows[:1]


def beside(source: Source) -> list[tuple]:
    """Overlays in folders beside a source that have one of its layers as their base and are not read."""
    used = {layer.manifest.sha256 for layer in source.layers}
    if "://" in source.layers[0].url:
        return []
    folder, rows = Path(source.layers[0].url).resolve().parent, []
    for name, found in sources_in(folder).items():
        if found["base"] and found["base"]["sha256"] in used and not _is_read(source, folder / name):
            rows.append((folder / name, "overlay, not read", ", ".join(found["groups"]), "", ""))
    return rows


def _is_read(source: Source, folder: Path) -> bool:
    return any(Path(layer.url).resolve() == folder for layer in source.layers)


def shapes(source: Source) -> list[tuple]:
    """Samples per latent shape, most frequent first."""
    index, rows = source.manifest.index, []
    for k, (shape, samples) in enumerate(source.manifest.samples_of_shapes().items()):
        rows.append((_by(shape), samples, f"{samples / max(1, index.count):.1%}", int((index.shape == k).sum())))
    return [("latent shape", "samples", "share", "shards"), *sorted(rows, key=lambda row: -row[1])]


def members(report: Report) -> list[tuple]:
    """Bytes of each kind of member, as tensors and as stored; the captions' members are counted together."""
    rows: list[tuple] = [("member", "fields", "per sample", "raw bytes", "stored", "stored/raw")]
    totals: Counter[str] = Counter()
    for (name, _), sizes in report.stored.items():
        totals[name] += sizes.bytes
    for name, _ in totals.most_common():
        of_shapes = [(shape, sizes) for (member, shape), sizes in report.stored.items() if member == name]
        count = sum(sizes.members for _, sizes in of_shapes)
        group = report.source.groups.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
        raw = sum(sizes.members * group.nbytes(shape) for shape, sizes in of_shapes) if group else 0
        named = ", ".join(group.fields) if group else ""
        ratio = f"{totals[name] / raw:.3f}" if raw else ""
        each = (round(raw / count) or "", round(totals[name] / count), ratio)
        rows.append((name, named, f"{count / report.scanned:.4g}", *each))
    return rows


def fields(report: Report) -> list[tuple]:
    """Type and statistics of each field, with one row per latent shape."""
    rows: list[tuple] = [("field", "dtype", "shape", "bytes", "stored/raw", "mean", "std", "min", "max", "NaN/inf")]
    for name, spec in report.source.fields.items():
        group = next(name_ for name_, group in report.source.groups.items() if name in group.fields)
        follows = any(isinstance(n, str) for n in spec.shape)
        for shape in report.source.shapes if follows else report.source.shapes[:1]:
            own = spec.at(shape)
            if stats := report.stats.get((name, own.shape)):
                ratio = report.ratio(group, shape if follows else None)
                numbers = (stats.mean, stats.std, stats.low, stats.high, stats.bad)
                rows.append((name, own.dtype, _by(own.shape), own.nbytes, ratio, *numbers))
    return rows


def captions(source: Source) -> list[tuple]:
    """Samples by number of captions."""
    counts = np.bincount(source.captions) if len(source.captions) else []
    return [("captions per sample", "samples"), *((n, int(count)) for n, count in enumerate(counts) if count)]


def prompts(report: Report) -> list[tuple]:
    """Lengths of the prompts."""
    rows: list[tuple] = [("prompts", "min", "median", "95%", "max")]
    for unit, lengths in (
        ("characters", [len(prompt) for prompt in report.prompts]),
        ("words", [len(prompt.split()) for prompt in report.prompts]),
    ):
        if lengths:
            rows.append((unit, *(int(q) for q in np.percentile(lengths, (0, 50, 95, 100)))))
    return rows


def fingerprint(groups: dict[str, Group]) -> list[str]:
    """The producers of the groups, one line per value; a value that differs between groups names its groups."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, group in groups.items():
        for line in diff_fingerprints(group.producer, {}):
            key, _, value = line.rpartition(" against ")[0].partition(": ")
            found.setdefault(key, {}).setdefault(value, []).append(name)
    lines = []
    for key, values in sorted(found.items()):
        several = len(values) > 1
        lines += [f"{key}: {v}" + (f" ({', '.join(of)})" if several else "") for v, of in values.items()]
    return lines


def folder_of_sources(folder: Path) -> list[tuple]:
    """The sources in a folder, overlays with their bases; only the header if there are none."""
    rows: list[tuple] = [("source", "overlay of", "samples", "shards", "shapes", "groups")]
    for name, found in sources_in(folder).items():
        base = found["base"] and found["base"]["location"]
        at = base and base_url(str(folder / name), base)
        shown = Path(at).name if at and "://" not in at and Path(at).parent == folder else at or ""
        numbers = (found["count"], found["shards"], len(found["shapes"]))
        rows.append((name, shown, *numbers, ", ".join(found["groups"])))
    return rows


def _by(shape: tuple) -> str:
    return "x".join(map(str, shape))
