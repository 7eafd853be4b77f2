"""Load samples of a run's sources into batches; find held-out samples, and replace bad ones."""

import itertools
import logging
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from tinyflux.shards.config import DataConfig
from tinyflux.shards.decode import CHUNK, decode_chunk
from tinyflux.shards.format import ShardError, bits
from tinyflux.shards.lookahead import LookAhead
from tinyflux.shards.opened import OpenShards
from tinyflux.shards.plan import Draws, Plan, PlanSource, Shape, split
from tinyflux.shards.schema import DTYPES, Field, fields_at
from tinyflux.shards.shardfile import ShardFile
from tinyflux.shards.source import Source
from tinyflux.util import rng
from tinyflux.util.cli import Failed

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_BAD_IN_A_ROW = 20
_HASHED = 1 << 18  # origins to split at a time


@dataclass
class StreamStats:
    """Counters of one rank's stream. `samples`: delivered per source; `bad`: different bad samples;
    `replaced`: replacements of bad samples; `wait` and `last_wait`: seconds that the consumer waited."""

    samples: list[int]
    bad: int = 0
    replaced: int = 0
    wait: float = 0.0
    last_wait: float = 0.0


class BadSamples(Failed):
    """Too many bad samples to continue; each is in the log."""


class _Buffers:
    """Memory of batches, reused when nothing refers to it: touching fresh pages costs more than decoding."""

    def __init__(self, keep: int):
        self.keep, self._free = keep, defaultdict(list)

    def new(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]; it is reused when no reference to it or a view of it is left."""
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


@dataclass(eq=False)
class MicroBatch:
    """A raw batch that is being filled.

    rows: its tensors as `bits`. source, shard, row, position: the sample for each row, lists of int; `row` counts all
    rows of the shard's file. good: which rows have a sample. draws: of the plan, if bad samples are to be replaced.
    ahead: the look-ahead for remote shards, if any. When it is `done`, it has a `result` or an `error`.
    """

    batch: dict[str, Any]
    rows: dict[str, np.ndarray]
    source: list[int]
    shard: list[int]
    row: list[int]
    position: list[int]
    captions: list[int]
    good: list[bool]
    draws: Draws | None = None
    ahead: LookAhead | None = None
    parts_left: int = 0
    done: bool = False
    error: BaseException | None = None
    result: tuple[list[int], Any] | None = None


class Reader:
    """Loads samples into batches; shared by the threads of a stream. ranks: number of ranks of the run."""

    def __init__(self, sources: list[Source], config: DataConfig, ranks: int = 1):
        self.sources, self.config = sources, config
        self.buffers = _Buffers(keep=config.prefetch + config.threads + 2)
        self.stats = StreamStats([0] * len(sources))
        self.fields: dict[str, Field] = {name: f for source in sources for name, f in source.fields.items()}
        wanted = {group for source in sources for group in source.groups}
        self.partial = sorted(group for group in wanted if not all(group in source.groups for source in sources))
        self._ids = np.array([source.dataset_id for source in sources])
        self._has = {g: np.array([g in source.groups for source in sources]) for g in self.partial}
        plan_sources = []
        for source in sources:
            index = source.manifest.index
            sizes = index.samples - _held_out_counts(source, config.val_fraction)
            plan_sources.append(PlanSource(source.name, source.dataset_id, sizes, source.shapes, index.shape))
        self.plan = Plan(
            plan_sources,
            config.weights or [source.total for source in plan_sources],
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            unit=config.unit_size,
            slots_per_stream=config.slots_per_stream,
            resample=config.resample,
            weights_at=config.stretches,
        )
        self.shards = OpenShards(sources, self._open_limit(ranks))
        self.reading: dict[int, tuple[int, int]] = {}  # thread -> the source and shard that it is reading
        self.progress = time.monotonic()
        self._lock = threading.Lock()
        self._bad: set[tuple[int, int]] = set()
        self._training: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _open_limit(self, ranks: int) -> int:
        """Number of shards to keep open: config.open_shards, or the number of a rank's lanes if that is larger."""
        lanes = -(-sum(self.plan.lanes.values()) // ranks) + len(self.plan.lanes) + self.config.threads
        files = max(len(source.layers) for source in self.sources)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // files  # the process needs other files too
        return max(self.config.open_shards, min(lanes, most))

    def locate(self, draws: Draws) -> np.ndarray:
        """Each draw's row in its shard's file, int64 [n]; the plan does not count held-out rows."""
        if not self.config.val_fraction:
            return draws.row
        pairs = zip(draws.source.tolist(), draws.shard.tolist(), draws.row.tolist(), strict=True)
        return np.array([self._training_rows(source, shard)[row] for source, shard, row in pairs], np.int64)

    def _training_rows(self, source: int, shard: int) -> np.ndarray:
        """The rows of a shard that are not held out."""
        with self._lock:
            rows = self._training.pop((source, shard), None)
            if rows is None:
                entry = self.sources[source].manifest.shards[shard]
                held_out = split(entry.origins, self.sources[source].name, self.config.val_fraction)
                rows = np.flatnonzero(~held_out).astype(np.int32)
            self._training[source, shard] = rows
            while len(self._training) > self.shards.limit:
                self._training.popitem(last=False)
        return rows

    def held_out(self, source: int) -> np.ndarray:
        """Positions of the held-out samples in a source, ascending; int64."""
        parts = _held_out(self.sources[source], self.config.val_fraction, lambda places: places)
        return np.concatenate([np.empty(0, np.int64), *parts])

    def new_batch(
        self,
        shape: Shape,
        source: np.ndarray,
        shard: np.ndarray,
        row: np.ndarray,
        *,
        seeds: np.ndarray,
        slots: np.ndarray,
        step: int,
        draws: Draws | None = None,
        ahead: LookAhead | None = None,
    ) -> MicroBatch:
        """An empty batch for these samples, all of one latent shape."""
        B, fields = len(source), fields_at(self.fields, shape)
        offsets = list(itertools.accumulate((B * f.nbytes + 63 & -64 for f in fields.values()), initial=0))
        memory = self.buffers.new(offsets[-1])
        tensors = {
            name: memory[offset : offset + B * f.nbytes].view(DTYPES[f.dtype]).view(B, *f.shape)
            for offset, (name, f) in zip(offsets, fields.items(), strict=False)
        }
        position, counts = np.empty(B, np.int64), np.empty(B, np.int64)
        for s in np.unique(source).tolist():
            mine = source == s
            position[mine] = self.sources[s].manifest.starts[shard[mine]] + row[mine]
            counts[mine] = self.sources[s].captions[position[mine]]
        batch: dict[str, Any] = {
            **tensors,
            "source_index": torch.from_numpy(source),
            "dataset_ids": torch.from_numpy(self._ids[source]),
            "local_indices": torch.from_numpy(position),
            "sample_seeds": torch.from_numpy(seeds),
            "slots": torch.from_numpy(slots),
            "step": step,
            "keys": [""] * B,
        }
        for group, has in self._has.items():
            batch[f"{group}_mask"] = torch.from_numpy(has[source])
        samples = (x.tolist() for x in (source, shard, row, position, caption_of(seeds, counts)))
        return MicroBatch(batch, {name: bits(t) for name, t in tensors.items()}, *samples, [True] * B, draws, ahead)

    def load(self, micro: MicroBatch, part: range, stopped: Callable[[], bool] = lambda: False) -> None:
        """Load a part of a batch. A bad sample is replaced, or, without `draws`, marked in `good`.

        Raises ShardError or OSError if a whole shard cannot be used, BadSamples.
        """
        for first in range(part.start, part.stop, CHUNK):
            if stopped():
                return
            rows = range(first, min(first + CHUNK, part.stop))
            opened: dict[tuple[int, int], ShardFile] = {}
            for i in rows:  # samples of a lane follow each other
                if (pair := (micro.source[i], micro.shard[i])) not in opened:
                    opened[pair] = self._open(micro, *pair)
            files = [opened[micro.source[i], micro.shard[i]] for i in rows]
            out = {name: values[rows.start : rows.stop] for name, values in micro.rows.items()}
            chosen = slice(rows.start, rows.stop)
            good = decode_chunk(files, micro.row[chosen], micro.captions[chosen], out).tolist()
            for i, file, fine in zip(rows, files, good, strict=True):
                if fine:
                    micro.batch["keys"][i] = file.samples[micro.row[i]].key
                else:
                    self._repair(micro, i)
            self.progress = time.monotonic()

    def _open(self, micro: MicroBatch, source: int, shard: int) -> ShardFile:
        self.reading[threading.get_ident()] = source, shard
        self.progress = time.monotonic()
        return self.shards.get(source, shard, micro.ahead)

    def _repair(self, micro: MicroBatch, i: int) -> None:
        """Load row i again to find its fault; if it is bad, load a replacement."""
        source = micro.source[i]
        if self._decode(micro, i, micro.shard[i], micro.row[i], micro.captions[i]):
            return
        if micro.draws is None:
            micro.good[i] = False
            for values in micro.rows.values():
                values[i] = 0
            return
        tries = 1
        for shard, row in itertools.islice(self.plan.replacements(micro.draws, i), MAX_BAD_IN_A_ROW - 1):
            tries += 1
            if self.config.val_fraction:
                row = int(self._training_rows(source, shard)[row])
            manifest = self.sources[source].manifest
            count = self.sources[source].captions[int(manifest.starts[shard]) + row]
            caption = int(caption_of(micro.batch["sample_seeds"].numpy()[i : i + 1], np.array([count]))[0])
            if self._decode(micro, i, shard, row, caption):
                with self._lock:
                    self.stats.replaced += 1
                return
        shard = self.sources[source].manifest.shards[micro.shard[i]]
        raise BadSamples(f"{shard.name} of {self.sources[source].url}: {tries} bad samples in a row, see the log")

    def _decode(self, micro: MicroBatch, i: int, shard: int, row: int, caption: int) -> bool:
        """Put a sample into row i, or log and count it as bad. Returns whether it is good."""
        source = micro.source[i]
        position = int(self.sources[source].manifest.starts[shard]) + row
        while True:
            file = self._open(micro, source, shard)
            try:
                file.decode(row, {name: values[i] for name, values in micro.rows.items()}, caption=caption)
                break
            except ShardError as error:
                if not self.shards.heal(source, shard, file):
                    self._count_bad(source, position, error)
                    return False
        for name in micro.rows.keys() - self.sources[source].fields.keys():
            micro.rows[name][i] = 0
        micro.batch["keys"][i] = file.key(row)
        micro.batch["local_indices"][i] = position
        return True

    def _count_bad(self, source: int, position: int, error: ShardError) -> None:
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


def caption_of(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The drawn caption of each sample, int64 [n]: one of its `counts` captions, keyed by its seed."""
    draws = rng.splitmix64(seeds.view(np.uint64) ^ np.uint64(rng.key("caption")))
    return (draws % np.maximum(counts, 1).astype(np.uint64)).astype(np.int64)


def _held_out(source: Source, val_fraction: float, found: Callable[[np.ndarray], T]) -> Iterator[T]:
    """The results of `found` for the positions of each block's held-out samples, in order; threads read the blocks."""
    origins = source.manifest.index.origins if val_fraction else ()

    def block(first: int) -> T:
        return found(first + np.flatnonzero(split(origins[first : first + _HASHED], source.name, val_fraction)))

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        yield from pool.map(block, range(0, len(origins), _HASHED))


def _held_out_counts(source: Source, val_fraction: float) -> np.ndarray:
    """Number of held-out samples in each shard; int [shards]."""
    starts = source.manifest.starts
    counts = np.zeros(len(starts), np.int64)

    def of_shards(places: np.ndarray) -> tuple[int, np.ndarray]:
        shards = np.searchsorted(starts, places, side="right") - 1
        first = int(shards[0]) if len(shards) else 0
        return first, np.bincount(shards - first)

    for first, found in _held_out(source, val_fraction, of_shards):
        counts[first : first + len(found)] += found
    return counts
