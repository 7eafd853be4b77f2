"""The trainer's input: batches, and what yields them."""

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
    masks: Tensor | None  # [B, H, W], NaN in samples that have none
    t: Tensor  # [B]
    keys: list[str]
    lune_features: NotRequired[Tensor]  # [B, D]
    sol_stats: NotRequired[Tensor]  # [B, 3]
    sol_spatial: NotRequired[Tensor]  # [B, s, s]
    align_features: NotRequired[Tensor]  # [B, D, rows, columns]
    lune_mask: NotRequired[Tensor]  # bool [B], which samples have features, where a source lacks them
    sol_mask: NotRequired[Tensor]
    align_mask: NotRequired[Tensor]
    valid: NotRequired[Tensor]  # bool [B], which rows count in a validation


class Batches(Protocol):
    """The micro-batches of one rank, without end: the shard `Stream`, or a `CacheLoader`."""

    accumulation: int
    """Micro-batches of a step."""

    @property
    def fields(self) -> dict[str, Field]:
        """Dtype and shape of a sample's tensors."""

    @property
    def requested(self) -> dict[str, float]:
        """Each source's share of the samples."""

    def epoch(self, step: int) -> int:
        """How often all samples were gone through before a step."""

    def passes(self, step: int) -> list[float]:
        """How often each source was gone through before a step."""

    def counts(self) -> dict[str, int]:
        """What this rank was handed so far: `samples/SOURCE`, `bad_samples`, `replaced_samples`, `late_shards`,
        `cache_hits`, `fetched_bytes`."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to {"step": n}."""

    def __iter__(self) -> Iterator[Batch]: ...


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device. Copies out of pinned memory do not wait; what only the host needs stays there."""
    host = ("local_indices", "dataset_ids")
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name not in host else value
        for name, value in batch.items()
    }
