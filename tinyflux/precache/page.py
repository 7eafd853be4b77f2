"""The page of `sharding.inspect`: one self-contained HTML file. All text is escaped, nothing is loaded."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

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
.fault { color: #a11 } h3 { font-size: .95rem; color: #5b6673; margin: 1.2rem 0 .5rem }
summary, .caption { margin: .5rem 0 } summary { cursor: pointer; list-style: none } use { filter: grayscale(1) }
details:not([open]) summary span {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden }
summary small { color: #1f6fb2 } details ol { margin: .3rem 0; padding-left: 1.3rem }
"""
AREA, LONGEST, SHORT = 6400, 2000, 120  # pixels of a picture; most characters of a caption, and most unfolded ones
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
        parts.append(
            "<p>Beside each picture: Sol's attention at a few timesteps. Each map is scaled from its own minimum "
            "(clear) to its own maximum (red), which are given below it.</p>"
        )
    counts = {shape: sum(sample.shape == shape for sample in report.shown) for shape in report.source.shapes}
    for shape, count in sorted(counts.items(), key=lambda item: -item[1]):
        if not count:
            continue
        if len(report.source.shapes) > 1:
            parts.append(f"<h3>latents {shape[0]} x {shape[1]}: {count} shown</h3>")
        cards = [card(i, sample, report) for i, sample in enumerate(report.shown) if sample.shape == shape]
        parts.append(f'<div class="grid">{"".join(cards)}</div>')
    if report.similarity is not None:
        parts.append("<h2>Lune: cosine between buckets, mean over samples</h2>")
        parts.append(heatmap(report.similarity, report.source.grids["lune"]))
    names = dict.fromkeys(name for name, _ in report.stats)
    drawn = [histogram(name, of) for name in names if (of := [s for (n, _), s in report.stats.items() if n == name])]
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
    """An HTML table; the first row is the header."""

    def cells(row: tuple, tag: str) -> str:
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in shown) + "</tr>"

    return "<table>" + cells(rows[0], "th") + "".join(cells(row, "td") for row in rows[1:]) + "</table>"


def card(i: int, sample: Shown, report: Report) -> str:
    """One sample: its preview, Sol's maps and the mask over it, the reconstruction, the captions."""
    box = box_of(sample.shape)
    figures = [figure(picture(box, jpeg(sample.preview, f"p{i}", box)), "preview")]
    if sample.decoded:
        figures.append(figure(picture(box, jpeg(sample.decoded, f"d{i}", box)), "decoded"))
    again = f'<use href="#p{i}"/>' if sample.preview else ""
    if "mask" in sample.tensors:
        covered = overlaid(sample.tensors["mask"].double().numpy(), box, (0, 1))
        figures.append(figure(picture(box, again, covered), "mask"))
    if "sol_spatial" in sample.tensors:
        maps, grid = sample.tensors["sol_spatial"].double().numpy(), report.source.grids["sol"]
        for k in (0, len(grid) // 2, len(grid) - 1):
            values = maps[k][np.isfinite(maps[k])]
            low, high = (values.min(), values.max()) if len(values) else (0, 0)
            says = f"Sol, t = {grid[k]:g}\n{low:.3g} to {high:.3g}"
            figures.append(figure(picture(box, again, overlaid(maps[k], box, (low, high))), says))
    return (
        f'<div class="card"><div class="row">{"".join(figures)}</div>{captions(sample.prompts)}'
        f'<div class="key">{escape(sample.key)}<br>{escape(shortened(sample.origin))}</div></div>'
    )


def captions(prompts: list[str]) -> str:
    """A sample's captions; long ones, and all except the first, are folded."""
    shown = [shortened(prompt) for prompt in prompts] or [""]
    if len(shown) == 1 and len(shown[0]) <= SHORT:
        return f'<p class="caption">{escape(shown[0])}</p>'
    more = f"<small>{len(shown)} captions</small>" if len(shown) > 1 else "<small>all of it</small>"
    others = "".join(f"<li>{escape(text)}</li>" for text in shown[1:])
    items = f'<ol start="2">{others}</ol>' if others else ""
    return f"<details><summary><span>{escape(shown[0])}</span>{more}</summary>{items}</details>"


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def figure(content: str, caption: str) -> str:
    lines = "<br>".join(map(escape, caption.splitlines()))
    return f"<figure>{content}<figcaption>{lines}</figcaption></figure>"


def box_of(shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height on the page of a latent shape's pictures; all have the same area."""
    h, w = shape
    return round((AREA * w / h) ** 0.5), round((AREA * h / w) ** 0.5)


def jpeg(data: bytes | None, name: str, box: tuple[int, int]) -> str:
    """An image element, which can be reused by its name; a picture with another aspect keeps it."""
    return "" if data is None else image(data, "jpeg", box, f'id="{name}"')


def image(data: bytes, kind: str, box: tuple[int, int], more: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<image {more} href="{source}" width="{box[0]}" height="{box[1]}"/>'


def overlaid(values: np.ndarray, box: tuple[int, int], limits: tuple[float, float]) -> str:
    """A map [h, w] as an image element: clear at the lower limit, red at the upper limit."""
    low, high = limits
    scaled = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    shares = np.clip((scaled - low) / (high - low), 0, 1) if high > low else np.zeros_like(scaled)
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (0xE3, 0x12, 0x0B), (204 * shares).round()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return image(data.getvalue(), "png", box, 'preserveAspectRatio="none" style="image-rendering: pixelated"')


def picture(box: tuple[int, int], *images: str) -> str:
    """Images one over the other, as an SVG."""
    w, h = box
    size = f'width="{w}" height="{h}"'
    return f'<svg {size} viewBox="0 0 {w} {h}"><rect {size} fill="#e8ebef"/>{"".join(images)}</svg>'


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


def histogram(name: str, stats: list[FieldStats]) -> str:
    """Histogram of a field's values over all its shapes, without the outermost 0.1% at each end."""
    parts = [part for one in stats for part in one.some]
    if not parts:
        return ""
    values = np.concatenate(parts)
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
