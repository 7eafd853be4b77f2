"""What a build says: its bar, its estimate, where its time went, and what it made."""

import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tinyflux.precache.convert import Converter
from tinyflux.precache.engine import Engine
from tinyflux.precache.inputs import Input
from tinyflux.precache.ledger import Job, JobError
from tinyflux.shards.manifest import Manifest


class Progress:
    """The bar: images of all ranks, images/s, time left, rejects."""

    def __init__(self, job: Job, engine: Engine | Converter, show: bool):
        self.job, self.engine = job, engine
        self.before = self._finished()
        tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=job.total,
            initial=self.before,
            desc=job.source,
            unit="image",
            disable=not show,
            mininterval=0.2 if tty else 30,  # a log file wants few lines
        )
        self.others, self.looked = 0, time.monotonic()

    def _finished(self) -> int:
        return sum(size for k, size in enumerate(self.job.sizes) if self.job.finished(k))

    def __call__(self) -> None:
        if time.monotonic() - self.looked > 5:  # seconds; a look at the notes of the other ranks
            self.others = max(self.others, self._finished() - self.before - self.engine.images)
            self.looked = time.monotonic()
        self.bar.set_postfix_str(f"{self.engine.rejects} rejected", refresh=False)
        self.bar.update(self.before + self.others + self.engine.images - self.bar.n)

    def close(self) -> None:
        self()
        self.bar.close()


def estimate(engine: Engine, inputs: list[Input], world: int, shard_size: int) -> None:
    """Build a few batches into a folder that is thrown away, and print what the whole build would take."""
    batch = shard_size if engine.whole_shards else engine.batch_size
    with tempfile.TemporaryDirectory(prefix="tinyflux-estimate-") as folder:
        job = Job(Path(folder), engine.spec.name, engine.spec.dataset_id)
        few = job.begin({}, inputs[: (2 if engine.whole_shards else 4) * batch], shard_size=batch)
        marks = []
        engine.run(job, job.claim(0, 1), few, lambda: marks.append((time.perf_counter(), engine.images)))
        notes = [job.finished(k)["shard"] for k in range(job.shards)]
    made = sum(shard["count"] for shard in notes if shard)
    if not made:
        raise JobError(f"all of the first {len(few)} inputs are rejected: {job.rejected()[0]['reason']}, ...")
    (start, warm), (end, images) = marks[0], marks[-1]  # the first batch pays for warming up
    if images == warm:
        option = "--shard-size" if engine.whole_shards else "--batch-size"
        raise JobError(f"--estimate needs more than {batch} inputs, or a smaller {option}")
    rate = (images - warm) / (end - start)
    each = sum(shard["bytes"] for shard in notes if shard) / made
    kept = made / len(few)
    hours, name = len(inputs) / rate / 3600, engine.spec.name
    print(f"{name}: {len(inputs)} inputs at {rate:.1f} images/s a rank, from {images - warm} of them")
    print(f"  time  {hours:.2f} hours on 1 rank, {hours / world:.2f} on {world}")
    print(f"  disk  {len(inputs) * kept * each / 1e9:.2f} GB, {each / 1e3:.1f} kB a sample; {1 - kept:.1%} rejected")
    print(f"  feed  a trainer reads {each / 1e3:.1f} MB/s for every 1000 samples/s that it takes")


def already(job: Job, shard_size: int) -> int | None:
    """0, having said so, where there is nothing left to do."""
    return say_complete(job) if job.complete(shard_size) else None


def say_complete(job: Job) -> int:
    """Say that there is nothing left to do: status 0."""
    manifest = Manifest.load(job.out)
    print(f"{job.out}: complete, {manifest.count} samples in {len(manifest.shards)} shards")
    return 0


def say_speed(engine: Engine, seconds: float) -> None:
    """Print where the time of this run went."""
    spent = engine.stages.seconds
    if engine.images:
        work = ", ".join(f"{stage} {spent[stage]:.1f}" for stage in ("decode", "compress", "write"))
        waits = spent["wait for decode"] + spent["wait for write"]
        print(
            f"this run: {engine.images} images in {seconds:.1f} s, {engine.images / seconds:.1f} images/s: "
            f"encode {spent['encode']:.1f} s, waiting for files {waits:.1f} s; beside it, summed over threads: {work} s"
        )


def finish(job: Job, producers: dict[str, dict], max_rejected: float) -> int:
    """Merge if all shards are done, print the summary, and return the exit status."""
    if left := job.unfinished():
        print(f"{job.out}: {len(left)} of {job.shards} shards are still being written by other ranks; the last merges")
        return 0
    manifest = job.merge(producers)
    rejected = len(job.rejected())
    listed = f"{rejected} of {job.total} inputs rejected, see {job.out / 'rejected.jsonl'}"
    if manifest is None:
        raise JobError(f"{job.out}: no sample is left, {listed}")
    size = f"{len(manifest.shards)} shards, {manifest.bytes / 1e6:.1f} MB"
    print(f"{job.out}: {manifest.count} samples in {size}; {listed}")
    if rejected > max_rejected * job.total:
        print(f"error: more than --max-rejected {max_rejected:.1%} of the inputs were rejected", file=sys.stderr)
        return 1
    return 0
