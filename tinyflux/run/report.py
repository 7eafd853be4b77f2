"""RUN_DIR/report.html: what a run did, on one self-contained page.

python -m tinyflux.run.report RUN_DIR [--earlier OTHER_RUN_DIR]
"""

import base64
import html
import io
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from tinyflux.run.plots import Points, plot, smooth
from tinyflux.run.records import data_lines, read_metrics
from tinyflux.util import cli
from tinyflux.util.files import atomic_write

STEPS, SIDE = 16, 256
"""Most steps whose pictures are shown, and their longest side in pixels; larger pictures are scaled down."""
GAP = 2  # between the pictures of a grid
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #1f2937 }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 1.5em 0 .3em }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
table { border-collapse: collapse } td, th { padding: .15em 1em .15em 0; text-align: left; vertical-align: top }
svg text { font: 11px system-ui, sans-serif; fill: #6b7280 } svg { display: block }
figcaption { font-weight: 600 } .plot figcaption span { font-weight: 400; margin-left: .7em }
output { display: block; min-height: 1.5em; font-size: 12px; font-variant-numeric: tabular-nums }
output span { margin-right: 1em }
.pictures { display: flex; flex-wrap: wrap; gap: 1em } .pictures figure { margin: 0 } .pair { display: flex; gap: 4px }
.pair img { width: 128px; image-rendering: pixelated; background: #f3f4f6 }
.pictures figcaption { font-weight: 400; max-width: 260px } .slider { display: flex; gap: 1em; align-items: center }
.slider input { flex: 1; max-width: 520px } .hint { color: #6b7280 }
pre { background: #f3f4f6; padding: 1em; overflow: auto; font-size: 12px } summary { cursor: pointer; font-weight: 600 }
"""
SCRIPT = """
const slider = document.querySelector(".slider input");
if (slider) {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  const show = () => {
    const shown = pictures[slider.value];
    document.querySelector(".slider b").textContent = "step " + shown.step;
    document.querySelectorAll(".pair").forEach((pair, i) => {
      for (const kind of ["ema", "raw"]) {
        const image = pair.querySelector("." + kind);
        if (image) image.src = (shown[kind] || [])[i] || "data:,";
      }
    });
  };
  slider.addEventListener("input", show);
  show();
}
for (const figure of document.querySelectorAll(".plot")) {
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), out = figure.querySelector("output");
  const lines = JSON.parse(figure.dataset.values);
  svg.addEventListener("mousemove", event => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const nearest = line => line.values.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const found = lines.map(nearest);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", found[0][0]); cursor.setAttribute("x2", found[0][0]);
    out.replaceChildren(...lines.map((line, i) => {
      const span = document.createElement("span");
      span.style.color = line.colour;
      span.textContent = line.name + " " + found[i][2] + " at " + found[i][1];
      return span;
    }));
  });
  svg.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); out.replaceChildren(); });
}
"""


def cells(path: Path) -> tuple[list[Image.Image], list[str]]:
    """The pictures of a sample grid, and their prompts; a grid without stored parameters counts as one picture."""
    with Image.open(path) as image:
        image.load()
        made = json.loads(getattr(image, "text", {}).get("parameters", "{}"))
        image = image.convert("RGB")
    if not made.get("prompts") or not made.get("height"):
        return [image], []
    count, height = len(made["prompts"]), made["height"]
    columns = math.ceil(math.sqrt(count))
    width = (image.width + GAP) // columns - GAP
    places = [(i % columns * (width + GAP), i // columns * (height + GAP)) for i in range(count)]
    return [image.crop((x, y, x + width, y + height)) for x, y in places], made["prompts"]


def embedded(image: Image.Image) -> str:
    """A picture as a data URL: lossless if it is small, else a JPEG of at most SIDE pixels."""
    small = max(image.size) <= 128
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "PNG") if small else image.save(data, "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def pictures(folder: Path, prompts: list[str]) -> str:
    """The section of the sample pictures: a slider over steps, averaged weights beside trained ones; "" without any."""
    names = [re.fullmatch(r"step_(\d+)", path.stem) for path in folder.glob("step_*.png")]
    steps = sorted(int(match[1]) for match in names if match)
    shown, told = [], []
    for step in spread(steps, STEPS):
        entry: dict = {"step": step}
        for kind, name in (("ema", f"step_{step}.png"), ("raw", f"step_{step}_raw.png")):
            if (folder / name).exists():
                try:
                    parts, told = cells(folder / name)
                    entry[kind] = [embedded(part) for part in parts]
                except (OSError, ValueError):  # truncated by a kill
                    continue
        if "ema" in entry:
            shown.append(entry)
    if not shown:
        return ""
    last, raw = shown[-1], any("raw" in entry for entry in shown)
    count = len(last["ema"])
    texts = next((known for known in (told, prompts) if len(known) == count), ["; ".join(prompts)])
    figures = []
    for i, source in enumerate(last["ema"]):
        pair = f'<img class="ema" alt="averaged weights" title="averaged weights (EMA)" src="{source}">'
        if raw:
            pair += '<img class="raw" alt="trained weights" title="trained weights" src="data:,">'
        text = html.escape(texts[i] if i < len(texts) else "")
        figures.append(f'<figure><div class="pair">{pair}</div><figcaption>{text}</figcaption></figure>')
    hint = "left: averaged weights (EMA), right: trained weights" if raw else "averaged weights (EMA)"
    data = json.dumps(shown).replace("<", "\\u003c")
    return (
        f'<h2>Samples</h2><div class="slider"><input type="range" min="0" max="{len(shown) - 1}"'
        f' value="{len(shown) - 1}" aria-label="step"><b>step {last["step"]}</b><span class="hint">{hint}</span></div>'
        f'<div class="pictures">{"".join(figures)}</div><script type="application/json" id="pictures">{data}</script>'
    )


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
        ("samples per second", f"{sum(r['samples_per_s'] for r in records) / len(records):.1f}"),
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


def series(records: list[dict], *names: str) -> dict[str, Points]:
    """Values of the records by step."""
    return {n: smooth([(r["step"], r[n]) for r in records if r.get(n) is not None]) for n in names}


def curves(records: list[dict], earlier: list[dict]) -> str:
    """The plots of a run, with the curves of an earlier one."""
    marks = [record["step"] for record in records if record.get("resumed")]
    others = [name for name in records[-1]["weights"] if name != "main"]
    charts = {
        "loss": ("loss", "main"),
        "validation": ("val_loss",),
        "distillation": (*others, *(f"val_{name}" for name in others)),
        "learning rate": ("lr",),
        "gradient norm": ("grad_norm",),
        "samples per second": ("samples_per_s",),
        "share of time spent waiting for data": ("data_wait",),
    }
    plots = [plot(title, series(records, *names), series(earlier, *names), marks) for title, names in charts.items()]
    plots.insert(3, plot("main loss over t (0 is noise, 1 is data)", by_timestep(records)))
    return "".join(plots)


def write_report(
    run_dir: str | Path, config: dict, sample_dir: str = "samples", *, earlier: str | Path | None = None
) -> Path:
    """Write RUN_DIR/report.html from metrics.jsonl, the sample grids and the config. Returns its path.

    earlier: another run's folder, whose curves are drawn too. Raises ValueError if no step is recorded.
    """
    run_dir = Path(run_dir)
    records, before = read_metrics(run_dir), read_metrics(earlier) if earlier else []
    if not records:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no steps yet")
    rows = summary(run_dir, records, config)
    if earlier:
        rows.append(("earlier run, dashed", str(Path(earlier).resolve())))
    table = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    text = html.escape(json.dumps(config, indent=2))
    name = html.escape(run_dir.resolve().name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f"<h1>{name}</h1>{pictures(run_dir / sample_dir, config['trainer'].get('sample_prompts', []))}"
        f"<h2>Curves</h2>{curves(records, before)}<h2>Summary</h2><table>{table}</table>"
        f"<details><summary>Configuration</summary><pre>{text}</pre></details><script>{SCRIPT}</script></html>"
    )
    path = run_dir / "report.html"
    atomic_write(path, page)
    return path


@dataclass
class Options:
    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    earlier: Path | None = None
    """Another run's folder; its curves are drawn too, as dashed lines."""


def command(options: Options) -> None:
    """Write the report of a run folder."""
    found = next(options.run_dir.glob("*/training_config.json"), None)
    if found is None:
        raise FileNotFoundError(f"{options.run_dir}: not a run folder: no training_config.json in a subfolder")
    config = json.loads(found.read_text())
    samples = config["trainer"].get("sample_dir", "samples")
    print(write_report(options.run_dir, config, samples, earlier=options.earlier))


def main(argv: list[str] | None = None) -> int:
    """The command of this module."""
    return cli.run(command, Options, argv, prog="python -m tinyflux.run.report", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
