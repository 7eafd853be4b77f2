"""Line charts as SVG, with their points as data for a script that shows the values under the mouse pointer."""

import html
import json
import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 56, 16, 12, 28
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

Points = list[tuple[float, float]]


def smooth(points: Points, count: int = 200) -> Points:
    """At most `count` points: means over equal intervals."""
    size = -(-len(points) // count) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that divide low..high into about that many parts."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(title: str, series: dict[str, Points], earlier: dict[str, Points] | None = None, marks: list[int] = ()) -> str:
    """A line chart; series without points are skipped.

    earlier: the same series of another run, dashed. marks: x of vertical lines, where the run was resumed.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    lines = [(name, points, colour, False) for (name, points), colour in zip(series.items(), COLOURS, strict=False)]
    for name, _, colour, _ in tuple(lines):
        if (earlier or {}).get(name):
            lines.append((f"{name} of the earlier run", earlier[name], colour, True))
    xs, ys = zip(*(point for _, points, _, _ in lines for point in points), strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP), 1)

    parts = []
    for y in ticks(y0, y1):
        across, down = place(x0, y)
        parts.append(f'<line x1="{across}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{place(x, y0)[0]}" y="{HEIGHT - 8}" text-anchor="middle">{x:.4g}</text>')
    for mark in marks:
        if x0 <= mark <= x1:
            across = place(mark, y0)[0]
            drawn = f'x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#9ca3af" '
            drawn += f'stroke-dasharray="2 3"><title>resumed at step {mark}</title>'
            parts.append(f'<line class="mark" {drawn}</line>')
    data = []
    for name, points, colour, dashed in lines:
        placed = [place(*point) for point in points]
        line = " ".join(f"{a},{b}" for a, b in placed)
        style = 'stroke-dasharray="5 4" stroke-opacity=".55"' if dashed else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6" {style}/>')
        values = [[a, float(f"{x:.6g}"), float(f"{y:.4g}")] for (a, _), (x, y) in zip(placed, points, strict=True)]
        data.append({"name": name, "colour": colour, "values": values})
    legend = [f'<span style="color:{c}">{html.escape(name)}</span>' for name, _, c, dashed in lines if not dashed]
    caption = " ".join([html.escape(title), *(legend if len(legend) > 1 else [])])
    if len(lines) > len(legend):
        caption += ' <span class="hint">dashed: the earlier run</span>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#111827" visibility="hidden"/>'
    return (
        f'<figure class="plot" data-values="{html.escape(json.dumps(data))}"><figcaption>{caption}</figcaption>'
        f"<svg {size}>{''.join(parts)}{cursor}</svg><output></output></figure>"
    )
