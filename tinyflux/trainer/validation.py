"""Losses of held-out samples."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from tinyflux.trainer.batches import Batch, to_device
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.objective import Objective
from tinyflux.trainer.sampling import evaluating


def validate(objective: Objective, ema: EMA, batches: Iterable[Batch], device: torch.device, step: int) -> dict:
    """`val_loss`, the main loss, and `val_NAME` of each other term, with the averaged weights at fixed timesteps and
    with fixed noise. Must be called on all ranks, with the same number of batches."""
    names = [*objective.terms]
    sums = torch.zeros(len(names) + 1, device=device)
    with ema.average_parameters(), evaluating(objective.model):
        for batch in batches:
            batch = to_device(batch, device)
            losses = objective.validate(batch, step)
            counted = torch.stack([*(losses[name] for name in names), torch.ones_like(losses["main"])])
            sums += torch.where(batch["valid"], counted, 0).sum(1)  # a boolean index would wait for its size
    dist.all_reduce(sums)
    *losses, count = sums.tolist()
    keys = ["val_loss" if name == "main" else f"val_{name}" for name in names]
    # NaN without a good sample: a loss of 0 would always be the best
    return {key: value / count if count else math.nan for key, value in zip(keys, losses, strict=True)}
