"""Samples of a run's sources into batches: which are trained on, where they lie, what stands in for a bad one."""

import itertools
import logging
import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinyflux.shards.config import DataConfig
from tinyflux.shards.format import ShardError, bits
from tinyflux.shards.plan import Draws, Plan, PlanSource, split
from tinyflux.shards.schema import DTYPES, fields_at
from tinyflux.shards.source import Source
from tinyflux.shards.store import OpenShards

log = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 20


@dataclass
class StreamStats:
    """Counters of one rank's stream. `samples`: delivered per source; `bad`: different bad samples seen;
    `replaced`: samples delivered in place of a bad one; `late`: remote shards that were not in the cache when they were
    wanted; `wait` and `last_wait`: seconds that the consumer waited."""

    samples: list[int]
    bad: int = 0
    replaced: int = 0
    late: int = 0
    wait: float = 0.0
    last_wait: float = 0.0


class BadSamples(RuntimeError):
    """Too many bad samples to go on; the log names each."""


class _Buffers:
    """Memory of batches, used again once nothing refers to it: first touching fresh pages costs more than decoding."""

    def __init__(self, keep: int):
        self.keep, self._free = keep, defaultdict(list)

    def new(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] that belongs to whoever holds it or a view of it."""
        free = self._free[nbytes]
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(nbytes, dtype=torch.uint8)
        lease = memory.numpy()  # a new array object each time; the storage of from_numpy keeps it alive
        weakref.finalize(lease, self._take_back, free, memory).atexit = False
        return torch.from_numpy(lease)

    def _take_back(self, free: list[torch.Tensor], memory: torch.Tensor) -> None:
        if len(free) < self.keep:
            free.append(memory)


class Reader:
    """Samples of the sources into batches; shared by the threads of a stream."""

    def __init__(self, sources: list[Source], config: DataConfig):
        self.sources, self.config = sources, config
        self.shards = OpenShards(sources, config.open_shards)
        self.buffers = _Buffers(keep=config.prefetch + config.threads + 2)
        self.stats = StreamStats([0] * len(sources))
        shapes = sorted({shape for source in sources for shape in source.shapes})
        if len(shapes) != 1:
            raise ValueError(f"the sources have the latent shapes {shapes}, a run takes one")
        self.fields = fields_at({name: f for source in sources for name, f in source.fields.items()}, shapes[0])
        self.groups = {name: group for source in sources for name, group in source.groups.items()}
        self.partial = sorted(g for g in self.groups if not all(g in source.groups for source in sources))
        # positions in the source of the samples to train on and of those held out, in manifest order
        self.train, self.held_out, plan_sources = [], [], []
        for source in sources:
            mask = split(source.manifest.index.origins, source.name, config.val_fraction)
            self.train.append(np.flatnonzero(~mask))
            self.held_out.append(np.flatnonzero(mask))
            sizes = np.diff(np.searchsorted(self.train[-1], [*source.manifest.starts, source.manifest.count]))
            plan_sources.append(PlanSource(source.name, source.dataset_id, sizes))
        self.train_starts = [np.cumsum(source.sizes) - source.sizes for source in plan_sources]
        self.plan = Plan(
            plan_sources,
            config.weights or [source.total for source in plan_sources],
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            slots_per_stream=config.slots_per_stream,
            resample=config.resample,
        )
        self._lock = threading.Lock()
        self._bad: set[tuple[int, int]] = set()

    def new_batch(self, source_index: np.ndarray, seeds: np.ndarray, slots: np.ndarray, step: int):
        """An empty raw batch, and the rows of integers that its samples are decoded into."""
        B = len(source_index)
        offsets = np.cumsum([0, *(B * f.nbytes + 63 & -64 for f in self.fields.values())]).tolist()
        memory = self.buffers.new(offsets[-1])
        tensors = {
            name: memory[offset : offset + B * f.nbytes].view(DTYPES[f.dtype]).view(B, *f.shape)
            for offset, (name, f) in zip(offsets, self.fields.items(), strict=False)
        }
        ids = np.array([source.dataset_id for source in self.sources])
        batch: dict[str, Any] = {
            **tensors,
            "source_index": torch.from_numpy(source_index),
            "dataset_ids": torch.from_numpy(ids[source_index]),
            "local_indices": torch.zeros(B, dtype=torch.int64),
            "sample_seeds": torch.from_numpy(seeds),
            "slots": torch.from_numpy(slots),
            "step": step,
            "keys": [""] * B,
        }
        for group in self.partial:
            has = np.array([group in source.groups for source in self.sources])
            batch[f"{group}_mask"] = torch.from_numpy(has[source_index])
        return batch, {name: bits(tensor) for name, tensor in tensors.items()}

    def decode(self, batch: dict[str, Any], rows: dict[str, np.ndarray], i: int, source: int, position: int) -> bool:
        """Put the sample at a position of a source into row i; whether it was a good one.

        Raises ShardError or OSError where the shard cannot be used at all, BadSamples behind max_bad_samples.
        """
        shard, row = self.sources[source].manifest.locate(position)
        file = self.shards.get(source, shard)
        try:
            file.decode(row, {name: values[i] for name, values in rows.items()})
        except ShardError as error:
            self.count_bad(source, position, error)
            return False
        for group in self.partial:
            if group not in self.sources[source].groups:
                for name in self.groups[group].fields:
                    rows[name][i] = 0
        batch["keys"][i] = file.key(row)
        batch["local_indices"][i] = position
        return True

    def load(self, batch: dict[str, Any], rows: dict[str, np.ndarray], draws: Draws, i: int) -> None:
        """Put draw i into row i, or where it is bad the next good row of its shard's order. Raises as `decode`."""
        source, shard = int(draws.source[i]), int(draws.shard[i])
        candidates = itertools.chain([int(draws.row[i])], self.plan.replacements(draws, i))
        for tries, row in enumerate(itertools.islice(candidates, MAX_BAD_IN_A_ROW)):
            position = int(self.train[source][self.train_starts[source][shard] + row])
            if self.decode(batch, rows, i, source, position):
                with self._lock:
                    self.stats.replaced += tries > 0
                return
        name = self.sources[source].manifest.shards[shard].name
        raise BadSamples(f"{name} of {self.sources[source].url}: {tries + 1} bad samples in a row: see the log")

    def count_bad(self, source: int, position: int, error: ShardError) -> None:
        """Log and count a bad sample, once."""
        with self._lock:
            if (source, position) in self._bad:
                return
            self._bad.add((source, position))
            self.stats.bad = len(self._bad)
        log.warning("bad sample: %s", error)
        if self.stats.bad > self.config.max_bad_samples:
            limit = self.config.max_bad_samples
            raise BadSamples(f"more than data.max_bad_samples = {limit} bad samples, the last: {error}")
