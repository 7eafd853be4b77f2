"""Timestep buckets: teacher features are cached on a grid of t and interpolated between its points."""

import torch
from torch import Tensor


def grid(count: int) -> tuple[float, ...]:
    """`count` timesteps, evenly spaced from 0.05 to 0.95."""
    return tuple(round(0.05 + 0.9 * i / (count - 1), 4) for i in range(count))


BUCKETS = grid(10)  # 0.05, 0.15, ..., 0.95


def locate(t: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Where t [B] lies on a grid [K] of rising values, clamped to it: the bucket below, int64 [B], and the weight of
    the next one, float32 [B]."""
    low = torch.bucketize(t.contiguous(), grid[1:-1], right=True)
    below, above = grid.index_select(0, low), grid.index_select(0, low + 1)
    return low, ((t - below) / (above - below)).clamp_(0, 1)


def between(features: Tensor, low: Tensor, weight: Tensor) -> Tensor:
    """Features [B, K, ...] between the buckets that `locate` found. Returns float32 [B, ...]."""
    B, K = features.shape[:2]
    flat, rows = features.flatten(0, 1), torch.arange(B, device=low.device) * K + low
    # index_select takes a tenth of the time of features[...]
    below, above = flat.index_select(0, rows).float(), flat.index_select(0, rows + 1).float()
    return below.lerp(above, weight.view(-1, *[1] * (features.ndim - 2)))


def interpolate(features: Tensor, t: Tensor, buckets: tuple[float, ...] = BUCKETS) -> Tensor:
    """Features at t, linear between the two nearest buckets and clamped outside the grid.

    features [B, K, ...], t [B] in [0, 1], `buckets` K rising values. Returns float32 [B, ...].
    """
    if features.shape[1] != len(buckets):
        raise ValueError(f"features have {features.shape[1]} timestep buckets, the grid has {len(buckets)}")
    return between(features, *locate(t.float(), torch.tensor(buckets, device=t.device)))
