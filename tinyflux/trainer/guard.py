"""Which steps are not taken: those whose loss or gradient is not finite, and, on request, loss spikes."""

import json
import math
from collections import deque
from pathlib import Path
from statistics import median

import torch.distributed as dist

from tinyflux.trainer.config import TrainerConfig
from tinyflux.util.log import say

WINDOW, FEWEST = 100, 20  # steps whose median loss a spike is measured against, and without which none is


class Guard:
    """Judges each step by numbers that are the same on all ranks, so all skip it or none.

    losses: those of the last steps that were taken; a checkpoint keeps them.
    """

    def __init__(self, config: TrainerConfig, run_dir: Path):
        self.spike, self.limit, self.run_dir = config.max_loss_spike, config.max_nonfinite_steps, run_dir
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Why a step must be skipped, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "loss or gradient not finite"
        if self.spike and len(self.losses) >= FEWEST and loss > self.spike * median(self.losses):
            return f"loss {loss:.4g} is more than {self.spike:g} times the median {median(self.losses):.4g}"
        self.losses.append(loss)
        self.in_a_row = 0
        return None

    def skip(self, step: int, fault: str, keys: list[str]) -> str | None:
        """Count a skipped step. After too many in a row the samples' keys are written down and the reason to stop is
        returned. keys: of this rank. A collective then."""
        self.in_a_row += 1
        say(f"WARNING: step {step} skipped: {fault} ({self.in_a_row} in a row)")
        if self.in_a_row < self.limit:
            return None
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, keys)
        path = self.run_dir / f"nonfinite_step_{step}.json"
        if dist.get_rank() == 0:
            path.write_text(json.dumps({"step": step, "fault": fault, "keys": sum(everyone, [])}, indent=2))
        return (
            f"{self.in_a_row} steps in a row were skipped, the last because: {fault}. Its samples are in {path}; lower"
            " trainer.learning_rate, or look at them with `python -m sharding.inspect`"
        )
