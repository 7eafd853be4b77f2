"""Training batches from a DataLoader, for notebooks: random draws like those of the shard stream, on one device."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tinyflux.shards.format import sample_key
from tinyflux.shards.schema import SCHEMA, Field, fields_at, fields_of, shape_of
from tinyflux.trainer import terms
from tinyflux.trainer.batches import Batch
from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.trainer.collate import StreamCollate
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util import rng

TENSORS = (*SCHEMA["latents"].fields, *SCHEMA["text"].fields)
FORMAT = (*TENSORS, "local_indices", "dataset_ids")


class CacheCollate(StreamCollate):
    """The stream's collate for batches of `collate_fn`: the teachers' features come from the caches."""

    def __init__(self, config: TrainerConfig, cache: DatasetCache | MultiSourceCache | None, **options):
        if wanting := [term for term in terms.enabled(config) if term.group not in (None, "lune", "sol")]:
            raise ValueError(
                f"trainer.enable_{wanting[0].name} needs shards with the group {wanting[0].group}: train with"
                " launch/train.py"
            )
        self.cache = cache
        caches = cache.caches.values() if isinstance(cache, MultiSourceCache) else [cache] if cache else []
        for one in caches:
            for name, on in (("lune", config.enable_lune), ("sol", config.enable_sol)):
                if on and getattr(one, name) is None:
                    raise ValueError(
                        f"cache {one.name!r} has no {name} features: build it with build_{name}=True, or set"
                        f" trainer.enable_{name} = false"
                    )
        self.ids = sorted(cache.caches) if isinstance(cache, MultiSourceCache) else []
        nulls = [cache.caches[i].null() for i in self.ids] if self.ids else [one.null() for one in caches]
        nothing = {"t5_embeds": torch.zeros(1, 1), "clip_pooled": torch.zeros(1)}  # only without text dropout
        super().__init__(config, nulls or [nothing], grids={}, **options)

    def source_index(self, dataset_ids: Tensor) -> Tensor:
        """Index of each sample's cache. Raises ValueError."""
        if not self.ids:
            return torch.zeros_like(dataset_ids)
        if unknown := sorted(set(dataset_ids.tolist()) - set(self.ids)):
            raise ValueError(f"dataset id {unknown[0]} of a batch is unknown: the caches added have {self.ids}")
        return torch.searchsorted(torch.tensor(self.ids), dataset_ids)

    def features(self, raw: dict, t: Tensor) -> dict[str, Tensor]:
        rows = (raw["local_indices"], raw["dataset_ids"]) if self.ids else (raw["local_indices"],)
        found = {}
        if self.config.enable_lune:
            found["lune_features"] = self.cache.get_lune(*rows, t)
        if self.config.enable_sol:
            found["sol_stats"], found["sol_spatial"] = self.cache.get_sol(*rows, t)
        return found


class CacheLoader:
    """The `Batches` of a DataLoader of `CachedDataset` or `MultiCachedDataset`.

    A step is `gradient_accumulation` batches; epochs follow each other endlessly. Timesteps, text dropout and all seeds
    are keyed by (seed, step, slot), as in the stream. The loader's sampler is seeded from (seed, epoch) in each epoch,
    so a resumed run gets the same samples as an uninterrupted one: it reads the epoch's used batches again and drops
    them. Your own sampler must take its order only from its `generator` or `set_epoch`. A smaller last batch has the
    same weight as the others.
    Raises ValueError if the loader or the cache is unsuitable.
    """

    def __init__(
        self,
        loader: DataLoader,
        cache: DatasetCache | MultiSourceCache | None,
        config: TrainerConfig,
        *,
        seed: int = 0,
    ):
        if cache is None and (config.enable_lune or config.enable_sol or config.text_dropout):
            raise ValueError(
                "setup(loader, cache): the cache is missing. It has the teachers' features and the empty prompt;"
                " without it, set enable_lune = False, enable_sol = False and text_dropout = 0"
            )
        try:
            self.batches = len(loader)
        except TypeError as error:
            raise ValueError("the DataLoader's dataset needs a length (__len__): resuming seeks in it") from error
        if not self.batches:
            raise ValueError("the DataLoader is empty: its dataset has no samples, or fewer than a batch (drop_last)")
        self.loader, self.cache, self.seed = loader, cache, seed
        self.accumulation = config.gradient_accumulation
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if batch_size is None and config.stratified_sampling:
            raise ValueError("trainer.stratified_sampling needs a DataLoader with a batch_size")
        self.global_batch_size = (batch_size or 1) * self.accumulation
        self.collate = CacheCollate(config, cache, global_batch_size=self.global_batch_size, seed=seed)
        self.position = 0  # batches handed out since step 0
        self.taken: dict[str, int] = dict.fromkeys(self.requested, 0)

    @property
    def fields(self) -> dict[str, Field]:
        """Dtype and shape of the samples' tensors. Raises ValueError if a batch has another format."""
        batch = self.loader.collate_fn([self.loader.dataset[0]])
        if not isinstance(batch, dict) or (missing := [name for name in FORMAT if name not in batch]):
            what = f"lacks {', '.join(missing)}" if isinstance(batch, dict) else f"is a {type(batch).__name__}"
            raise ValueError(f"a batch of the DataLoader {what}: pass it collate_fn=tinyflux.trainer.data.collate_fn")
        tensors = {name: batch[name][0] for name in TENSORS}
        return fields_at(fields_of(tensors), shape_of(tensors))

    @property
    def identity(self) -> dict:
        """What the data order depends on besides the step."""
        return {"seed": self.seed, "batches": self.batches, "global_batch_size": self.global_batch_size}

    def epoch(self, step: int) -> int:
        """Completed passes over the loader before a step."""
        return step * self.accumulation // self.batches

    def _caches(self) -> dict[int, DatasetCache]:
        if isinstance(self.cache, MultiSourceCache):
            return self.cache.caches
        return {0: self.cache} if self.cache else {}

    @property
    def requested(self) -> dict[str, float]:
        """The share of each cache in the samples."""
        caches = self._caches()
        names = [cache.name for cache in caches.values()]
        total = sum(map(len, caches.values()))
        return {
            cache.name if names.count(cache.name) == 1 else f"{cache.name}-{i}": len(cache) / total
            for i, cache in caches.items()
        }

    def counts(self) -> dict[str, int]:
        """Number of samples returned from each cache, and zeros for counters that only a stream has."""
        samples = {f"samples/{name}": n for name, n in self.taken.items()}
        others = ("bad_samples", "replaced_samples", "late_shards", "cache_hits", "fetched_bytes")
        return samples | dict.fromkeys(others, 0)

    def passes(self, step: int) -> list[float]:
        """Passes over each cache before a step."""
        return [step * self.accumulation / self.batches] * len(self.requested)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.position // self.accumulation}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["step"] * self.accumulation

    def _epoch_batches(self, epoch: int) -> Iterator[dict]:
        """The loader's batches of an epoch, in the order keyed by (seed, epoch)."""
        own = self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler
        sampler = getattr(own, "sampler", own)
        if hasattr(sampler, "generator"):
            sampler.generator = torch.Generator().manual_seed(rng.key(self.seed, "epoch", epoch) >> 1)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        yield from self.loader

    def __iter__(self) -> Iterator[Batch]:
        names = list(self.requested)
        while True:
            epoch, done = divmod(self.position, self.batches)
            for i, batch in enumerate(self._epoch_batches(epoch)):
                if i < done:
                    continue
                step, part = divmod(self.position, self.accumulation)
                slots = np.arange(len(batch["latents"])) + part * (self.global_batch_size // self.accumulation)
                source = self.collate.source_index(batch["dataset_ids"])
                pairs = zip(batch["dataset_ids"].tolist(), batch["local_indices"].tolist(), strict=True)
                raw = batch | {
                    "sample_seeds": torch.from_numpy(rng.sample_seeds(self.seed, step, slots)),
                    "slots": torch.from_numpy(slots),
                    "step": step,
                    "source_index": source,
                    "keys": [sample_key(*pair) for pair in pairs],
                }
                for k, name in enumerate(names):
                    self.taken[name] += int((source == k).sum())
                self.position += 1
                yield self.collate(raw)
            if self.position < (epoch + 1) * self.batches:
                end = self.position - epoch * self.batches
                raise RuntimeError(f"the DataLoader gave {end} batches in an epoch, its length is {self.batches}")
