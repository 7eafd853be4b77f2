"""Plan -> load -> collate -> pin -> prefetch: the batches of a run, from its step number alone.

It uses threads instead of worker processes: reading and zstd release the GIL, and samples are decoded directly into the
batch's tensors. A batch's memory is reused when nothing refers to it, so a consumer may keep a batch.
"""

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tinyflux.shards.config import DataConfig
from tinyflux.shards.decode import CHUNK
from tinyflux.shards.plan import Plan
from tinyflux.shards.reader import BadSamples, MicroBatch, Reader, StreamStats
from tinyflux.shards.schema import Field, fields_at
from tinyflux.shards.source import Source
from tinyflux.shards.sources import open_sources
from tinyflux.util import rng
from tinyflux.util.files import Stopped

__all__ = ["BadSamples", "DataConfig", "Stream", "StreamStats", "open_sources"]

log = logging.getLogger(__name__)

VALIDATED = 0.25  # the fraction of a remote source's shards that validation may download


class _Pipeline:
    """The threads of a stream, from one position on.

    A thread takes the next part of a micro-batch; the one that loads the last part also collates. The consumer waits
    only for complete micro-batches.
    """

    def __init__(
        self,
        reader: Reader,
        rank: int,
        world: int,
        position: int,
        collate: Callable | None,
        device: torch.device,
        ranks_on_node: int,
        end_step: int | None,
    ):
        self.reader, self.rank, self.world, self.collate = reader, rank, world, collate
        self.pid, self.stopped = os.getpid(), False
        self.ended: BaseException | None = None  # why no more batches are started
        self.end = float("inf") if end_step is None else end_step * reader.config.accumulation(world)
        self.patience = 1.1 * reader.config.timeout + 0.5  # longer than a download's own timeout, whose error says more
        self.gpu = None  # the GPU that batches are pinned for
        if device.type == "cuda":
            self.gpu = torch.cuda.current_device() if device.index is None else device.index
        self.ahead = reader.shards.look_ahead(
            reader.plan,
            rank,
            world,
            position // reader.config.accumulation(world),
            first=reader.config.micro_batch_size,
            ranks_on_node=ranks_on_node,
            end_step=end_step,
        )
        B = reader.config.micro_batch_size
        self._room = reader.config.prefetch + 1 + reader.config.threads * CHUNK // B  # most micro-batches in progress
        self._lock, self._planning = threading.RLock(), threading.Lock()  # RLock: `close` may run at any line
        self._ready = threading.Condition(self._lock)  # for the consumer: its next micro-batch is done
        self._space = threading.Condition(self._lock)  # for another micro-batch
        self._begun: deque[MicroBatch] = deque()  # in order, until the consumer takes them
        self._parts = self._plan(position)
        reader.reading.clear()
        reader.progress = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, name=f"stream-{i}", daemon=True) for i in range(reader.config.threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def _plan(self, position: int) -> Iterator[tuple[MicroBatch, range]]:
        """Allocate the micro-batches of the rank and cut each into parts for the threads."""
        reader, config, plan = self.reader, self.reader.config, self.reader.plan
        B, accumulation = config.micro_batch_size, config.accumulation(self.world)
        draws, first = None, 0
        while position < self.end:
            step, part = divmod(position, accumulation)
            if draws is None or step >= first + len(draws) // (B * accumulation):
                first, draws = step, plan.batch(step, self.rank, self.world, steps=plan.portion)
                rows = reader.locate(draws)
            here = slice((step - first) * B * accumulation + part * B, (step - first) * B * accumulation + part * B + B)
            mine = draws[here]
            micro = reader.new_batch(
                plan.shapes[mine.shape[0]],
                mine.source,
                mine.shard,
                rows[here],
                seeds=rng.sample_seeds(config.seed, step, mine.slot),
                slots=mine.slot,
                step=step,
                draws=mine,
                ahead=self.ahead,
            )
            parts = [range(i, min(i + CHUNK, B)) for i in range(0, B, CHUNK)]
            micro.parts_left = len(parts)
            with self._lock:
                self._space.wait_for(lambda: self.stopped or len(self._begun) < self._room)
                if self.stopped:
                    return
                self._begun.append(micro)
            for part in parts:
                yield micro, part
            position += 1

    def _take(self) -> tuple[MicroBatch, range] | None:
        """The next part to load, None at the end."""
        with self._planning:
            if self.stopped or self.ended:
                return None
            try:
                return next(self._parts)
            except BaseException as error:  # noqa: BLE001  the consumer raises it, StopIteration too
                with self._lock:
                    self.ended = error
                    self._ready.notify()
                return None

    def _work(self) -> None:
        me = threading.get_ident()
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)  # otherwise pinning opens a context on the first GPU
        while True:
            taken = self._take()
            if taken is None or self.stopped:
                return
            micro, part = taken
            try:
                if micro.error is None:
                    self.reader.load(micro, part, lambda: self.stopped)
                with self._lock:
                    micro.parts_left -= 1
                    last = micro.parts_left == 0
                if last and not self.stopped:
                    self._finish(micro)
            except BaseException as error:  # noqa: BLE001  the consumer raises it, SystemExit too
                micro.error, micro.done = error, True
            self.reader.reading.pop(me, None)
            if micro.done:
                with self._lock:
                    self._ready.notify()
            del taken, micro  # they hold the batch

    def _finish(self, micro: MicroBatch) -> None:
        """Collate and pin a loaded micro-batch."""
        with self._lock:
            step = next((m.batch["step"] for m in self._begun if m.parts_left), micro.batch["step"])
        if self.ahead is not None:
            self.ahead.advance(step)
        counts = torch.bincount(micro.batch["source_index"], minlength=len(self.reader.sources)).tolist()
        batch = micro.batch if self.collate is None else self.collate(micro.batch)
        micro.result = counts, batch if self.gpu is None else _pinned(batch)
        micro.done = True

    def next(self) -> tuple[list[int], Any]:
        """Number of samples of each source in the next batch, and the batch.

        Raises errors of the threads, TimeoutError, Stopped after `close`, and StopIteration after the last step.
        """
        began = time.monotonic()
        with self._lock:
            while not (self._begun and self._begun[0].done):
                if self.stopped:  # by another thread: what was begun is left undone
                    raise Stopped("the stream was closed")
                if self.ended is not None and not self._begun:
                    raise self.ended
                left = max(began, self.reader.progress) + self.patience - time.monotonic()
                if left <= 0:
                    sources, reading = self.reader.sources, sorted(set(self.reader.reading.values()))
                    files = [f"{sources[s].url}/{sources[s].manifest.shards[shard].name}" for s, shard in reading]
                    what = f"being read: {', '.join(files) or 'nothing'}"
                    raise TimeoutError(f"no sample came for {self.patience:g} s (data.timeout); {what}")
                self._ready.wait(left)
            micro = self._begun.popleft()
            self._space.notify()
        if micro.error is not None:
            raise micro.error
        return micro.result

    def close(self) -> None:
        """End the threads. A thread that hangs in a read is abandoned."""
        if os.getpid() != self.pid:  # after a fork there are no threads, and locks may be held forever
            return
        self.stopped = True
        if self.ahead is not None:
            self.ahead.stop()
        with self._lock:
            self._ready.notify_all()
            self._space.notify_all()
        if threading.current_thread() in self._threads:  # garbage collection of a stream may run in its own thread
            return
        deadline = time.monotonic() + min(30, self.patience)
        for thread in self._threads:
            if not thread.is_alive():  # also if it is not started yet; it will return at once
                continue
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("a thread of the stream is still reading; it is abandoned")
                return


def _pinned(value: Any) -> Any:
    """The value with its tensors in pinned memory."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {name: _pinned(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in value):
        return type(value)(_pinned(part) for part in value)
    return value


class Stream:
    """The micro-batches of one rank, in order, from `start_step` until before `end_step`, or endless.

    sources: from `open_sources`. collate: raw batch -> batch, called in the stream's threads (default: the raw batch).
    device: where the batches go next; they are pinned for "cuda". ranks_on_node: ranks that share the cache of remote
    sources; each may fill its part. A raw batch has
      latents [B,C,H,W], t5_embeds [B,L,D], clip_pooled [B,D] and, if the sources have them, lune [B,K,D],
      sol_stats [B,K,3], sol_spatial [B,K,8,8], mask [B,H,W], all in the stored dtype; one (H, W) per batch;
      lune_mask, sol_mask, mask_mask bool [B], only if some source lacks that group (its rows are zero);
      source_index, dataset_ids, local_indices, sample_seeds, slots int64 [B]; keys list[str]; step int.
    Iterating raises errors of the threads, with shard and key; calling next again retries the same batch.
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
        self._options = (collate, torch.device(device), ranks_on_node, end_step)
        self._reader = Reader(sources, config, world)
        if len(self.plan.shapes) > 1:
            config.check_shapes(world)
        self._position = start_step * self.accumulation  # micro-batches returned since step 0
        self._pipeline: _Pipeline | None = None
        self._shut_down: weakref.finalize | None = None

    @property
    def plan(self) -> Plan:
        return self._reader.plan

    @property
    def fields(self) -> dict[str, Field]:
        """Dtype and shape of the tensors that are read, with the largest latent shape."""
        return fields_at(self._reader.fields, max(self.plan.shapes, key=math.prod))

    @property
    def stats(self) -> StreamStats:
        return self._reader.stats

    def counts(self) -> dict[str, int]:
        """Counters so far, to be summed over ranks: delivered samples of each source (`samples/NAME`), `bad_samples`,
        `replaced_samples`, and for remote shards `late_shards` (a reader had to wait), `cache_hits`,
        `fetched_bytes`."""
        stats, shards = self.stats, self._reader.shards
        counts = {f"samples/{name}": n for name, n in zip(self.requested, stats.samples, strict=True)}
        counts |= {"bad_samples": stats.bad, "replaced_samples": stats.replaced, "late_shards": shards.late}
        counts["cache_hits"] = max(0, shards.opened - shards.late)
        return counts | {"fetched_bytes": sum(cache.fetched for cache in shards.caches)}

    @property
    def labels(self) -> list[str]:
        """The sources' names, with the dataset id if two have the same name."""
        names = [source.name for source in self.sources]
        return [s.name if names.count(s.name) == 1 else f"{s.name}-{s.dataset_id}" for s in self.sources]

    @property
    def requested(self) -> dict[str, float]:
        """The share of each source in a batch, by the weights."""
        return dict(zip(self.labels, self.plan.weights(self.step), strict=True))

    def epoch(self, step: int) -> int:
        """Completed epochs over all sources before a step."""
        return self.plan.epoch(step)

    def passes(self, step: int) -> list[float]:
        """Passes over each source before a step, on all ranks together."""
        taken = zip(self.plan.start(step), self.plan.sources, strict=True)
        return [samples / source.total for samples, source in taken]

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._position // self.accumulation

    def state_dict(self) -> dict[str, int]:
        """The position as a step; a step that was returned in part starts again."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self._position = state["step"] * self.accumulation

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        pipeline = self._pipeline  # another thread may close the stream at any line
        if pipeline is not None and pipeline.pid != os.getpid():
            raise RuntimeError("this stream was read before the process was forked: open a new one in the child")
        if pipeline is None:
            pipeline = _Pipeline(self._reader, self.rank, self.world, self._position, *self._options)
            # also when the stream is garbage collected, and before the interpreter ends
            self._shut_down = weakref.finalize(self, pipeline.close)
            self._pipeline = pipeline
            pipeline.start()  # when `close` sees it
        try:
            counts, batch = pipeline.next()
        except BaseException:
            if self._pipeline is pipeline:
                self.close()
            raise
        self.stats.last_wait = time.perf_counter() - began
        self.stats.wait += self.stats.last_wait
        self.stats.samples = [a + b for a, b in zip(self.stats.samples, counts, strict=True)]
        self._position += 1
        return batch

    def close(self) -> None:
        """Stop the threads and drop prefetched batches. Iterating again continues at the same position."""
        if self._pipeline is not None:
            self._pipeline = None
            self._shut_down()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def held_out(self) -> int:
        """Number of samples held out for validation."""
        return sum(source.manifest.count for source in self.sources) - self.plan.total

    @property
    def remote(self) -> bool:
        """Whether some source's shards are downloaded."""
        return bool(self._reader.shards.caches)

    def validated(self, samples: int) -> int:
        """Number of samples in a validation of the first `samples`: fewer if remote shards are left out."""
        return len(self._held_out_order(samples)[0])

    def _held_out_order(self, samples: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Source and position of the first `samples` held-out samples, in an order keyed by the seed, sources evenly
        mixed. For a remote source, the order goes shard by shard and leaves most shards out, because each is downloaded
        completely for a few held-out rows."""
        seed, places, positions = self.config.seed, [], []
        for s, opened in enumerate(self.sources):
            part = self._reader.held_out(s)
            order = rng.permutation(len(part), seed, "validation order", s)
            if self._reader.shards.is_remote(s) and len(part):
                shards = len(opened.manifest.shards)
                ranks = np.argsort(rng.permutation(shards, seed, "validation shards", s))
                rank = ranks[opened.manifest.locate(part[order])[0]]
                some = np.unique(rank)[: max(1, int(VALIDATED * shards))]
                order = order[np.argsort(rank, kind="stable")][: np.isin(rank, some).sum()]
            positions.append(part[order])
            places.append((np.arange(len(order)) + 0.5) / max(1, len(part)))
        source = np.repeat(np.arange(len(positions)), [len(part) for part in positions])
        first = np.argsort(np.concatenate(places), kind="stable")[:samples]
        return source[first], np.concatenate(positions)[first]

    def validation(
        self, batch_size: int, rank: int | None = None, world: int | None = None, *, samples: int | None = None
    ) -> Iterator[dict]:
        """Raw batches of this rank's part of the first `samples` held-out samples. Samples and seeds are always the
        same, on any number of ranks.

        A batch has one latent shape. All ranks get the same number of batches of the same size. A rank's batches are
        neighbours in the order, so that few nodes download the same remote shard. `valid` bool [B] is False for rows
        that only fill a batch (they repeat a sample) and for bad rows (zero). `slots`: the place in the order.
        """
        rank, world = self.rank if rank is None else rank, self.world if world is None else world
        reader, seed = self._reader, self.config.seed
        source, position = self._held_out_order(samples)
        shapes = sorted({shape for opened in self.sources for shape in opened.shapes})
        shard, row, shape = (np.empty(len(source), np.int64) for _ in range(3))
        for s, opened in enumerate(self.sources):
            mine = source == s
            shard[mine], row[mine] = opened.manifest.locate(position[mine])
            numbers = np.array([shapes.index(wanted) for wanted in opened.shapes])
            shape[mine] = numbers[opened.manifest.index.shape[shard[mine]]]
        batches = []  # (place within its shape, shape, slots), with shapes evenly mixed
        for b in np.unique(shape).tolist():
            slots = np.flatnonzero(shape == b)
            count = -(-len(slots) // batch_size)
            filled = np.pad(slots, (0, count * batch_size - len(slots)), "edge").reshape(count, batch_size)
            batches += [((u + 0.5) / count, b, u * batch_size, len(slots), filled[u]) for u in range(count)]
        batches.sort(key=lambda batch: batch[:2])
        each = -(-len(batches) // world)
        for k in range(rank * each, (rank + 1) * each):
            _, b, first, count, slots = batches[min(k, len(batches) - 1)]
            seeds = rng.splitmix64(np.uint64(rng.key(seed, "validation")) + slots.astype(np.uint64)).view(np.int64)
            chosen = (source[slots], shard[slots], row[slots])
            micro = reader.new_batch(shapes[b], *chosen, seeds=seeds, slots=slots, step=0)
            reader.load(micro, range(batch_size))
            counted = (np.arange(first, first + batch_size) < count) & (k < len(batches))
            yield micro.batch | {"valid": torch.from_numpy(counted & np.array(micro.good))}
