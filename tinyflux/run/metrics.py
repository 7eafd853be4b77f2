"""The metrics of a run: metrics.jsonl (one line per step), TensorBoard, the progress line."""

import errno
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tinyflux.run.records import parse
from tinyflux.shards.stream import Stream
from tinyflux.util import devices
from tinyflux.util.files import atomic_write, replaced
from tinyflux.util.log import say

RETRY = 60.0
"""Seconds until writing TensorBoard's files is retried after an error."""

LATE = 0.1  # a rank is named if it is later than this fraction of a step


def _finite(value):
    """The value with None in place of NaN and infinity, also inside lists and dicts."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> None:
    """Keep the records up to `step`, without lines that a kill or a crash left incomplete. A run that starts at step 0
    gets a new file, and the old one is renamed."""
    if not step:
        if path.stat().st_size:
            aside = next(p for i in range(1, 10_000) if not (p := path.with_name(f"metrics.{i}.jsonl")).exists())
            say(f"earlier records were moved to {path.rename(aside)}")
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        record = parse(line)
        if record is None:
            say(f"WARNING: {path}: line {number} is damaged, so it is left out")
        elif record["step"] <= step:
            kept.append(line + b"\n")
    atomic_write(path, b"".join(kept))


class Board:
    """A TensorBoard writer that survives a full disk: failed writes are dropped, with one warning."""

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes half a second: import it only on the rank that writes

        self.folder, self.failed_at = folder, 0.0
        self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, kind: str, name: str, value, step: int) -> None:
        """`add_scalar`, `add_text`, `add_image` or `flush` of a SummaryWriter."""
        try:
            if self.writer is None:
                if time.monotonic() < self.failed_at + RETRY:
                    return
                from torch.utils.tensorboard import SummaryWriter

                with replaced(self.folder / ".room") as probe:  # its thread would print twenty lines per failure
                    probe.write_bytes(bytes(1 << 16))
                (self.folder / ".room").unlink()
                self.writer = SummaryWriter(str(self.folder))
            getattr(self.writer, f"add_{kind}")(name, value, step)
        except OSError as error:
            if not self.failed_at:
                say(f"WARNING: TensorBoard's files in {self.folder}: {error}; training continues without them")
            self.writer, self.failed_at = None, time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            say(f"WARNING: TensorBoard's files in {self.folder}: {error}")


class Metrics:
    """The run's records. Only rank 0 writes; on other ranks every method does nothing.

    start_step: records after this step belong to steps that are repeated, and are removed. The first record after a
    resume has `resumed`.
    """

    def __init__(self, run_dir: Path, tensorboard_dir: Path | None, start_step: int, total_steps: int):
        self.writes = dist.get_rank() == 0
        self.total_steps, self.started_at, self.start_step = total_steps, time.perf_counter(), start_step
        self.board: Board | None = None
        self.path = run_dir / "metrics.jsonl"
        self.marks = {"resumed": True} if start_step else {}
        self.unwritten: list[bytes] = []
        self.failed = False
        if not self.writes:
            return
        if self.path.exists():
            _truncate(self.path, start_step)
        self.file = open(self.path, "ab", buffering=0)
        self.size = self.file.tell()
        if tensorboard_dir is not None:
            self.board = Board(tensorboard_dir, start_step)

    def record(self, record: dict) -> None:
        """Append one line. NaN and infinity become null, because JSON has neither. If the disk is full, lines wait."""
        if self.writes:
            self.unwritten.append(json.dumps(_finite(record | self.marks), allow_nan=False).encode() + b"\n")
            self.marks = {}
            self._write()

    def _write(self) -> None:
        data = b"".join(self.unwritten)
        try:
            if (written := self.file.write(data)) != len(data):
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")
        except OSError as error:
            self.file.truncate(self.size)  # no partial lines
            if not self.failed:
                say(f"WARNING: {self.path}: {error}; training continues, and the lines are written later")
            self.failed = True
            return
        self.size += len(data)
        self.unwritten, self.failed = [], False

    def scalars(self, values: dict[str, float], step: int) -> None:
        """TensorBoard scalars, `group/name` -> value."""
        if self.board is not None:
            for name, value in values.items():
                self.board.write("scalar", name, value, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """A TensorBoard text page."""
        if self.board is not None:
            self.board.write("text", name, text, step)

    def image(self, name: str, image, step: int) -> None:
        """A TensorBoard picture, uint8 [3, H, W]."""
        if self.board is not None:
            self.board.write("image", name, image, step)

    def progress(self, record: dict) -> None:
        """Print one line: step, losses, speed, time left."""
        if not self.writes:
            return
        done = record["step"] - self.start_step
        seconds = (time.perf_counter() - self.started_at) / max(1, done) * (self.total_steps - record["step"])
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [f"step {record['step']}/{self.total_steps}", f"loss {record['loss']:.4f}"]
        parts += [f"{name} {record[name]:.4f}" for name in record["weights"] if record[name] is not None]
        parts += [f"lr {record['lr']:.2e}", f"grad {record['grad_norm']:.3f}"]
        parts += [f"{record['samples_per_s']:.1f} samples/s"]
        slowest = record["slowest"]
        if slowest["late_s"] > LATE * record["step_s"]:
            late, wait = slowest["late_s"], slowest["data_wait_s"]
            parts += [f"rank {slowest['rank']} starts {late:.2f} s late ({wait:.2f} s waiting for data)"]
        print(*parts, f"left {hours}:{minutes:02}:{seconds:02}", sep="  ", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.writes:
            if self.unwritten:
                self._write()
            self.file.close()
        if self.board is not None:
            self.board.close()


def data_report(loader: Stream, step: int, device: torch.device) -> dict:
    """Counters of all ranks' streams since the run was started or resumed. Must be called on all ranks.

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


def scalars(record: dict, world: int, device: torch.device, *, flops: float, tokens: int) -> dict[str, float]:
    """TensorBoard scalars of a step's record with its `data_report`.

    flops: of the forward pass of one sample; tokens: of one sample.
    """
    data, weights = record["data"], record["weights"]
    values = {f"loss/{name}": record[name] for name in ("loss", *weights)}
    values |= {f"weight/{name}": weight for name, weight in weights.items()}
    values |= {f"validation/{k[4:]}": v for k, v in record.items() if k.startswith("val_")}
    by_t = record["main_by_t"]
    values |= {f"main_by_t/{(i + 0.5) / len(by_t):.2f}": v for i, v in enumerate(by_t) if v is not None}
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
