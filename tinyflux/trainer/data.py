"""Datasets, batch sampler and collate function of caches, for a DataLoader."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.util import rng


class MultiCachedDataset(Dataset):
    """The samples of several caches, concatenated; each sample has the dataset id of its cache.

    dtype: of the samples' tensors. Add caches with `add`.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype, self.sources = dtype, MultiSourceCache()
        self.ends: list[int] = []

    def add(self, cache: DatasetCache, dataset_id: int) -> None:
        """Add a cache. Raises as `MultiSourceCache.add`."""
        self.sources.add(cache, dataset_id)
        self.ends.append(len(self.sources))

    def get_multi_source_cache(self) -> MultiSourceCache:
        """The same caches, for lookups of teacher features."""
        return self.sources

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def shapes(self) -> np.ndarray:
        """The latent (h, w) of each sample, int64 [N, 2]."""
        return np.concatenate([cache.shapes for cache in self.sources.caches.values()])

    def __getitem__(self, i: int) -> dict:
        """Sample i: `latent` [C, H, W], `t5_embed` [L, D], `clip_pooled` [D], `local_idx`, `dataset_id`. IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is out of range: the caches have {len(self)}")
        place = bisect_right(self.ends, i)
        dataset_id, cache = list(self.sources.caches.items())[place]
        local = i - (self.ends[place - 1] if place else 0)
        latent, t5, clip = (x.to(self.dtype) for x in cache.get_encodings(local))
        return {"latent": latent, "t5_embed": t5, "clip_pooled": clip, "local_idx": local, "dataset_id": dataset_id}


class CachedDataset(MultiCachedDataset):
    """The samples of one cache."""

    def __init__(self, cache: DatasetCache, dataset_id: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__(dtype)
        self.add(cache, dataset_id)


class ShapeBatches(Sampler[list[int]]):
    """Batches with one latent shape each, for `DataLoader(dataset, batch_sampler=...)`.

    Every sample is in one batch per epoch; the last batch of a shape may be smaller. The order is keyed by
    (seed, epoch), see `set_epoch`; with shuffle=False it is the samples' order.
    """

    def __init__(self, dataset: MultiCachedDataset, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        shapes, number = np.unique(dataset.shapes, axis=0, return_inverse=True)
        self.rows = [torch.from_numpy(np.flatnonzero(number.ravel() == k)) for k in range(len(shapes))]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for rows in self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(rng.key(self.seed, "shapes", self.epoch) >> 1)

        def order(n: int) -> torch.Tensor:
            return torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)

        batches = [batch for rows in self.rows for batch in rows[order(len(rows))].split(self.batch_size)]
        for k in order(len(batches)).tolist():
            yield batches[k].tolist()


def collate_fn(samples: list[dict]) -> dict:
    """Samples of a `CachedDataset` as a batch: `latents` [B, C, H, W], `t5_embeds` [B, L, D], `clip_pooled` [B, D],
    `local_indices` and `dataset_ids` int64 [B], `masks` None. Raises ValueError if the latent shapes differ."""
    if len(shapes := {tuple(sample["latent"].shape[1:]) for sample in samples}) > 1:
        found = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(
            f"the samples have latents of the shapes {found}, but a batch must have one: pass the DataLoader "
            "batch_sampler=ShapeBatches(dataset, batch_size) of tinyflux.trainer.data, without batch_size and shuffle"
        )
    return {
        "latents": torch.stack([sample["latent"] for sample in samples]),
        "t5_embeds": torch.stack([sample["t5_embed"] for sample in samples]),
        "clip_pooled": torch.stack([sample["clip_pooled"] for sample in samples]),
        "local_indices": torch.tensor([sample["local_idx"] for sample in samples]),
        "dataset_ids": torch.tensor([sample["dataset_id"] for sample in samples]),
        "masks": None,
    }
