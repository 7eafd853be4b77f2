"""Output of a build: progress bar, time spent, and result."""

import sys
import time
from collections import Counter
from collections.abc import Mapping

from tqdm import tqdm

from tinyflux.precache.engine import Engine
from tinyflux.precache.ledger import Ledger, LedgerError
from tinyflux.shards.manifest import Base, Manifest
from tinyflux.util.cli import table


class Progress:
    """The progress bar: images of all ranks, images/s, time left, rejects."""

    def __init__(self, ledger: Ledger, engine: Engine, show: bool):
        self.ledger, self.engine = ledger, engine
        ledger.look()
        self.before, self.left_out = sum(ledger.done), ledger.done[1]
        tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=ledger.total,
            initial=self.before,
            desc=ledger.source,
            unit="image",
            disable=not show,
            mininterval=0.2 if tty else 30,  # fewer lines in a log file
        )
        self.others, self.looked = 0, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.looked > 5:  # seconds between looks at the other ranks' notes
            self.ledger.look()
            self.others = max(self.others, sum(self.ledger.done) - self.before - self.engine.images)
            self.left_out = max(self.left_out, self.ledger.done[1])
            self.looked = time.monotonic()
        self.bar.set_postfix_str(f"{max(self.left_out, self.engine.rejects)} rejected", refresh=False)
        self.bar.update(self.before + self.others + self.engine.images - self.bar.n)

    def close(self) -> None:
        self()
        self.bar.close()


def say_complete(ledger: Ledger, max_rejected: float, changes: str, *, quiet: bool = False) -> int:
    """Print that the build is complete, and what has changed since. Returns the exit status."""
    manifest = Manifest.load(ledger.out)
    if not quiet:
        print(f"{ledger.out}: complete, {manifest.count} samples in {len(manifest.shards)} shards")
        if changes:
            print(f"{ledger.out}: {changes}")
    return _status(ledger, max_rejected)


def shares(seconds: Mapping[str, float]) -> str:
    """Each model's share of the models' time."""
    total = sum(seconds.values())
    return ", ".join(f"{name} {each / total:.1%}" for name, each in sorted(seconds.items(), key=lambda item: -item[1]))


def say_speed(engine: Engine, seconds: float, truncated: Mapping[str, int], models: Mapping[str, float]) -> None:
    """Print how the time was spent, and how many captions were truncated by the text models."""
    if longer := ", ".join(f"{n} for {name}" for name, n in sorted(truncated.items()) if n):
        print(f"captions that were too long and were truncated: {longer}")
    spent = engine.stages.seconds
    if engine.images:
        work = ", ".join(f"{stage} {spent[stage]:.1f}" for stage in ("list", "decode", "compress", "write"))
        waits = spent["wait for decode"] + spent["wait for write"]
        print(
            f"this run: {engine.images} images in {seconds:.1f} s, {engine.images / seconds:.1f} images/s: "
            f"encode {spent['encode']:.1f} s, waiting for files {waits:.1f} s; in parallel, sums over threads: {work} s"
        )
    if models:
        print(f"models: {sum(models.values()):.1f} s: {shares(models)}")


def finish(
    ledger: Ledger,
    producers: dict[str, dict],
    max_rejected: float,
    *,
    timesteps: tuple[float, ...],
    base: Base | None = None,
    quiet: bool = False,
) -> int:
    """Write the manifest if all parts are done, print the summary, and return the exit status."""
    if left := ledger.unfinished():
        parts = f"{len(left)} of {len(ledger.parts)} parts"
        print(f"{ledger.out}: {parts} are still being built by other ranks; the last one writes the manifest")
        return 0
    manifest = ledger.merge(producers, timesteps, base)
    samples, rejected = ledger.done
    listed = f"{rejected} of {samples + rejected} inputs rejected, see {ledger.out / 'rejected.jsonl'}"
    if manifest is None:
        raise LedgerError(f"{ledger.out}: no sample is left, {listed}")
    if not quiet:
        size = manifest.bytes / 1e6
        _say_shapes(ledger)
        print(f"{ledger.out}: {manifest.count} samples in {len(manifest.shards)} shards, {size:.1f} MB; {listed}")
    return _status(ledger, max_rejected)


def _say_shapes(ledger: Ledger) -> None:
    """Print the number of pictures of each shape, if there are several, and the remarks about images."""
    shapes: dict[tuple, list[int]] = {}
    remarks: Counter[str] = Counter()
    for note in ledger.all_notes():
        remarks.update(note["remarks"])
        if shard := note["shard"]:
            row = shapes.setdefault(tuple(shard["shape"]), [0, 0, 0])
            for i, value in enumerate((shard["count"], *note["pixels"])):
                row[i] += value
    if len(shapes) > 1:
        rows = [("latents", "pictures", "pixels cut")]
        for (h, w), (pictures, kept, whole) in sorted(shapes.items()):
            rows.append((f"{w}x{h}", pictures, f"{1 - kept / whole:.1%}" if whole else ""))
        print(table(rows, right=True))
    for remark, n in remarks.items():
        print(f"{ledger.out}: {n} images {remark}")


def _status(ledger: Ledger, max_rejected: float) -> int:
    samples, rejected = ledger.done
    if rejected <= max_rejected * (samples + rejected):
        return 0
    print(f"error: more than --max-rejected {max_rejected:.1%} of the inputs were rejected", file=sys.stderr)
    return 1
