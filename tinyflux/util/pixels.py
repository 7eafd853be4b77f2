"""Pictures as tensors: uint8 [B, H, W, 3] in files, float32 [B, 3, H, W] in [-1, 1] in networks."""

import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], on the same device."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> uint8 of the same shape; values outside are clamped."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
