"""Timesteps, learning rate and warm-ups, as pure functions of the step or the sample."""

import math

import torch
from torch import Tensor

from tinyflux.util import rng

LR_SCHEDULES = ("cosine", "linear", "constant")


def flux_shift(t: Tensor, shift: float = 3.0) -> Tensor:
    """Move t in [0, 1] towards 1 (data): s t / (1 + (s - 1) t) (Esser et al., 2024, arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def flux_unshift(t: Tensor, shift: float = 3.0) -> Tensor:
    """The inverse of `flux_shift`."""
    return t / (shift - (shift - 1) * t)


def shape_timesteps(
    u: Tensor, *, shift: float = 3.0, logit_normal: bool = True, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Timesteps from uniform draws: logit-normal or uniform, then shifted and clamped to [1e-4, 1 - 1e-4].

    u [B] in [0, 1): even draws give stratified timesteps. Returns float32 [B].
    """
    if logit_normal:
        u = torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))).float()
    return flux_shift(u, shift).clamp(1e-4, 1 - 1e-4)


def keyed_timesteps(sample_seeds: Tensor, strata: Tensor | None = None, strata_count: int = 0, **shape) -> Tensor:
    """The training timestep of each sample, which depends only on its seed.

    sample_seeds int64 [B]; strata int64 [B]: for stratified batches, which of the `strata_count` equal parts of (0, 1)
    each sample gets; shape: options of `shape_timesteps`. Returns float32 [B].
    """
    u = rng.uniform(sample_seeds, "t")
    if strata is not None:
        u = (strata.to(u.device) + u.double()) / strata_count
    return shape_timesteps(u, **shape)


def sample_timesteps(
    batch_size: int,
    *,
    shift: float = 3.0,
    logit_normal: bool = True,
    mean: float = 0.0,
    std: float = 1.0,
    stratified: bool = False,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Timesteps drawn from a torch generator, for hand-written loops. Returns float32 [batch_size]."""
    u = torch.rand(batch_size, device=device, generator=generator)
    if stratified:
        u = (torch.randperm(batch_size, device=device, generator=generator) + u) / batch_size
    return shape_timesteps(u, shift=shift, logit_normal=logit_normal, mean=mean, std=std)


def loss_warmup(step: int, warmup_steps: int) -> float:
    """Weight multiplier of a distillation loss: min(1, step / N)."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def learning_rate(
    step: int,
    *,
    base: float,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    schedule: str = "cosine",
    warmup: str = "linear",
) -> float:
    """Learning rate of an optimizer step; steps count from 0.

    It rises from base/N to base over N warm-up steps, then falls to `min_lr` at the last step.
    """
    if step < warmup_steps:
        x = (step + 1) / warmup_steps
        return base * (x if warmup == "linear" else 0.5 - 0.5 * math.cos(math.pi * x))
    x = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    match schedule:
        case "cosine":
            return min_lr + (base - min_lr) * (0.5 + 0.5 * math.cos(math.pi * x))
        case "linear":
            return base + (min_lr - base) * x
        case "constant":
            return base
    raise ValueError(f"learning rate schedule {schedule!r} is none of {', '.join(LR_SCHEDULES)}")
