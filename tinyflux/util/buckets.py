"""Timestep buckets: teacher features are cached on a grid of t and interpolated between its points."""

import torch
from torch import Tensor


def grid(count: int) -> tuple[float, ...]:
    """`count` timesteps, evenly spaced from 0.05 to 0.95."""
    return tuple(round(0.05 + 0.9 * i / (count - 1), 4) for i in range(count))


BUCKETS = grid(10)  # 0.05, 0.15, ..., 0.95


def interpolate(features: Tensor, t: Tensor, buckets: tuple[float, ...] = BUCKETS) -> Tensor:
    """Features at t, linear between the two nearest buckets and clamped outside the grid.

    features [B, K, ...], t [B] in [0, 1], `buckets` K evenly spaced values. Returns float32 [B, ...].
    """
    B, K = features.shape[:2]
    if K != len(buckets):
        raise ValueError(f"features have {K} timestep buckets, the grid has {len(buckets)}")
    step = (buckets[-1] - buckets[0]) / (K - 1)
    position = ((t.float() - buckets[0]) / step).clamp(0, K - 1)
    low = position.floor().long().clamp(max=K - 2)
    rows = torch.arange(B, device=t.device)
    weight = (position - low).view(B, *[1] * (features.ndim - 2))
    return features[rows, low].float().lerp(features[rows, low + 1].float(), weight)
