"""What a run says about itself: metrics.jsonl (one line a step), TensorBoard, the progress line."""

import json
import math
import os
import time
from pathlib import Path

import torch.distributed as dist


def say(*words: object) -> None:
    """Print on rank 0 alone, at once."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


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
