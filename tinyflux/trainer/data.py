"""Caches in a DataLoader: their samples, and batches of them."""

from bisect import bisect_right

import torch
from torch.utils.data import Dataset

from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache


class MultiCachedDataset(Dataset):
    """The samples of several caches, one after the other; a sample carries the id of its cache.

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
        """The same caches, to look up the teachers' features of a batch in."""
        return self.sources

    def __len__(self) -> int:
        return len(self.sources)

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


def collate_fn(samples: list[dict]) -> dict:
    """Samples of a `CachedDataset` as a batch: `latents` [B, C, H, W], `t5_embeds` [B, L, D], `clip_pooled` [B, D],
    `local_indices` and `dataset_ids` int64 [B], `masks` None."""
    return {
        "latents": torch.stack([sample["latent"] for sample in samples]),
        "t5_embeds": torch.stack([sample["t5_embed"] for sample in samples]),
        "clip_pooled": torch.stack([sample["clip_pooled"] for sample in samples]),
        "local_indices": torch.tensor([sample["local_idx"] for sample in samples]),
        "dataset_ids": torch.tensor([sample["dataset_id"] for sample in samples]),
        "masks": None,
    }
