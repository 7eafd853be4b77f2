import base64
import io
import json
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from tinyflux.run.plots import plot, smooth, ticks
from tinyflux.run.report import write_report
from tinyflux.trainer.sampling import save_samples

COUNTS = ("bad_samples", "replaced_samples", "cache_hits", "late_shards", "fetched_bytes")
PROMPTS = ["a <red> circle", "a blue square", "a green star"]
CONFIG = {"trainer": {"total_steps": 40, "sample_prompts": PROMPTS}}


def record(step: int) -> dict:
    by_t = [None if (step + i) % 3 == 0 else 1 / (i + 1) for i in range(10)]
    timing = {"samples_per_s": 10.0, "step_s": 0.5, "data_wait": 0.01}
    values = {"loss": 2 / step, "main": 1 / step, "weights": {"main": 1.0}, "lr": 1e-3, "grad_norm": 0.5}
    values["skipped"] = step == 3
    if step == 40:
        source = {"samples": 8, "share": 1.0, "requested": 1.0, "passes": 0.5}
        values["data"] = {"sources": {"<red> shapes": source}, **dict.fromkeys(COUNTS, 0)}
    return {"step": step, **values, "main_by_t": by_t, **timing} | ({"val_loss": 1.5 / step} if step % 10 == 0 else {})


@pytest.fixture
def run_dir(tmp_path):
    """A run of 40 steps, resumed at 21, with pictures of four steps: red with the averaged weights, blue otherwise."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [json.dumps(record(step) | ({"resumed": True} if step == 21 else {})) for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in (5, 40, 10, 20):
        for kind, channel in (("", 0), ("_raw", 2)):
            images = torch.full((3, 3, 64, 64), -1.0)
            images[:, channel] = step / 20 - 1
            path = folder / "samples" / f"step_{step}{kind}.png"
            save_samples(images, path, parameters={"prompts": PROMPTS, "height": 64})
    return folder


def test_page(run_dir):
    page = write_report(run_dir, CONFIG, earlier=run_dir).read_text()
    assert "40 of 40" in page and "0.0375 at step 40" in page
    assert page.count("<svg") == 7 and page.count('class="mark"') == 6 and "loss of the earlier run" in page
    assert "a &lt;red&gt; circle" in page and "source &lt;red&gt; shapes" in page and "<red>" not in page
    found = json.loads(page.partition('id="pictures">')[2].partition("</script>")[0])
    assert [entry["step"] for entry in found] == [5, 10, 20, 40]
    assert page.index("<h2>Samples") < page.index("<h2>Curves")
    assert all(len(entry["ema"]) == len(entry["raw"]) == 3 for entry in found)
    image = Image.open(io.BytesIO(base64.b64decode(found[-1]["ema"][0].partition(",")[2])))
    assert image.size == (64, 64) and image.getpixel((32, 32)) == (255, 0, 0)
    assert "src=" not in page.replace('src="data:', "") and "http" not in page  # it can be mailed


def chromium(page: Path, *options: str) -> str:
    argv = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,1400", *options]
    argv += [f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser(run_dir, tmp_path):
    page = write_report(run_dir, CONFIG)
    chromium(page, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as image:
        colours = dict((colour, n) for n, colour in image.convert("RGB").getcolors(1 << 20))
    assert colours[(255, 0, 0)] >= 3 * 128**2 and colours[(0, 0, 255)] >= 3 * 128**2  # three prompts, twice as large
    moved = tmp_path / "moved.html"
    script = """<script>
        slider.value = 1; slider.dispatchEvent(new Event("input"));
        const svg = document.querySelector(".plot svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new MouseEvent("mousemove", {clientX: box.right - 16, clientY: box.top + 50}));
    </script></html>"""
    moved.write_text(page.read_text().replace("</html>", script))
    dom = chromium(moved, "--dump-dom")
    shown = json.loads(dom.partition('id="pictures">')[2].partition("</script>")[0])[1]
    assert "<b>step 10</b>" in dom and all(f'src="{source}"' in dom for source in shown["ema"] + shown["raw"])
    assert ">loss 0.05 at 40</span>" in dom and ">main 0.025 at 40</span>" in dom


def test_empty_run(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no steps yet"):
        write_report(tmp_path, CONFIG)


def test_plot_stays_inside_its_frame():
    figure = ElementTree.fromstring(plot("a & b", {"x": [(1, 5.0), (2, -1.0), (9, 2.0)], "none": []}))
    (line,) = figure.iter("polyline")
    for point in line.get("points").split():
        across, down = map(float, point.split(","))
        assert 0 <= across <= 560 and 0 <= down <= 240
    assert plot("nothing", {"x": []}) == ""


def test_flat_and_single_points_plot():
    assert "polyline" in plot("flat", {"x": [(1, 0.0), (2, 0.0)]}) and "polyline" in plot("one", {"x": [(3, 2.0)]})


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0037), (-2, 15), (1, 100000)])
def test_ticks_are_round_and_inside(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 8 and low - 1e-9 <= values[0] and values[-1] <= high + 1e-9
    assert all(len(f"{value:.4g}") <= 7 for value in values)


def test_smooth_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    assert len(smooth(points)) == 200
    assert sum(y for _, y in smooth(points)) / 200 == pytest.approx(sum(y for _, y in points) / 1000)
