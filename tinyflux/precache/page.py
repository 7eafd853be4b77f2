"""The page of `sharding.inspect`: one HTML file with everything in it. All text is escaped, nothing is loaded."""

import base64
from html import escape

import numpy as np

from tinyflux.precache.survey import FieldStats, Report, Shown

BINS = 60
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #d8dde4 }
table { border-collapse: collapse } td, th { padding: .15rem .7rem; text-align: right }
td:first-child, th:first-child { text-align: left } th { color: #5b6673; font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); gap: 1.2rem }
.card { border: 1px solid #d8dde4; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }
.row { display: flex; gap: 4px; flex-wrap: wrap } figure { margin: 0 } figcaption { color: #5b6673; font-size: 11px }
.key { color: #5b6673; font-size: 12px } svg { display: block } pre { white-space: pre-wrap; overflow-wrap: anywhere }
.fault { color: #a11 }
"""
# nothing but what is in the page itself
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(report: Report, summary: list[str], tables: dict[str, list[tuple]], fingerprint: list[str]) -> str:
    """The page as text."""
    name = escape(report.source.name)
    parts = [f"<h1>{name}</h1>", *(f"<p>{escape(line)}</p>" for line in summary)]
    if report.faults:
        parts.append("<h2>Faults</h2>" + "".join(f'<p class="fault">{escape(fault)}</p>' for fault in report.faults))
    parts += [f"<h2>{escape(title)}</h2>{table(rows)}" for title, rows in tables.items()]
    parts.append("<h2>Samples</h2>")
    if report.shown and "sol_spatial" in report.shown[0].tensors:
        parts.append("<p>Beside each picture: where Sol's attention goes at a few timesteps, from none to red.</p>")
    parts.append(f'<div class="grid">{"".join(card(i, sample, report) for i, sample in enumerate(report.shown))}</div>')
    if report.similarity is not None:
        parts.append("<h2>Lune: cosine between buckets, mean over samples</h2>")
        parts.append(heatmap(report.similarity, report.source.timesteps))
    drawn = [histogram(field, stats) for field, stats in report.stats.items() if stats.count]
    parts.append(f'<h2>Histograms</h2><div class="grid">{"".join(drawn)}</div>')
    if report.rejected:
        parts.append(f"<h2>Rejected</h2>{table([('reason', 'inputs'), *report.rejected.most_common()])}")
    parts.append(f"<h2>Fingerprint</h2><pre>{escape(chr(10).join(fingerprint))}</pre>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>'
        f"<body>{chr(10).join(parts)}</body></html>\n"
    )


def table(rows: list[tuple]) -> str:
    """The first row is the head."""

    def cells(row: tuple, tag: str) -> str:
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in shown) + "</tr>"

    return "<table>" + cells(rows[0], "th") + "".join(cells(row, "td") for row in rows[1:]) + "</table>"


def card(i: int, sample: Shown, report: Report) -> str:
    """One sample: its preview, Sol's maps over it, the reconstruction, the prompt."""
    figures = [figure(picture(jpeg(sample.preview, f"p{i}")), "preview")]
    if sample.decoded:
        figures.append(figure(picture(jpeg(sample.decoded, f"d{i}")), "decoded"))
    if "sol_spatial" in sample.tensors:
        maps, buckets = sample.tensors["sol_spatial"].double().numpy(), report.source.timesteps
        for k in (0, len(buckets) // 2, len(buckets) - 1):
            figures.append(figure(picture(f'<use href="#p{i}"/>', maps[k]), f"Sol, t = {buckets[k]:g}"))
    return (
        f'<div class="card"><div class="row">{"".join(figures)}</div><p>{escape(sample.prompt)}</p>'
        f'<div class="key">{escape(sample.key)}<br>{escape(sample.origin)}</div></div>'
    )


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def jpeg(data: bytes | None, name: str) -> str:
    """An image element, which others may show again by its name."""
    if data is None:
        return ""
    return (
        f'<image id="{name}" href="data:image/jpeg;base64,{base64.b64encode(data).decode()}" width="80" height="80"/>'
    )


def picture(image: str, spatial: np.ndarray | None = None) -> str:
    """An image element, and over it a map [h, w], as an SVG."""
    parts = ['<svg width="80" height="80" viewBox="0 0 80 80"><rect width="80" height="80" fill="#e8ebef"/>', image]
    if spatial is not None:
        finite = np.nan_to_num(spatial, nan=0.0, posinf=0.0, neginf=0.0)
        high, (h, w) = max(finite.max(), 1e-12), finite.shape
        for y in range(h):
            for x in range(w):
                place = f'x="{80 * x / w:g}" y="{80 * y / h:g}" width="{80 / w:g}" height="{80 / h:g}"'
                parts.append(f'<rect {place} fill="#e3120b" fill-opacity="{0.8 * max(finite[y, x], 0) / high:.2f}"/>')
    return "".join([*parts, "</svg>"])


def heatmap(matrix: np.ndarray, buckets: tuple[float, ...]) -> str:
    """A matrix [K, K] of cosines between the buckets, from white (0 and less) to blue (1), with its numbers."""
    cell, n = 38, len(buckets)
    parts = [f'<svg width="{cell * (n + 1)}" height="{cell * (n + 1)}" font-size="11" text-anchor="middle">']
    for i, t in enumerate(buckets):
        at = cell * (i + 1) + cell / 2
        parts.append(f'<text x="{at}" y="24">{t:g}</text><text x="20" y="{at + 4}">{t:g}</text>')
        for j in range(n):
            value = float(matrix[i, j])
            shade = min(1.0, max(0.0, value)) if np.isfinite(value) else 0.0
            x, y = cell * (j + 1), cell * (i + 1)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="#1f6fb2" '
                f'fill-opacity="{shade:.2f}"/><text x="{x + cell / 2}" y="{y + cell / 2 + 4}" '
                f'fill="{"#fff" if shade > 0.5 else "#1c2430"}">{value:.2f}</text>'
            )
    return "".join([*parts, "</svg>"])


def histogram(name: str, stats: FieldStats) -> str:
    """The distribution of a field's values but for the outermost 0.1% at either end."""
    values = np.concatenate(stats.some)
    low, high = np.percentile(values, (0.1, 99.9))
    counts, edges = np.histogram(values, BINS, (low, high) if high > low else None)
    width, height = 280, 90
    bars = "".join(
        f'<rect x="{i * width / BINS:.2f}" y="{height * (1 - count / counts.max()):.2f}" '
        f'width="{width / BINS - 0.5:.2f}" height="{height * count / counts.max():.2f}" fill="#1f6fb2"/>'
        for i, count in enumerate(counts)
    )
    axis = (
        f'<text x="0" y="{height + 14}">{edges[0]:.3g}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{edges[-1]:.3g}</text>'
    )
    size = f'width="{width}" height="{height + 18}" font-size="11"'
    return f'<div class="card"><b>{escape(name)}</b><svg {size}>{bars}{axis}</svg></div>'
