"""From stored samples to a training batch: timestep, teacher features at that timestep, text dropout.

The stream's batches come from `StreamCollate`; `CachedDataset` and `collate_fn` are for a DataLoader over caches.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from tinyflux.run.folders import newest_identity
from tinyflux.shards.config import DataConfig, open_sources, resolve_revisions
from tinyflux.shards.plan import PLAN_VERSION
from tinyflux.shards.store import Source
from tinyflux.shards.stream import Stream
from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.schedules import keyed_timesteps, shape_timesteps
from tinyflux.util import rng
from tinyflux.util.buckets import BUCKETS, interpolate

VALIDATION_TIMESTEPS = 8


class StreamCollate:
    """Collate of the shard stream; every draw is keyed by the sample's seed.

    nulls: for each source, `t5_embeds` [L, D] and `clip_pooled` [D] of the empty prompt. Takes the stream's raw
    batch and returns `latents` [B, C, H, W], `t5_embeds` [B, L, D], `clip_pooled` [B, D], `local_indices`,
    `dataset_ids` and `sample_seeds` int64 [B], `masks` None, `t` [B], `keys`, and where the teacher is on
    `lune_features` [B, D], `sol_stats` [B, 3], `sol_spatial` [B, h, w] in float32; `lune_mask` and `sol_mask`
    bool [B], which samples have them, where a source lacks them.
    """

    def __init__(
        self,
        config: TrainerConfig,
        nulls: list[dict[str, Tensor]],
        *,
        global_batch_size: int,
        seed: int,
        buckets: tuple[float, ...] = BUCKETS,
    ):
        self.config, self.buckets = config, buckets
        self.global_batch_size, self.seed = global_batch_size, seed
        self.null_t5 = torch.stack([null["t5_embeds"] for null in nulls])
        self.null_clip = torch.stack([null["clip_pooled"] for null in nulls])

        c = config
        self.shape = {"shift": c.shift, "logit_normal": c.logit_normal_sampling}
        self.shape |= {"mean": c.logit_mean, "std": c.logit_std}

    def timesteps(self, seeds: Tensor, step: int, slots: Tensor) -> Tensor:
        """Training timesteps [B] of the samples in these slots of a step's global batch."""
        strata = None
        if self.config.stratified_sampling:
            strata = torch.from_numpy(rng.permutation(self.global_batch_size, self.seed, "strata", step))[slots]
        return keyed_timesteps(seeds, strata, self.global_batch_size, **self.shape)

    def features(self, raw: dict, t: Tensor) -> dict[str, Tensor]:
        """The teachers' features at t."""
        names = {"lune_features": "lune"} if self.config.enable_lune else {}
        if self.config.enable_sol:
            names |= {"sol_stats": "sol_stats", "sol_spatial": "sol_spatial"}
        return {name: interpolate(raw[stored], t, self.buckets) for name, stored in names.items()}

    def at(self, raw: dict, t: Tensor) -> dict:
        """The batch at given timesteps [B], with all prompts."""
        names = ("latents", "t5_embeds", "clip_pooled", "local_indices", "dataset_ids", "sample_seeds", "keys")
        batch = {name: raw[name] for name in names}
        batch |= {name: raw[name] for name in ("lune_mask", "sol_mask", "valid") if name in raw}
        return batch | {"masks": None, "t": t, **self.features(raw, t)}

    def __call__(self, raw: dict) -> dict:
        seeds, source = raw["sample_seeds"], raw["source_index"]
        batch = self.at(raw, self.timesteps(seeds, raw["step"], raw["slots"]))
        drop = rng.uniform(seeds, "text_dropout") < self.config.text_dropout
        for name, null in (("t5_embeds", self.null_t5), ("clip_pooled", self.null_clip)):
            batch[name][drop] = null[source[drop]].to(batch[name].dtype)  # in place: the text is most of the batch
        return batch


def open_run_sources(config: DataConfig, groups: tuple[str, ...], checkpoints: Path) -> list[Source]:
    """The sources of a run, every remote one at the same revision on all ranks; a collective.

    What a checkpoint of the run recorded is read again (see `resolve_revisions`). Raises as `open_sources`.
    """
    found, error = [None, None], None
    if dist.get_rank() == 0:
        try:
            identity = newest_identity(checkpoints)
            found[0] = resolve_revisions(config, identity.get("revisions", {}))
        except (ValueError, OSError) as caught:  # the others must not wait for rank 0
            error, found[1] = caught, str(caught)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise error or ValueError(found[1])
    return open_sources(config, groups, found[0])


class HeldOut:
    """Batches of a stream's held-out samples, each at VALIDATION_TIMESTEPS fixed timesteps that cover the training
    distribution evenly; the same batches every time. `valid` bool [B] says which rows count."""

    def __init__(self, stream: Stream, collate: StreamCollate, samples: int):
        self.stream, self.collate = stream, collate
        self.batch_size = stream.config.micro_batch_size
        self.batches = -(-samples // (self.batch_size * stream.world))
        u = (torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS
        self.timesteps = shape_timesteps(u, **collate.shape)

    def __iter__(self) -> Iterator[dict]:
        for raw in islice(self.stream.validation(self.batch_size), self.batches):
            for t in self.timesteps:
                yield self.collate.at(raw, t.expand(self.batch_size))


def data_identity(stream: Stream) -> dict:
    """What the order of a run's samples depends on besides the step; recorded in its checkpoints."""
    c = stream.config
    sums = [hashlib.sha256(s.manifest.to_json().encode()).hexdigest() for s in stream.sources]
    manifests = dict(zip(stream.labels, sums, strict=True))
    commits = {s.url: s.revision for s in stream.sources if s.url.startswith("hf://")}
    return {
        **({"revisions": commits} if commits else {}),
        "plan_version": PLAN_VERSION,
        "global_batch_size": c.global_batch_size,
        "seed": c.seed,
        "sources": manifests,
        "dataset_ids": [s.dataset_id for s in stream.sources],
        "weights": list(stream.plan.weights),
        "val_fraction": c.val_fraction,
        "slots_per_stream": c.slots_per_stream,
        "resample": c.resample,
    }


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
