"""RUN_DIR/report.html: what a run did, on one page that needs nothing but a browser.

python -m tinyflux.run.report RUN_DIR
"""

import html
import json
import math
import os
import sys
from pathlib import Path

from tinyflux.run.metrics import data_lines, read_metrics

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 240, 56, 28
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #1f2937 }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 1.5em 0 .3em }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
table { border-collapse: collapse } td, th { padding: .15em 1em .15em 0; text-align: left; vertical-align: top }
svg text { font: 11px system-ui, sans-serif; fill: #6b7280 } img { max-width: 100% }
figcaption { font-weight: 600 } figcaption span { font-weight: 400; margin-left: .7em }
pre { background: #f3f4f6; padding: 1em; overflow: auto; font-size: 12px }
"""

Points = list[tuple[float, float]]


def smooth(points: Points, count: int = 200) -> Points:
    """At most `count` points: means over equal stretches."""
    size = -(-len(points) // count) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that divide low..high into about as many parts."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(title: str, series: dict[str, Points]) -> str:
    """A line chart as SVG; series without points are left out."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 16)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - 12), 1)

    parts, legend = [], []
    for y in ticks(y0, y1):
        across, down = place(x0, y)
        parts.append(f'<line x1="{across}" x2="{WIDTH - 16}" y1="{down}" y2="{down}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{place(x, y0)[0]}" y="{HEIGHT - 8}" text-anchor="middle">{x:.4g}</text>')
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        line = " ".join(f"{a},{b}" for a, b in (place(*point) for point in points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        legend.append(f'<span style="color:{colour}">{html.escape(name)}</span>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    caption = " ".join([html.escape(title), *legend] if len(legend) > 1 else [html.escape(title)])
    return f"<figure><figcaption>{caption}</figcaption><svg {size}>{''.join(parts)}</svg></figure>"


def by_timestep(records: list[dict]) -> dict[str, Points]:
    """Mean main loss in each part of t, over the first and the last fifth of the run."""
    fifth = max(1, len(records) // 5)
    result = {}
    for name, part in (("first fifth", records[:fifth]), ("last fifth", records[-fifth:])):
        columns = zip(*(record["main_by_t"] for record in part), strict=True)
        kept = [[value for value in column if value is not None] for column in columns]
        points = [((i + 0.5) / len(kept), sum(values) / len(values)) for i, values in enumerate(kept) if values]
        result[name] = points
    return result


def summary(run_dir: Path, records: list[dict], config: dict) -> list[tuple[str, str]]:
    """Rows of the table at the top."""
    last, tail = records[-1], records[-max(1, len(records) // 20) :]
    seconds = sum(record["step_s"] for record in records)
    spent = f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    rows = [
        ("steps", f"{last['step']} of {config['trainer']['total_steps']}"),
        ("loss, mean of the last twentieth", f"{sum(r['loss'] or 0 for r in tail) / len(tail):.4f}"),
        ("time in steps", f"{spent}, {seconds / len(records):.3f} s a step"),
        ("samples a second", f"{sum(r['samples_per_s'] for r in records) / len(records):.1f}"),
        ("waiting for data", f"{100 * sum(r['data_wait'] for r in records) / len(records):.1f}% of the time"),
        ("steps skipped", str(sum(r["skipped"] for r in records))),
        ("folder", str(run_dir.resolve())),
    ]
    if shown := [r["data"] for r in records if "data" in r]:
        rows += [tuple(line.split(": ", 1)) for line in data_lines(shown[-1])]
    validated = [r for r in records if r.get("val_loss") is not None]
    if validated:
        best = min(validated, key=lambda r: r["val_loss"])
        rows.insert(2, ("best validation loss", f"{best['val_loss']:.4f} at step {best['step']}"))
    return rows


def write_report(run_dir: str | Path, config: dict, sample_dir: str = "samples") -> Path:
    """Write RUN_DIR/report.html from metrics.jsonl, the sample grids and the config. Returns its path."""
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    if not records:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no steps yet")

    def series(*names: str) -> dict[str, Points]:
        return {n: smooth([(r["step"], r[n]) for r in records if r.get(n) is not None]) for n in names}

    others = [name for name in records[-1]["weights"] if name != "main"]
    plots = [
        plot("loss", series("loss", "main")),
        plot("validation", series("val_loss")),
        plot("distillation", series(*others, *(f"val_{name}" for name in others))),
        plot("main loss over t (0 is noise, 1 is data)", by_timestep(records)),
        plot("learning rate", series("lr")),
        plot("gradient norm", series("grad_norm")),
        plot("samples a second", series("samples_per_s")),
        plot("share of the time that waits for data", series("data_wait")),
    ]
    cells = "".join(f"<tr><th>{a}</th><td>{html.escape(b)}</td></tr>" for a, b in summary(run_dir, records, config))
    grids = sorted((run_dir / sample_dir).glob("step_*.png"), key=lambda path: int(path.stem.removeprefix("step_")))
    pictures = "".join(
        f'<figure><figcaption>step {path.stem.removeprefix("step_")}</figcaption><img src="{sample_dir}/{path.name}">'
        "</figure>"
        for path in grids[-4:]
    )
    text = html.escape(json.dumps(config, indent=2))
    prompts = html.escape("; ".join(config["trainer"].get("sample_prompts", [])))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run_dir.name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(run_dir.name)}</h1><table>{cells}</table><h2>Curves</h2>"
        f"{''.join(plots)}" + (f"<h2>Samples</h2><p>{prompts}</p>{pictures}" if pictures else "")
        + f"<h2>Configuration</h2><pre>{text}</pre></html>"
    )  # fmt: skip
    path = run_dir / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page)
    os.replace(temporary, path)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
    found = next(folder.glob("*/training_config.json"), None) or sys.exit(f"{folder}: no training_config.json")
    print(write_report(folder, json.loads(found.read_text())))
