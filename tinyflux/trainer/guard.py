"""Decides which steps are skipped: those whose loss or gradient is not finite and, if configured, loss spikes."""

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tinyflux.trainer.config import TrainerConfig
from tinyflux.util.log import say

WINDOW, FEWEST = 100, 20  # a spike is measured against the median loss of the last 100 steps, at least 20


class Guard:
    """Judges each step on the device, from numbers that are the same on all ranks, so that all ranks decide the same.

    median: of the losses that the last step was compared with, 0-d; NaN if there were too few.
    """

    def __init__(self, config: TrainerConfig, run_dir: Path, device: torch.device):
        self.spike, self.limit = config.max_loss_spike, config.max_nonfinite_steps
        self.run_dir, self.device = run_dir, device
        self.window = torch.full((WINDOW,), float("nan"), device=device)  # losses of the taken steps, newest last
        self.median = torch.full((), float("nan"), device=device)
        self.in_a_row = 0

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if a step with this loss and gradient norm (0-d) must be skipped, else 0.0."""
        fault = ~(loss.isfinite() & grad_norm.isfinite())
        if self.spike:
            count = self.window.isfinite().sum()
            ordered = self.window.sort().values  # NaN last
            middle = torch.stack(((count - 1) // 2, count // 2)).clamp(min=0)
            median = ordered.index_select(0, middle).mean()
            self.median = torch.where(count >= FEWEST, median, torch.nan)
            fault = fault | (loss > self.spike * self.median)
        self.window = torch.where(fault, self.window, torch.cat((self.window[1:], loss.view(1))))
        return fault.float()

    @property
    def losses(self) -> list[float]:
        """The losses of the last taken steps, for a checkpoint."""
        return [loss for loss in self.window.tolist() if not math.isnan(loss)]

    @losses.setter
    def losses(self, losses: list[float]) -> None:
        last = losses[-WINDOW:]
        self.window = torch.tensor([float("nan")] * (WINDOW - len(last)) + last, device=self.device)

    def fault(self, loss: float, grad_norm: float, median: float) -> str:
        """Why a step was skipped."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "loss or gradient not finite"
        return f"loss {loss:.4g} is more than {self.spike:g} times the median {median:.4g}"

    def count(self, step: int, fault: str | None, keys: list[str]) -> str | None:
        """Count skipped steps. After too many in a row, write the samples' keys to a file and return the reason to
        stop. keys: of this rank. Must be called on all ranks."""
        if fault is None:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        say(f"WARNING: step {step} skipped: {fault} ({self.in_a_row} in a row)")
        if self.in_a_row < self.limit:
            return None
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, keys)
        path = self.run_dir / f"nonfinite_step_{step}.json"
        if dist.get_rank() == 0:
            keys = sum(everyone, [])
            try:
                path.write_text(json.dumps({"step": step, "fault": fault, "keys": keys}, indent=2))
            except OSError as error:
                say(f"WARNING: {path}: {error}; the keys are {' '.join(keys)}")
        return (
            f"{self.in_a_row} steps in a row were skipped, the last because: {fault}. The keys of its samples are in"
            f" {path}; lower trainer.learning_rate, or check the samples with `python -m sharding.inspect`"
        )
