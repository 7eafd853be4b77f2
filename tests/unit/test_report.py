import json
from xml.etree import ElementTree

import pytest

from tinyflux.run.report import plot, smooth, ticks, write_report

CONFIG = {"trainer": {"total_steps": 40, "sample_prompts": ["a <red> circle"]}}


def record(step: int) -> dict:
    by_t = [None if (step + i) % 3 == 0 else 1 / (i + 1) for i in range(10)]
    timing = {"samples_per_s": 10.0, "step_s": 0.5, "data_wait": 0.01}
    values = {"loss": 2 / step, "main": 1 / step, "weights": {"main": 1.0}, "lr": 1e-3, "grad_norm": 0.5}
    values["skipped"] = step == 3
    return {"step": step, **values, "main_by_t": by_t, **timing} | ({"val_loss": 1.5 / step} if step % 10 == 0 else {})


def test_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 41)))
    (tmp_path / "samples").mkdir()
    for step in (5, 40, 10, 20, 30):
        (tmp_path / "samples" / f"step_{step}.png").touch()
    page = write_report(tmp_path, CONFIG).read_text()
    assert "40 of 40" in page and "0.0375 at step 40" in page
    assert page.count("<svg") == 7  # neither head's loss is there
    assert "a &lt;red&gt; circle" in page and "<red>" not in page
    order = [page.index(f"samples/step_{step}.png") for step in (10, 20, 30, 40)]
    assert order == sorted(order) and "step_5.png" not in page


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
