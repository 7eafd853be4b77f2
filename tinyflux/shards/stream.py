"""Plan -> load -> collate -> pin -> prefetch: the batches of a run, from its step number alone.

The only file that knows torchdata. Threads, not worker processes: zstd and memcpy release the GIL, and samples are
decoded straight into the batch's tensors. A batch's memory is used again once nothing refers to it, so a consumer may
keep it as long as it likes.
"""

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torchdata import nodes

from tinyflux.shards.config import DataConfig, open_sources
from tinyflux.shards.format import ShardError
from tinyflux.shards.lookahead import LookAhead
from tinyflux.shards.plan import Plan
from tinyflux.shards.reader import BadSamples, Reader, StreamStats
from tinyflux.shards.remote import RemoteStore, Stopped
from tinyflux.shards.schema import Field
from tinyflux.shards.source import Source
from tinyflux.util import rng

__all__ = ["BadSamples", "DataConfig", "Stream", "StreamStats", "open_sources"]

log = logging.getLogger(__name__)

_CHUNK = 8  # samples a thread takes at a time: enough to hide the queues, few enough to spread a batch over threads


class _Pipeline:
    """The threads of a stream, from one position on."""

    def __init__(
        self,
        reader: Reader,
        rank: int,
        world: int,
        position: int,
        collate: Callable | None,
        pin: bool,
        ranks_on_node: int,
        end_step: int | None,
    ):
        self.reader, self.rank, self.world, self.collate = reader, rank, world, collate
        self.stopped, self._change = False, threading.Condition()
        self._busy: dict[int, tuple[int, int] | None] = {}  # thread -> source and shard that it reads, if it does
        self.end = float("inf") if end_step is None else end_step * reader.config.accumulation(world)
        self.ahead, self.progress = None, time.monotonic()
        self.patience = 1.1 * reader.config.timeout + 0.5  # after a download's own: that one says more
        if limits := [s.store.cache.limit for s in reader.sources if isinstance(s.store, RemoteStore)]:
            step, options = position // reader.config.accumulation(world), {"timeout": reader.config.timeout}
            options |= {"budget": min(limits) // ranks_on_node, "stats": reader.stats}
            options |= {"end_step": end_step}
            self.ahead = LookAhead(reader.sources, reader.plan, rank, world, step, **options)
            reader.shards.ahead = self.ahead
        # the nodes' own snapshots are off: the plan is sought, nothing is replayed
        node = _Node(self.chunks(position))
        node = nodes.ParallelMapper(node, self.load, num_workers=reader.config.threads, snapshot_frequency=0)
        node = _Node(self.assemble(node))
        if pin:
            node = nodes.PinMemory(node, snapshot_frequency=0)
        self.root = nodes.Prefetcher(node, reader.config.prefetch, snapshot_frequency=0)
        # torchdata waits without end: a thread that nobody has to wait for does it
        self._asked: queue.SimpleQueue[Future | None] = queue.SimpleQueue()
        self._answers = threading.Thread(target=_answer, args=(self.root, self._asked), daemon=True)
        self._answers.start()

    def chunks(self, position: int) -> Iterator[tuple]:
        """The micro-batches of the rank, each allocated here and cut into chunks for the threads."""
        config = self.reader.config
        B, accumulation = config.micro_batch_size, config.accumulation(self.world)
        draws, step = None, -1
        while not self.stopped and position < self.end:
            with self._working():
                if position // accumulation != step:
                    step = position // accumulation
                    draws = self.reader.plan.batch(step)
                first = self.rank * (len(draws) // self.world) + position % accumulation * B
                mine, slots = draws[first : first + B], np.arange(first, first + B)
                seeds = rng.sample_seeds(config.seed, step, slots)
                batch, rows = self.reader.new_batch(mine.source, seeds, slots, step)
            for i in range(0, B, _CHUNK):
                yield batch, rows, mine, range(i, min(i + _CHUNK, B))
            position += 1

    def load(self, chunk: tuple) -> tuple[dict | Exception, bool]:
        """Fill a chunk's rows; gives (batch, whether this was its last chunk), or (what went wrong, True)."""
        batch, rows, draws, part = chunk
        with self._working():
            try:
                for i in part:
                    if not self.stopped:
                        self._busy[threading.get_ident()] = int(draws.source[i]), int(draws.shard[i])
                        self.reader.load(batch, rows, draws, i)
                        self.progress = time.monotonic()
            except (ShardError, BadSamples, OSError, Stopped) as error:  # as a value it reaches the consumer as it is
                return error, True
        return batch, part.stop == len(draws)

    def assemble(self, loaded: Iterator) -> Iterator[tuple[list[int], Any]]:
        """(samples of each source, collated batch) from the loaded chunks, which come in order."""
        for batch, whole in loaded:
            if isinstance(batch, Exception):
                yield [], batch
                return
            if whole:
                with self._working():
                    counts = torch.bincount(batch["source_index"], minlength=len(self.reader.sources)).tolist()
                    if self.ahead is not None:
                        self.ahead.advance(batch["step"])
                    if self.collate is not None:
                        batch = self.collate(batch)
                yield counts, batch

    def next(self) -> tuple[list[int], Any]:
        """The next batch with its samples of each source. Raises what went wrong in a thread, and TimeoutError."""
        future: Future = Future()
        self._asked.put(future)
        began = time.monotonic()
        while not future.done():
            left = max(began, self.progress) + self.patience - time.monotonic()
            if left <= 0:
                sources, reading = self.reader.sources, {what for what in self._busy.values() if what}
                files = sorted(f"{sources[s].url}/{sources[s].manifest.shards.name(shard)}" for s, shard in reading)
                what = f"being read: {', '.join(files) or 'nothing'}"
                raise TimeoutError(f"no sample came for {self.patience:g} s (data.timeout); {what}")
            wait([future], timeout=left)
        counts, batch = future.result()
        if isinstance(batch, Exception):
            raise batch
        return counts, batch

    @contextmanager
    def _working(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._change:
            self._busy[me] = None
        try:
            yield
        finally:
            with self._change:
                self._busy.pop(me, None)
                self._change.notify_all()

    def close(self) -> None:
        """End the threads: returns once none is at work; they leave on their own then."""
        self.stopped, self.root = True, None
        self._asked.put(None)
        if self.ahead is not None:
            self.ahead.stop()
            self.reader.shards.ahead = None
        me = {threading.get_ident()}  # a worker may be the one that collects a forgotten stream
        with self._change:
            if not self._change.wait_for(lambda: self._busy.keys() <= me, timeout=min(30, self.patience)):
                log.warning("a thread of the stream is still reading; it is left behind")
        if self._answers is not threading.current_thread():
            self._answers.join(timeout=min(5, self.patience))


def _answer(root: Iterator, asked: "queue.SimpleQueue[Future | None]") -> None:
    """Give each future that is asked for the next item, or the error in its place."""
    while (future := asked.get()) is not None:
        try:
            future.set_result(next(root))
        except Exception as error:  # noqa: BLE001  the consumer raises it
            future.set_exception(error)
        del future  # it holds the batch, or the consumer's frames


class _Node(nodes.BaseNode):
    """An iterator as a node; its state is the stream's step."""

    def __init__(self, items: Iterator):
        super().__init__()
        self.items = items

    def next(self):
        return next(self.items)

    def get_state(self) -> dict:
        return {}


class Stream:
    """The micro-batches of one rank, in order, from `start_step` on and before `end_step`, or without end.

    sources: of `open_sources`. collate: raw batch -> batch, called in a thread of the stream (default: the raw batch).
    device: where the batches go next; they are pinned for "cuda". ranks_on_node: how many share the cache of remote
    sources: each fetches ahead into its part. A raw batch has
      latents [B,C,H,W], t5_embeds [B,L,D], clip_pooled [B,D] and, as far as the sources have them, lune [B,K,D],
      sol_stats [B,K,3], sol_spatial [B,K,8,8], all in the stored dtype;
      lune_mask, sol_mask bool [B] only where some source lacks that group (its rows are zero);
      source_index, dataset_ids, local_indices, sample_seeds, slots int64 [B]; keys list[str]; step int.
    Iterating raises what went wrong in a thread, with shard and key; calling next again then tries the same batch.
    """

    def __init__(
        self,
        sources: list[Source],
        config: DataConfig,
        rank: int = 0,
        world: int = 1,
        collate: Callable[[dict[str, Any]], Any] | None = None,
        start_step: int = 0,
        device: str | torch.device = "cpu",
        ranks_on_node: int = 1,
        end_step: int | None = None,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} ranks")
        self.sources, self.config, self.rank, self.world = sources, config, rank, world
        self.accumulation = config.accumulation(world)
        self._options = (collate, torch.device(device).type == "cuda", ranks_on_node, end_step)
        self._reader = Reader(sources, config)
        self._position = start_step * self.accumulation  # micro-batches handed out since step 0
        self._pipeline: _Pipeline | None = None

    @property
    def plan(self) -> Plan:
        return self._reader.plan

    @property
    def fields(self) -> dict[str, Field]:
        """Dtype and shape of the tensors that are read."""
        return self._reader.fields

    @property
    def stats(self) -> StreamStats:
        return self._reader.stats

    def counts(self) -> dict[str, int]:
        """What this stream did so far, to be summed over ranks: `samples/NAME` delivered of each source,
        `bad_samples`, `replaced_samples`, and of remote shards `late_shards` that a reader had to wait for,
        `cache_hits` that it found in the cache, `fetched_bytes`."""
        stats, caches = self.stats, {s.store.cache for s in self.sources if isinstance(s.store, RemoteStore)}
        counts = {f"samples/{name}": n for name, n in zip(self.requested, stats.samples, strict=True)}
        counts |= {"bad_samples": stats.bad, "replaced_samples": stats.replaced, "late_shards": stats.late}
        counts["cache_hits"] = max(0, self._reader.shards.opened - stats.late)
        return counts | {"fetched_bytes": sum(cache.fetched for cache in caches)}

    @property
    def labels(self) -> list[str]:
        """The sources' names, with the dataset id where two have the same."""
        names = [source.name for source in self.sources]
        return [s.name if names.count(s.name) == 1 else f"{s.name}-{s.dataset_id}" for s in self.sources]

    @property
    def requested(self) -> dict[str, float]:
        """The share of each source in a batch that the weights ask for."""
        return dict(zip(self.labels, self.plan.weights, strict=True))

    def epoch(self, step: int) -> int:
        """How often all samples were gone through before a step."""
        return self.plan.epoch(step)

    def passes(self, step: int) -> list[float]:
        """How often each source was gone through before a step, on all ranks together."""
        taken = zip(self.plan.start(step), self.plan.sources, strict=True)
        return [samples / source.total for samples, source in taken]

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._position // self.accumulation

    def state_dict(self) -> dict[str, int]:
        """The position between steps; a step that was handed out in part begins again."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self._position = state["step"] * self.accumulation

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        if self._pipeline is None:
            self._pipeline = _Pipeline(self._reader, self.rank, self.world, self._position, *self._options)
            # also when the stream is forgotten, and before the interpreter ends: threads in C++ must not outlive it
            self._shut_down = weakref.finalize(self, self._pipeline.close)
        began = time.perf_counter()
        done = False
        try:
            counts, batch = self._pipeline.next()
            done = True
        finally:
            if not done:
                self.close()
        self.stats.last_wait = time.perf_counter() - began
        self.stats.wait += self.stats.last_wait
        self.stats.samples = [a + b for a, b in zip(self.stats.samples, counts, strict=True)]
        self._position += 1
        return batch

    def close(self) -> None:
        """Stop the threads and drop what was loaded ahead. The stream may be iterated again, from where it was."""
        if self._pipeline is not None:
            self._pipeline = None
            self._shut_down()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def validation(self, batch_size: int, rank: int | None = None, world: int | None = None) -> Iterator[dict]:
        """Raw batches of this rank's part of the held-out samples: the same samples, seeds and order every time.

        Every rank gets equally many batches of equal size: `valid` bool [B] is False in rows that only fill up the
        last ones (they repeat a sample) and in rows that are bad (zero). `slots` is the place in the order.
        """
        rank, world = self.rank if rank is None else rank, self.world if world is None else world
        reader, seed = self._reader, self.config.seed
        pairs = [(s, position) for s, held_out in enumerate(reader.held_out) for position in held_out.tolist()]
        order = rng.permutation(len(pairs), seed, "validation order")  # mixed, so that a few batches stand for all
        stride = world * batch_size
        for first in range(rank * batch_size, -(-len(pairs) // stride) * stride, stride):
            slots = np.arange(first, first + batch_size)
            chosen = [pairs[i] for i in order[slots % len(pairs)]]
            seeds = rng.splitmix64(np.uint64(rng.key(seed, "validation")) + slots.astype(np.uint64)).view(np.int64)
            batch, rows = reader.new_batch(np.array([source for source, _ in chosen]), seeds, slots, 0)
            batch["valid"] = torch.from_numpy(slots < len(pairs))
            for i, (source, position) in enumerate(chosen):
                if not reader.decode(batch, rows, i, source, position):
                    batch["valid"][i] = False
                    for values in rows.values():
                        values[i] = 0
            yield batch
