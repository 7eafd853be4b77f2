"""Trainings of the demo's network on its sources, several seeds of several variants, and a table of held-out losses."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from launch.train import main as train

CONFIG = Path(__file__).with_suffix(".toml")


class Variant(NamedTuple):
    """A column of the table: its title, the steps of its schedule, and options of launch/train.py."""

    title: str
    steps: int
    options: tuple[object, ...]


def held_out_loss(folder: Path, sources: Sequence[Path], seed: int, variant: Variant) -> float:
    """Train in this folder, unless that was done before; the held-out main loss after the last step."""
    argv = ["--config", CONFIG, "--run-dir", folder, "--data.sources", *sources, "--data.seed", seed]
    argv += ["--trainer.total-steps", variant.steps, "--trainer.validate-every", max(1, variant.steps // 8)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = train([str(word) for word in (*argv, *variant.options)])
    if status:
        raise SystemExit(f"{folder}: exit status {status}\n{output.getvalue()}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(record["val_loss"] for record in reversed(records) if "val_loss" in record)


def compare(out: Path, sources: Sequence[Path], seeds: Sequence[int], variants: Sequence[Variant]) -> None:
    """Train every variant with every seed, on one thread; print their losses, and what part they are of the first's."""
    torch.set_num_threads(1)
    rows = []
    for seed in seeds:
        row = []
        for variant in variants:
            name = f"{variant.title}, {variant.steps} steps, seed {seed}".replace(",", "").replace(" ", "-")
            row.append(held_out_loss(out / name, sources, seed, variant))
            print(f"{name}: {row[-1]:.4f}", flush=True)
        rows.append((f"seed {seed}", row))
    rows.append(("mean", [sum(column) / len(rows) for column in zip(*(row for _, row in rows), strict=True)]))
    print("\n| held-out loss | " + " | ".join(f"{v.title}, {v.steps} steps" for v in variants) + " |")
    print("|---" * (len(variants) + 1) + "|")
    for title, row in rows:
        cells = [f"{row[0]:.4f}", *(f"{loss:.4f} ({loss / row[0]:.2f})" for loss in row[1:])]
        print(f"| {title} | " + " | ".join(cells) + " |")
