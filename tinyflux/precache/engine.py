"""The build engine: read in threads, encode on the device, pack and write in threads.

A batch has accepted inputs of one shard only, in order. So batches, and thus all bits of the result, do not depend on
ranks or restarts.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from threading import Lock

from torch import Tensor

from tinyflux.precache.images import Rejected
from tinyflux.precache.ledger import Ledger
from tinyflux.precache.recipe import Recipe
from tinyflux.precache.work import Ready, Task, Work
from tinyflux.shards.schema import Field, fields_of, shape_of
from tinyflux.shards.writer import write_shard


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
    """Turns the inputs of a recipe into shards."""

    recipe: Recipe
    ledger: Ledger
    batch_size: int
    workers: int
    whole_shards: bool = False
    """Encode all batches of a shard in one call: for models that are loaded one at a time."""
    stages: Stages = field(default_factory=Stages)
    images: int = 0
    """Inputs processed so far, including rejected ones."""
    rejects: int = 0
    """Rejected inputs of the shards written so far."""
    _expected: dict[str, Field] = field(default_factory=dict)
    """The first sample's fields, which all samples must have."""

    def run(self, progress: Callable[[], None]) -> None:
        """Build the parts that this process can claim. `progress` is called after each batch and each shard.

        Raises OSError if a shard cannot be written, ValueError for a rejected input if the recipe allows none. Finished
        shards are kept.
        """
        decode, compress = (ThreadPoolExecutor(self.workers, name) for name in ("decode", "compress"))
        lister, writer = ThreadPoolExecutor(1, "list"), ThreadPoolExecutor(1, "write")
        writing: deque[Future] = deque()
        try:
            for _, entries in groupby(self._ahead(decode, lister), key=itemgetter(0)):
                first = next(entries)
                part, work, last = first[1]
                rejected, pending, contents = [], [], {}
                for group in self._groups(self._batches(chain([first], entries), rejected)):
                    with self.stages.time("encode"):
                        encoded = self.recipe.encode(group)
                    for batch, tensors in zip(group, encoded, strict=True):
                        for i, ready in enumerate(batch):
                            row = {name: tensor[i] for name, tensor in tensors.items()}
                            self._expected = self._expected or fields_of(row)
                            pending.append((ready, compress.submit(self._pack, ready, row, work.shape)))
                            if ready.content:
                                contents[ready.index] = ready.content
                        self.images += len(batch)
                    progress()
                done = writer.submit(self._finish, work, pending, rejected, contents, part if last else None)
                writing.append(done)
                while len(writing) > 1:  # write at most one shard while the next is encoded
                    with self.stages.time("wait for write"):
                        writing.popleft().result()
                progress()
            while writing:
                with self.stages.time("wait for write"):
                    writing.popleft().result()
        finally:
            writer.shutdown()  # first: it waits for what is being compressed
            for pool in (decode, compress, lister):
                pool.shutdown(cancel_futures=True)

    def _works(self, lister: ThreadPoolExecutor) -> Iterator[tuple[int, Work, bool]]:
        """(part, shard to build, whether it is the part's last). The next part is listed while one is built."""
        parts = self.ledger.claim()

        def following() -> tuple[int, list[Work]] | None:
            part = next(parts, None)
            if part is None:
                return None
            with self.stages.time("list"):
                return part, [work for work in self.recipe.works(part) if not self.ledger.finished(work.number)]

        coming = lister.submit(following)
        while (found := coming.result()) is not None:
            coming = lister.submit(following)
            part, works = found
            for work in works:
                yield part, work, work is works[-1]
            if not works:
                self._release(part)

    def _release(self, part: int) -> None:
        self.recipe.done_with(part)
        self.ledger.release(part)

    def _ahead(self, pool: ThreadPoolExecutor, lister: ThreadPoolExecutor) -> Iterator[tuple]:
        """(shard, (part, work, last), task, Ready or Rejected) in order; reads at least two batches ahead."""
        queue: deque[tuple] = deque()
        window = 2 * self.batch_size + 2 * self.workers
        for place in self._works(lister):
            number = place[1].number
            for task in place[1].tasks:
                queue.append((number, place, task, pool.submit(self._read, task)))
                if len(queue) > window:
                    yield self._next(queue)
        while queue:
            yield self._next(queue)

    def _read(self, task: Task) -> Ready | Rejected:
        with self.stages.time("decode"):
            try:
                return task.read()
            except Rejected as reason:
                return reason

    def _next(self, queue: deque) -> tuple:
        *place, future = queue.popleft()
        with self.stages.time("wait for decode"):
            return *place, future.result()

    def _batches(self, entries: Iterable[tuple], rejected: list[dict]) -> Iterator[list[Ready]]:
        """Batches of the accepted inputs, the last one may be smaller; rejected inputs are added to `rejected`."""

        def accepted():
            for _, _, task, result in entries:
                if isinstance(result, Rejected):
                    rejected.append(self.recipe.rejected(task.index, task.origin, result))
                    self.images += 1
                else:
                    yield result

        stream = accepted()
        while batch := list(islice(stream, self.batch_size)):
            yield batch

    def _groups(self, batches: Iterator[list[Ready]]) -> Iterator[list[list[Ready]]]:
        """The batches of a shard, grouped by call of `encode`."""
        if not self.whole_shards:
            yield from ([batch] for batch in batches)
        elif group := list(batches):
            yield group

    def _pack(self, ready: Ready, tensors: dict[str, Tensor], shape: tuple[int, int] | None):
        """(shape, members) of a sample, in a thread; Rejected if its tensors are unfit for training."""
        with self.stages.time("compress"):
            try:
                found = check_tensors(tensors, self._expected, shape)
            except Rejected as reason:
                return reason
            return found, self.recipe.pack(ready, tensors)

    def _finish(self, work: Work, pending: list, rejected: list[dict], contents: dict, part: int | None) -> None:
        """Write a shard and its note, in a thread; release the part after its last shard."""
        samples, shape, cut, remarks = [], work.shape, [0, 0], Counter()
        for ready, future in pending:
            result = future.result()
            if isinstance(result, Rejected):
                rejected.append(self.recipe.rejected(ready.index, ready.origin, result))
            else:
                found, sample = result
                shape = shape or found
                samples.append(sample)
                if (picture := ready.picture) is not None:
                    left, top, right, bottom = picture.crop
                    cut[0] += (right - left) * (bottom - top)
                    cut[1] += picture.size[0] * picture.size[1]
                    remarks.update([picture.remark] if picture.remark else ())
        rejected.sort(key=itemgetter("index"))
        self.rejects += len(rejected)
        with self.stages.time("write"):
            shard = write_shard(self.ledger.path(work.number), samples, shape) if samples else None
            self.ledger.note(
                work.number,
                shard=shard,
                fields=self._expected if samples else {},
                rejected=rejected,
                contents=contents,
                pixels=cut,
                remarks=remarks,
            )
        if part is not None:
            self._release(part)


def check_tensors(
    tensors: Mapping[str, Tensor], expected: dict[str, Field], shape: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """The latent shape (h, w) of a sample's tensors, if they have one.

    Raises Rejected for NaN or infinity, for other fields or another shape, or if all latents are equal.
    """
    found_shape = shape_of(tensors)
    if shape is not None and found_shape not in (None, shape):
        raise Rejected(f"wrong shape: latents are {found_shape}, the shard has {shape}")
    for name, found in fields_of(tensors).items():
        if found != expected.get(name):
            wanted = expected[name].shape if name in expected else "nothing"
            raise Rejected(f"wrong shape: {name} is {found.dtype} {found.shape}, the source has {wanted}")
        if not tensors[name].isfinite().all():
            raise Rejected(f"not finite: {name} has NaN or infinity")
    latents = tensors.get("latents")
    if latents is not None and (latents == latents.flatten()[0]).all():
        raise Rejected("constant latents: every element is the same")
    return found_shape
