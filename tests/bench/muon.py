"""How much faster does Muon train than AdamW? The demo's network and sources, several seeds, held-out loss.

python tests/bench/muon.py --sources demo/data/shapes demo/data/patterns [--out bench-muon]

AdamW trains once a seed; Muon trains as long, and in schedules of its own that are shorter. One process, one thread;
runs that are finished are not run again.
"""

import contextlib
import io
import json
from pathlib import Path

import torch
import tyro

from launch.train import main as train

RATES = {"adamw": 5e-3, "muon": 5e-3}
HELD_OUT, SAMPLES = 0.1, 200  # part of the sources, and number of its samples in a validation


def run(folder: Path, sources: list[Path], steps: int, seed: int, *options: object) -> list[dict]:
    """Train the demo's network; the records of the steps."""
    argv = ["--config", "demo", "--run-dir", folder, "--data.sources", *sources, "--data.weights", 0.9, 0.1]
    argv += ["--data.seed", seed, "--data.val-fraction", HELD_OUT, "--trainer.validation-samples", SAMPLES]
    argv += ["--trainer.total-steps", steps, "--trainer.validate-every", max(1, steps // 8), *options]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = train([str(word) for word in argv])
    if status:
        raise SystemExit(f"{folder}: exit status {status}\n{output.getvalue()}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_loss(folder: Path, *arguments: object) -> float:
    """The held-out main loss after the last step of `run`."""
    loss = run(folder, *arguments)[-1]["val_loss"]
    print(f"{folder.name}: {loss:.4f}", flush=True)
    return loss


def main(
    sources: tuple[Path, Path],
    out: Path = Path("bench-muon"),
    steps: int = 800,
    shorter: tuple[float, ...] = (0.65,),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Train all of it, and print a table.

    Args:
        sources: the demo's shapes and patterns.
        out: folder of the runs.
        steps: of AdamW's schedule, and of Muon's first.
        shorter: Muon's other schedules, as parts of `steps`.
        seeds: of weights, data order and draws.
    """
    torch.set_num_threads(1)
    columns = [("adamw", 1.0), *(("muon", part) for part in (1.0, *shorter))]
    table = {}
    for seed in seeds:
        for name, part in columns:
            count = round(part * steps)
            options = ("--trainer.optimizer", name, "--trainer.learning-rate", RATES[name])
            table[seed, name, part] = final_loss(out / f"{name}-{count}-{seed}", sources, count, seed, *options)
    print("\n| seed | " + " | ".join(f"{name}, {round(part * steps)} steps" for name, part in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for seed in seeds:
        cells = [table[seed, *column] for column in columns]
        shown = [f"{cells[0]:.4f}", *(f"{cell:.4f} ({cell / cells[0]:.2f})" for cell in cells[1:])]
        print(f"| {seed} | " + " | ".join(shown) + " |")
    means = [sum(table[seed, *column] for seed in seeds) / len(seeds) for column in columns]
    shown = [f"{means[0]:.4f}", *(f"{mean:.4f} ({mean / means[0]:.2f})" for mean in means[1:])]
    print("| mean | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
