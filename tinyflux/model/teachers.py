"""Lune features and Sol statistics of an SD1.5-type UNet.

Timesteps are in the teacher's convention: 1000 is noise, 0 is data.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

CHUNK = 1 << 22
"""Most attention probabilities in memory at once on the CPU, over all samples and heads: its cache holds the 16 MiB."""


def chunk_of(device: torch.device) -> int:
    """Most attention probabilities at once on a device: on a GPU about 3% of its memory, at about 9 bytes each.

    It depends on the total memory, not the free memory, so that the summation order, and thus the last bits, stay the
    same.
    """
    if device.type != "cuda":
        return CHUNK
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK, 1 << (memory >> 8).bit_length() - 1)


def lune_features(unet: UNet2DConditionModel, latents: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
    """Mid-block output of the UNet, averaged over space. The up blocks are not run.

    latents [B, 4, h, w], context [B, 77, D], timesteps [B] in [0, 1000]. Returns float32 [B, width of the mid block].
    """
    emb = unet.time_embedding(unet.get_time_embed(latents, timesteps))
    hidden = unet.conv_in(latents)
    for block in unet.down_blocks:
        conditions = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        hidden, _ = block(hidden, emb, **conditions)
    return unet.mid_block(hidden, emb, encoder_hidden_states=context).float().mean(dim=(2, 3))


def sol_statistics(
    unet: UNet2DConditionModel, latents: Tensor, context: Tensor, timesteps: Tensor, size: int = 8
) -> tuple[Tensor, Tensor]:
    """Statistics of the UNet's self-attention, averaged over its layers.

    latents [B, 4, h, w], context [B, 77, D], timesteps [B] in [0, 1000]. Returns float32 stats [B, 3] =
    (locality, entropy, 1 - entropy), each in [0, 1], and a map [B, size, size] of the attention that each position
    receives, which sums to 1. No full attention matrix is stored.
    """
    B, _, H, W = latents.shape
    with recorded(unet, (H, W)) as layers:
        unet(latents, timesteps, encoder_hidden_states=context)
    if not layers:
        raise ValueError("the UNet has no self-attention layers to take Sol statistics from")
    locality = torch.stack([layer.locality for layer in layers]).mean(0)
    entropy = torch.stack([layer.entropy for layer in layers]).mean(0)
    maps = [F.interpolate(layer.importance, size=(size, size), mode="bilinear") for layer in layers]
    spatial = torch.stack(maps).mean(0).view(B, size, size)
    stats = torch.stack((locality, entropy, 1 - entropy), dim=1).clamp(0, 1)
    return stats, spatial / spatial.sum(dim=(1, 2), keepdim=True)


class SolStatistics:
    """One layer's entropy [B], locality [B] and importance [B, 1, h, w], accumulated over chunks of queries.

    `add` takes the probabilities of a chunk, averaged over heads, in float32.
    """

    def __init__(self, batch: int, grid: tuple[int, int], device: torch.device):
        self.h, self.w = grid
        self.n = self.h * self.w
        y, x = torch.meshgrid(torch.arange(self.h), torch.arange(self.w), indexing="ij")
        self.points = torch.stack((y, x), -1).view(-1, 2).float().to(device)  # [n, 2]
        self._entropy, self._distance = (torch.zeros(batch, device=device) for _ in range(2))
        self._received = torch.zeros(batch, self.n, device=device)

    def add(self, probs: Tensor, start: int) -> None:
        """probs [B, c, n]: the head-averaged attention of the queries from `start` on."""
        self._entropy += torch.special.entr(probs.clamp(min=1e-8)).sum(dim=(1, 2))
        distances = torch.cdist(self.points[start : start + probs.shape[1]], self.points)  # [c, n]
        self._distance += torch.einsum("bcn,cn->b", probs, distances)
        self._received += probs.sum(dim=1)

    @property
    def entropy(self) -> Tensor:
        return self._entropy / self.n / max(math.log(self.n), 1e-8)  # a single token attends to itself: 0

    @property
    def locality(self) -> Tensor:
        return 1 - self._distance / self.n / max(math.hypot(self.h - 1, self.w - 1), 1e-8)

    @property
    def importance(self) -> Tensor:
        return self._received.view(-1, 1, self.h, self.w)


class SolAttnProcessor:
    """Attention processor of a self-attention layer that appends its `SolStatistics` to `layers`.

    The layer's output is exact. Queries are processed in chunks, so that at most `chunk_of` probabilities exist at a
    time. `grid` is (height, width) of the UNet's latents; the layer's grid is found by halving it, as the UNet does.
    """

    def __init__(self, layers: list[SolStatistics], grid: tuple[int, int]):
        self.layers = layers
        self.grid = grid

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None, **_):
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("Sol statistics are for self-attention without a mask")
        B, n, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(B, n, attn.heads, -1).transpose(1, 2)  # [B, H, n, d]
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q = q * attn.scale
        layer = SolStatistics(B, halved(self.grid, n), hidden_states.device)
        chunk = max(1, chunk_of(q.device) // (B * attn.heads * n))
        output = torch.empty_like(q)
        for start in range(0, n, chunk):
            probs = (q[:, :, start : start + chunk] @ k.mT).softmax(dim=-1, dtype=torch.float32)  # [B, H, c, n]
            layer.add(probs.mean(dim=1), start)
            output[:, :, start : start + chunk] = probs.to(v.dtype) @ v
        self.layers.append(layer)
        projection, dropout = attn.to_out
        return dropout(projection(output.transpose(1, 2).reshape(B, n, -1)))


def halved(grid: tuple[int, int], n: int) -> tuple[int, int]:
    """The grid of n tokens that results from halving (rounding up) `grid` some number of times."""
    h, w = grid
    while h * w > n:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    if h * w != n:
        raise ValueError(f"{n} attention tokens don't fit latents of {grid[0]} x {grid[1]} halved any number of times")
    return h, w


@contextmanager
def recorded(unet: UNet2DConditionModel, grid: tuple[int, int]) -> Iterator[list[SolStatistics]]:
    """Within the block, the self-attention layers of `unet` append their statistics, in order, to the yielded list."""
    layers: list[SolStatistics] = []
    before = unet.attn_processors
    sol = SolAttnProcessor(layers, grid)
    unet.set_attn_processor({name: sol if ".attn1." in name else old for name, old in before.items()})
    try:
        yield layers
    finally:
        unet.set_attn_processor(before)
