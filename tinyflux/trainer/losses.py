"""The three training losses: per-sample losses in float32, averaged over the batch.

`reduction="none"` gives the per-sample losses [B]. The trainer sums those over micro-batches and ranks and divides
by the global batch size once, so that neither the number of ranks nor the accumulation split changes a loss.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUNE_MODES = ("cosine", "huber", "soft", "hard")
SNR_FORMS = ("noise", "velocity")


def huber_loss(pred: Tensor, target: Tensor, delta: float = 0.1) -> Tensor:
    """Elementwise 0.5 a^2 + delta (|e| - a), with e = pred - target and a = min(|e|, delta)."""
    error = (pred - target).abs()
    quadratic = error.clamp(max=delta)
    return 0.5 * quadratic**2 + delta * (error - quadratic)


def min_snr_weight(t: Tensor, gamma: float = 5.0, form: str = "noise") -> Tensor:
    """Min-SNR weights with snr = (t / (1 - t))^2 (Hang et al., 2023, arXiv:2303.09556).

    form: "noise", min(snr, gamma) / snr, for noise prediction, as published; or "velocity",
    min(snr, gamma) / (snr + 1), for v prediction (section 3.4). t [B] in [0, 1], 1 is data. Returns [B].
    """
    snr = (t / (1 - t).clamp(min=1e-5)) ** 2
    match form:
        case "noise":
            return snr.clamp(max=gamma) / snr.clamp(min=1e-5)
        case "velocity":
            return snr.clamp(max=gamma) / (snr + 1)
    raise ValueError(f"min-SNR form {form!r} is none of {', '.join(SNR_FORMS)}")


def compute_main_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    spatial_weights: Tensor | None = None,
    fg_weight: float = 2.0,
    bg_weight: float = 0.5,
    snr_weights: Tensor | None = None,
    use_huber: bool = False,
    huber_delta: float = 0.1,
    *,
    grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Velocity loss: mean squared error, or Huber loss, times the given weights.

    pred, target [B, N, C]; mask [B, H, W]: the weight is fg_weight where it is over 0.5, bg_weight elsewhere, and 1
    where it is NaN (the sample has no mask); spatial_weights [B, h, w], resized to the token grid and divided by their
    mean; snr_weights [B]. grid: (height, width) in tokens; default: square.
    """
    B, N, _ = pred.shape
    pred, target = pred.float(), target.float()
    loss = huber_loss(pred, target, huber_delta) if use_huber else (pred - target) ** 2
    loss = loss.mean(-1)  # [B, N]
    if spatial_weights is not None:
        weights = F.interpolate(spatial_weights.float()[:, None], size=_grid(N, grid), mode="bilinear")
        weights = weights.reshape(B, N)
        loss = loss * weights / (weights.mean(1, keepdim=True) + 1e-6)
    if mask is not None:
        mask = F.interpolate(mask.float()[:, None], size=_grid(N, grid), mode="nearest").reshape(B, N)
        loss = loss * torch.where(mask > 0.5, fg_weight, bg_weight).masked_fill(mask.isnan(), 1.0)
    loss = loss.mean(1)  # [B]
    if snr_weights is not None:
        loss = loss * snr_weights.float()
    return _reduce(loss, reduction)


def compute_lune_loss(
    pred: Tensor, target: Tensor, mode: str = "cosine", huber_delta: float = 0.1, *, reduction: str = "mean"
) -> Tensor:
    """Distance of the predicted Lune features [B, D] from the teacher's.

    cosine: 1 - cosine; huber; hard: mean squared error; soft: mean squared error of both divided by 10.
    """
    pred, target = pred.float(), target.float()
    match mode:
        case "cosine":
            loss = 1 - F.cosine_similarity(pred, target, dim=-1)
        case "huber":
            loss = huber_loss(pred, target, huber_delta).mean(-1)
        case "soft":
            loss = ((pred / 10 - target / 10) ** 2).mean(-1)
        case "hard":
            loss = ((pred - target) ** 2).mean(-1)
        case _:
            raise ValueError(f"lune mode {mode!r} is none of {', '.join(LUNE_MODES)}")
    return _reduce(loss, reduction)


def compute_sol_loss(
    pred_stats: Tensor,
    pred_spatial: Tensor,
    target_stats: Tensor,
    target_spatial: Tensor,
    stats_weight: float = 1.0,
    spatial_weight: float = 1.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Squared error of the Sol statistics [B, 3] plus that of the spatial maps [B, 8, 8]."""
    stats = ((pred_stats.float() - target_stats.float()) ** 2).mean(-1)
    spatial = ((pred_spatial.float() - target_spatial.float()) ** 2).mean((-2, -1))
    return _reduce(stats_weight * stats + spatial_weight * spatial, reduction)


def _grid(N: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    h, w = grid or (math.isqrt(N), math.isqrt(N))
    if h * w != N:
        raise ValueError(f"{N} tokens do not make a {h} x {w} grid: pass grid=(height, width)")
    return h, w


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction {reduction!r} is none of mean, none")
    return loss.mean() if reduction == "mean" else loss
