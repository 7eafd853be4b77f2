"""The one pass of a build: read and resize in threads, encode on the device, compress and write in threads.

Batches hold the accepted inputs of one shard in order and never cross into the next, so their composition, and with
it every bit of the result, depends neither on ranks nor on restarts.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyflux.precache.extract import Batch
from tinyflux.precache.images import Picture, Rejected, prepare, preview
from tinyflux.precache.inputs import Input, caption
from tinyflux.precache.ledger import Job
from tinyflux.precache.sources import SourceSpec
from tinyflux.shards.format import encode_sample, sample_key
from tinyflux.shards.manifest import shard_name
from tinyflux.shards.schema import Field, fields_at, fields_of, shape_of
from tinyflux.shards.writer import write_shard
from tinyflux.util import rng

Encode = Callable[[list[Batch]], list[dict[str, Tensor]]]
"""Batches -> the tensors of each, on the CPU."""


class Ready(NamedTuple):
    """An input that is read, captioned and cut to size; without a picture where only its caption is wanted."""

    index: int
    origin: str
    seed: int
    """Its key for everything random, signed 64-bit."""
    prompt: str
    picture: Picture | None
    members: dict[str, bytes] = {}
    """What is kept of a sample that is there already, by extension."""


class Stages:
    """Seconds spent in each stage, summed over threads."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._lock = Lock()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - start


@dataclass
class Engine:
    """Turns the inputs of one source into shards."""

    spec: SourceSpec
    encode: Encode
    size: int
    batch_size: int
    seed: int
    workers: int
    with_preview: bool = True
    whole_shards: bool = False
    """Encode all batches of a shard in one call: for models that are loaded one at a time."""
    stages: Stages = field(default_factory=Stages)
    images: int = 0
    """Inputs done with so far, rejects included."""
    rejects: int = 0
    """Inputs left out of the shards written so far."""

    def read(self, index: int, item: Input) -> Ready | Rejected:
        """One input, in a thread: its caption by the rule, its image cut to size."""
        seed = rng.signed_key(self.seed, self.spec.dataset_id, index)
        with self.stages.time("decode"):
            try:
                prompt = caption(self.spec, item, seed)
                picture = self.cut(item, seed)
            except Rejected as reason:
                return reason
        return Ready(index, item.origin, seed, prompt, picture)

    def cut(self, item: Input, seed: int) -> Picture:
        """An input's image, cut to size by the source's rules. Raises Rejected."""
        spec = self.spec
        limits = {"min_side": spec.min_side, "max_aspect": spec.max_aspect, "max_pixels": spec.max_pixels}
        return prepare(item.image(), self.size, crop=spec.crop, seed=seed, **limits)

    def tasks(self, shards: Iterable[int], inputs: list, shard_size: int) -> Iterator[tuple]:
        """(shard, index, origin, what reads it), in order."""
        for k in shards:
            for index in range(k * shard_size, min((k + 1) * shard_size, len(inputs))):
                if (item := inputs[index]) is not None:
                    yield k, index, item.origin, partial(self.read, index, item)

    def ahead(self, pool: ThreadPoolExecutor, tasks: Iterator[tuple]) -> Iterator[tuple]:
        """(shard, index, origin, Ready or Rejected) in order, two batches and more read ahead."""
        queue: deque[tuple[int, int, str, Future]] = deque()
        window = 2 * self.batch_size + 2 * self.workers
        for k, index, origin, read in tasks:
            queue.append((k, index, origin, pool.submit(read)))
            if len(queue) > window:
                yield self._next(queue)
        while queue:
            yield self._next(queue)

    def _next(self, queue: deque) -> tuple:
        k, index, origin, future = queue.popleft()
        with self.stages.time("wait for decode"):
            return k, index, origin, future.result()

    def batches(self, entries: Iterable[tuple], rejected: list[dict]) -> Iterator[list[Ready]]:
        """Full batches of what was accepted, the last one maybe short; the rest is added to `rejected`."""

        def accepted():
            for _, index, origin, result in entries:
                if isinstance(result, Rejected):
                    rejected.append({"index": index, "origin": origin, "reason": str(result)})
                    self.images += 1
                else:
                    yield result

        stream = accepted()
        while batch := list(islice(stream, self.batch_size)):
            yield batch

    def groups(self, batches: Iterator[list[Ready]]) -> Iterator[list[list[Ready]]]:
        """The batches of a shard that are encoded in one call."""
        if not self.whole_shards:
            yield from ([batch] for batch in batches)
        elif group := list(batches):
            yield group

    def encode_group(self, group: list[list[Ready]]) -> list[dict[str, Tensor]]:
        """The tensors of each batch, on the CPU, batched."""
        with self.stages.time("encode"):
            return self.encode([as_batch(batch) for batch in group])

    def compress(self, ready: Ready, tensors: dict[str, Tensor], expected: dict[str, Field]) -> dict | Rejected:
        """One sample as tar members, in a thread; Rejected where its tensors are not fit to be trained on."""
        with self.stages.time("compress"):
            try:
                check_tensors(tensors, expected)
            except Rejected as reason:
                return reason
            return self.members(ready, tensors)

    def members(self, ready: Ready, tensors: dict[str, Tensor]) -> dict:
        """One sample as tar members."""
        meta = {
            "prompts": [ready.prompt],
            "source": self.spec.name,
            "dataset_id": self.spec.dataset_id,
            "index": ready.index,
            "origin": ready.origin,
            "size": ready.picture.size,
            "crop": ready.picture.crop,
        }
        picture = preview(ready.picture.pixels) if self.with_preview else None
        return encode_sample(sample_key(self.spec.dataset_id, ready.index), tensors, meta, picture)

    def finish(self, job: Job, k: int, pending: list, rejected: list[dict], fields: dict[str, Field]) -> None:
        """Write shard k and its note, in a thread."""
        samples = []
        for index, origin, future in pending:
            result = future.result()
            if isinstance(result, Rejected):
                rejected.append({"index": index, "origin": origin, "reason": str(result)})
            else:
                samples.append(result)
        rejected.sort(key=itemgetter("index"))
        self.rejects += len(rejected)
        with self.stages.time("write"):
            shard = write_shard(job.out / shard_name(job.source, k), samples) if samples else None
            job.note(k, shard, fields, rejected)

    def run(self, job: Job, shards: Iterable[int], inputs: list[Input | None], progress: Callable[[], None]) -> None:
        """Build these shards. `progress` is called after each batch and each shard.

        Raises OSError where a shard cannot be written; the finished ones stay.
        """
        pools = [ThreadPoolExecutor(n, name) for n, name in ((self.workers, "decode"), (self.workers, "compress"))]
        writer = ThreadPoolExecutor(1, "write")
        decode, compress = pools
        writing: deque[Future] = deque()
        fields: dict[str, Field] = {}
        expected: dict[str, Field] = {}
        tasks = self.tasks(shards, inputs, job.shard_size)
        try:
            for k, entries in groupby(self.ahead(decode, tasks), key=itemgetter(0)):
                rejected, pending = [], []
                for group in self.groups(self.batches(entries, rejected)):
                    for batch, tensors in zip(group, self.encode_group(group), strict=True):
                        rows = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(batch))]
                        fields = fields or fields_of(rows[0])
                        expected = expected or fields_at(fields, shape_of(rows[0]) or (1, 1))
                        pending += [
                            (ready.index, ready.origin, compress.submit(self.compress, ready, row, expected))
                            for ready, row in zip(batch, rows, strict=True)
                        ]
                        self.images += len(batch)
                    progress()
                writing.append(writer.submit(self.finish, job, k, pending, rejected, fields if pending else {}))
                while len(writing) > 1:  # one shard is written while the next is encoded, no more
                    with self.stages.time("wait for write"):
                        writing.popleft().result()
                progress()
            while writing:
                with self.stages.time("wait for write"):
                    writing.popleft().result()
        finally:
            for pool in (*pools, writer):
                pool.shutdown(cancel_futures=True)


def as_batch(batch: list[Ready]) -> Batch:
    """Inputs that are read, as the models take them."""
    pictures = [ready.picture for ready in batch]
    pixels = None if pictures[0] is None else torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    return Batch(pixels, [ready.prompt for ready in batch], torch.tensor([ready.seed for ready in batch]))


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Field]) -> None:
    """Raises Rejected where a sample's tensors have NaN or infinity, another shape, or latents that are all equal.

    expected: the fields that the samples must have, "h" and "w" in numbers.
    """
    for name, tensor in tensors.items():
        found = Field(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != expected.get(name):
            wanted = expected[name].shape if name in expected else "nothing"
            raise Rejected(f"wrong shape: {name} is {found.dtype} {found.shape}, the source has {wanted}")
        if not tensors[name].isfinite().all():
            raise Rejected(f"not finite: {name} has NaN or infinity")
    latents = tensors.get("latents")
    if latents is not None and (latents == latents.flatten()[0]).all():
        raise Rejected("constant latents: every element is the same")
