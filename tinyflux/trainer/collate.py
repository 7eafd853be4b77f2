"""Stored samples -> a training batch: timesteps, teacher features at these timesteps, text dropout."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tinyflux.shards.format import bits
from tinyflux.shards.schema import EXTRAS, GROUP_OF, SCHEMA
from tinyflux.shards.stream import Stream
from tinyflux.trainer import terms
from tinyflux.trainer.batches import Batch
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.schedules import keyed_timesteps, shape_timesteps
from tinyflux.util import rng
from tinyflux.util.buckets import between, locate
from tinyflux.util.log import say

VALIDATION_TIMESTEPS = 8
KEPT = 1 << 30  # bytes of validation batches that a rank keeps in memory
ALONE = 1 << 15  # up to this many elements, torch works in the calling thread
COPIED = ("latents", "t5_embeds", "clip_pooled", "local_indices", "dataset_ids", "sample_seeds", "keys")


class StreamCollate:
    """Collate function of the shard stream: raw batch -> `Batch`. Every draw is keyed by the sample's seed.

    nulls: for each source, `t5_embeds` [L, D] and `clip_pooled` [D] of the empty prompt. grids: the timesteps of each
    group that has some.
    """

    def __init__(
        self,
        config: TrainerConfig,
        nulls: list[dict[str, Tensor]],
        grids: dict[str, tuple[float, ...]],
        *,
        global_batch_size: int,
        seed: int,
    ):
        self.config = config
        self.global_batch_size, self.seed = global_batch_size, seed
        self.terms = terms.enabled(config)
        self.grids, self.points = grids, {grid: torch.tensor(grid) for grid in grids.values()}
        self.null_t5 = torch.stack([null["t5_embeds"] for null in nulls])
        self.null_clip = torch.stack([null["clip_pooled"] for null in nulls])
        self.distribution = {
            "shift": config.shift,
            "logit_normal": config.logit_normal_sampling,
            "mean": config.logit_mean,
            "std": config.logit_std,
        }

    def timesteps(self, seeds: Tensor, step: int, slots: Tensor) -> Tensor:
        """Training timesteps [B] of the samples in these slots of a step's global batch."""
        strata = None
        if self.config.stratified_sampling:
            strata = torch.from_numpy(rng.permutation(self.global_batch_size, self.seed, "strata", step))[slots]
        return keyed_timesteps(seeds, strata, self.global_batch_size, **self.distribution)

    def features(self, raw: dict, t: Tensor) -> dict[str, Tensor]:
        """The teacher features that the terms use; those on the timestep grid are interpolated at t."""
        places, found = {grid: locate(t, points) for grid, points in self.points.items()}, {}
        for name, stored in (pair for term in self.terms for pair in term.fields.items()):
            grid = self.grids.get(GROUP_OF[stored])
            found[name] = raw[stored].float() if grid is None else self._between(raw[stored], *places[grid])
        return found

    def _between(self, features: Tensor, low: Tensor, weight: Tensor) -> Tensor:
        """Features [B, K, ...] between two buckets each, a few samples at a time, so that torch stays in this thread:
        thread synchronisation costs more than it saves."""
        rows = max(1, ALONE // max(1, features[0, 0].numel()))
        parts = zip(features.split(rows), low.split(rows), weight.split(rows), strict=True)
        return torch.cat([between(*part) for part in parts])

    def at(self, raw: dict, t: Tensor) -> Batch:
        """The batch at the given timesteps [B], without text dropout."""
        others = [group for group in EXTRAS if group != "mask"]
        names = [*COPIED, "valid", *(name for group in others for name in SCHEMA[group].fields)]
        names += [f"{group}_mask" for group in (*others, *(term.group for term in self.terms if term.group))]
        batch = {name: raw[name] for name in names if name in raw}
        return {**batch, "masks": self.masks(raw), "t": t, **self.features(raw, t)}

    def masks(self, raw: dict) -> Tensor | None:
        """Masks float32 [B, H, W], NaN for samples without a mask; None if no source has masks."""
        if "mask" not in raw:
            return raw.get("masks")
        masks = raw["mask"].float()
        return masks if "mask_mask" not in raw else masks.masked_fill(~raw["mask_mask"][:, None, None], math.nan)

    def __call__(self, raw: dict) -> Batch:
        seeds, source = raw["sample_seeds"], raw["source_index"]
        batch = self.at(raw, self.timesteps(seeds, raw["step"], raw["slots"]))
        drop = rng.uniform(seeds, "text_dropout") < self.config.text_dropout
        for name, null in (("t5_embeds", self.null_t5), ("clip_pooled", self.null_clip)):
            # in place because the text is most of the batch, with numpy because it stays in this thread
            bits(batch[name])[drop.numpy()] = bits(null.to(batch[name].dtype))[source[drop].numpy()]
        return batch


class HeldOut:
    """Batches of a stream's held-out samples, each at VALIDATION_TIMESTEPS fixed timesteps that cover the training
    distribution evenly. The samples are always the same, on any number of ranks. `valid` bool [B]: which rows count.

    Up to KEPT bytes are kept in memory, pinned for a GPU. With a remote source all batches are kept, because otherwise
    each validation might download shards again. The next batch is read while one is used.
    Raises ValueError if no sample is held out: the loss would always be 0, and thus the best.
    """

    def __init__(self, stream: Stream, collate: StreamCollate, samples: int, device: torch.device | str = "cpu"):
        if not stream.held_out:
            raise ValueError(
                f"data.val_fraction is {stream.config.val_fraction}, which holds out none of the {stream.plan.total:,}"
                " samples: raise it, or set it to 0 for no validation"
            )
        self.most = math.inf if stream.remote else KEPT
        if stream.remote and (found := stream.validated(samples)) < min(samples, stream.held_out):
            say(
                f"WARNING: validation uses {found:,} of the {stream.held_out:,} held-out samples: to limit downloads,"
                " it reads only a part of each remote source's shards; raise data.val_fraction for more"
            )
        self.stream, self.collate, self.samples = stream, collate, samples
        self.pins = torch.device(device).type == "cuda"
        self.kept: list[dict] = []
        self.complete = False  # whether `kept` has all batches
        u = (torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS
        self.timesteps = shape_timesteps(u, **collate.distribution)

    def __iter__(self) -> Iterator[Batch]:
        for raw in self.kept if self.complete else self._read():
            for t in self.timesteps:
                yield self.collate.at(raw, t.expand(len(raw["keys"])))

    def _read(self) -> Iterator[dict]:
        """The raw batches; a thread reads one ahead."""
        batches = self.stream.validation(self.stream.config.micro_batch_size, samples=self.samples)
        self.kept, size = [], 0
        with ThreadPoolExecutor(1, "validation") as thread:
            coming = thread.submit(next, batches, None)
            while (raw := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                if self.pins:
                    raw = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in raw.items()}
                size += sum(v.nbytes for v in raw.values() if isinstance(v, Tensor))
                self.kept.append(raw)
                if size > self.most:
                    self.kept.clear()
                yield raw
        self.complete = size <= self.most
