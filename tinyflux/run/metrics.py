"""What a run says about itself: metrics.jsonl (one line a step), TensorBoard, the progress line."""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tinyflux.shards.stream import Stream
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.schedules import loss_warmup
from tinyflux.util import devices


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of RUN_DIR/metrics.jsonl, oldest first."""
    with open(Path(run_dir) / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a line that a kill cut short goes too."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class Metrics:
    """The run's records. Only rank 0 writes; elsewhere every method is a no-op.

    `start_step`: what was recorded after this step belongs to a future that was lost, and is cut off.
    """

    def __init__(self, run_dir: Path, tensorboard_dir: Path | None, start_step: int, total_steps: int):
        self.writes = dist.get_rank() == 0
        self.total_steps, self.started_at, self.start_step = total_steps, time.perf_counter(), start_step
        self.board = None
        if not self.writes:
            return
        path = run_dir / "metrics.jsonl"
        if path.exists():
            _truncate(path, start_step)
        self.file = open(path, "a")
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # half a second: only the rank that writes pays it

            self.board = SummaryWriter(str(tensorboard_dir), purge_step=start_step + 1)

    def record(self, record: dict) -> None:
        """Append one line. NaN and infinity become null: they are no JSON."""
        if self.writes:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self.file.write(json.dumps(clean) + "\n")
            self.file.flush()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """TensorBoard scalars, `group/name` -> value."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """A TensorBoard text page."""
        if self.board is not None:
            self.board.add_text(name, text, step)

    def image(self, name: str, image, step: int) -> None:
        """A TensorBoard picture, uint8 [3, H, W]."""
        if self.board is not None:
            self.board.add_image(name, image, step)

    def progress(self, record: dict) -> None:
        """Print one line: step, losses, speed, time left."""
        if not self.writes:
            return
        done = record["step"] - self.start_step
        seconds = (time.perf_counter() - self.started_at) / max(1, done) * (self.total_steps - record["step"])
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [f"step {record['step']}/{self.total_steps}", f"loss {record['loss']:.4f}"]
        parts += [f"{name} {record[name]:.4f}" for name in ("main", "lune", "sol") if record.get(name) is not None]
        parts += [f"lr {record['lr']:.2e}", f"grad {record['grad_norm']:.3f}"]
        parts += [f"{record['samples_per_s']:.1f} samples/s"]
        print(*parts, f"left {hours}:{minutes:02}:{seconds:02}", sep="  ", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.writes:
            self.file.close()
        if self.board is not None:
            self.board.close()


def data_report(loader: Stream, step: int, device: torch.device) -> dict:
    """What the streams of all ranks did since the run was started or resumed. A collective.

    {"sources": {name: {"samples", "share", "requested", "passes"}}, "bad_samples", "replaced_samples", "late_shards",
    "cache_hits", "fetched_bytes"}; share and requested are parts of a batch, passes those since step 0.
    """
    counts = loader.counts()
    totals = torch.tensor(list(counts.values()), dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    counts = dict(zip(counts, map(int, totals.tolist()), strict=True))
    taken = [counts.pop(f"samples/{name}") for name in loader.requested]
    rows = zip(loader.requested.items(), taken, loader.passes(step), strict=True)
    sources = {
        name: {"samples": n, "share": n / max(1, sum(taken)), "requested": share, "passes": passes}
        for (name, share), n, passes in rows
    }
    return {"sources": sources, **counts}


def data_lines(report: dict) -> list[str]:
    """A `data_report` to read, a line a source and one for the rest."""
    lines = [
        f"source {name}: {s['samples']:,} samples, share {s['share']:.4f} of {s['requested']:.4f} requested,"
        f" {s['passes']:.2f} passes in all"
        for name, s in report["sources"].items()
    ]
    rest = f"data: {report['bad_samples']} bad samples, {report['replaced_samples']} times another in their place"
    cached, late, fetched = (report[name] for name in ("cache_hits", "late_shards", "fetched_bytes"))
    if cached or late or fetched:
        rest += f"; {cached} shards found in the cache, {late} waited for, {fetched / 1e6:,.1f} MB fetched"
    return [*lines, rest]


def scalars(
    record: dict, config: TrainerConfig, world: int, device: torch.device, *, flops: float, tokens: int
) -> dict[str, float]:
    """What TensorBoard shows of a step's record with its `data_report`.

    flops: of the forward pass of one sample; tokens: of one sample.
    """
    c, data = config, record["data"]
    values = {f"loss/{k}": record[k] for k in ("loss", "main", "lune", "sol") if k in record}
    values |= {f"validation/{k[4:]}": v for k, v in record.items() if k.startswith("val_")}
    by_t = record["main_by_t"]
    values |= {f"main_by_t/{(i + 0.5) / len(by_t):.2f}": v for i, v in enumerate(by_t) if v is not None}
    values |= {"weight/lune": c.lune_weight * loss_warmup(record["step"], c.lune_warmup_steps)}
    values |= {"weight/sol": c.sol_weight * loss_warmup(record["step"], c.sol_warmup_steps)}
    values |= {"optimizer/lr": record["lr"], "optimizer/grad_norm": record["grad_norm"]}
    rate = record["samples_per_s"] / world  # of one device
    work = 3 * flops * rate  # the backward takes twice the forward
    values |= {"speed/samples_per_s_per_device": rate, "speed/tokens_per_s_per_device": rate * tokens}
    values |= {"speed/tflops_per_device": work / 1e12, "speed/step_s": record["step_s"]}
    values |= {"speed/data_wait_percent": 100 * record["data_wait"]}
    values |= {"speed/data_wait_s": record["data_wait"] * record["step_s"]}
    if peak := devices.peak_flops(device):
        values["speed/mfu_percent"] = 100 * work / peak
    values |= {"memory/peak_gib": devices.peak_memory(device) / 2**30}
    values |= {f"data/{name}": value for name, value in data.items() if name != "sources"}
    for name, source in data["sources"].items():
        values |= {f"data/{key}_{name}": source[key] for key in ("share", "requested", "passes")}
    return values
