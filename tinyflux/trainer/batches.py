"""The trainer's input: the types of a batch and of a loader."""

from collections.abc import Iterator
from typing import NotRequired, Protocol, TypedDict

import torch
from torch import Tensor

from tinyflux.shards.schema import Field


class Batch(TypedDict):
    """Samples of one latent shape; `StreamCollate.at` makes them. Features float32, integers int64."""

    latents: Tensor  # [B, C, H, W]
    t5_embeds: Tensor  # [B, L, D]
    clip_pooled: Tensor  # [B, D]
    local_indices: Tensor  # [B], position in the source
    dataset_ids: Tensor  # [B]
    sample_seeds: Tensor  # [B]
    masks: Tensor | None  # [B, H, W], NaN for samples without a mask
    t: Tensor  # [B]
    keys: list[str]
    lune_features: NotRequired[Tensor]  # [B, D]
    sol_stats: NotRequired[Tensor]  # [B, 3]
    sol_spatial: NotRequired[Tensor]  # [B, s, s]
    align_features: NotRequired[Tensor]  # [B, D, rows, columns]
    lune_mask: NotRequired[Tensor]  # bool [B], which samples have features; present if a source lacks them
    sol_mask: NotRequired[Tensor]
    align_mask: NotRequired[Tensor]
    valid: NotRequired[Tensor]  # bool [B], which rows count in a validation


class Batches(Protocol):
    """The endless micro-batches of one rank: the shard `Stream`, or a `CacheLoader`."""

    accumulation: int
    """Micro-batches per step."""

    @property
    def fields(self) -> dict[str, Field]:
        """Dtype and shape of a sample's tensors."""

    @property
    def requested(self) -> dict[str, float]:
        """Each source's share of the samples."""

    def epoch(self, step: int) -> int:
        """Completed epochs over all sources before a step."""

    def passes(self, step: int) -> list[float]:
        """Passes over each source before a step."""

    def counts(self) -> dict[str, int]:
        """Counters of this rank so far: `samples/SOURCE`, `bad_samples`, `replaced_samples`, `late_shards`,
        `cache_hits`, `fetched_bytes`."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Seek to {"step": n}."""

    def __iter__(self) -> Iterator[Batch]: ...


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device. Copies from pinned memory are asynchronous; fields that only the host needs stay there."""
    host = ("local_indices", "dataset_ids")
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name not in host else value
        for name, value in batch.items()
    }
