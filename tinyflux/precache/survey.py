"""What `sharding.inspect` finds: sizes, statistics, prompts, rejects and faults of a source, and a few samples."""

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tinyflux.shards.clients import DownloadError
from tinyflux.shards.format import ShardError
from tinyflux.shards.source import Source

VALUES = 4096  # of each field of a sample that go into the histogram


@dataclass
class FieldStats:
    """What the values of a field are like, over the samples read."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    bad: int = 0
    """Values that are NaN or infinite; they are not in the rest."""
    some: list[np.ndarray] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        values = tensor.double().flatten().numpy()
        finite = values[np.isfinite(values)]
        self.bad += len(values) - len(finite)
        if len(finite):
            self.count += len(finite)
            self.total += float(finite.sum())
            self.squares += float(np.square(finite).sum())
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            self.some.append(finite[:: -(-len(finite) // VALUES)])

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")

    @property
    def std(self) -> float:
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5 if self.count else float("nan")


@dataclass
class Shown:
    """A sample on the page."""

    key: str
    prompt: str
    origin: str
    preview: bytes | None
    tensors: dict[str, Tensor]
    decoded: bytes | None = None
    """JPEG of the VAE's reconstruction."""


@dataclass
class Report:
    """What was found. Sizes in bytes are sums over `scanned` samples, everything else is of `read` ones."""

    source: Source
    scanned: int = 0
    read: int = 0
    stored: Counter[str] = field(default_factory=Counter)
    """Bytes by member extension."""
    stats: dict[str, FieldStats] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    similarity: np.ndarray | None = None
    """Mean cosine of Lune's features between buckets [K, K]."""
    rejected: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


def spread(count: int, n: int) -> list[int]:
    """At most n of range(count), evenly spaced."""
    return sorted({i * count // n for i in range(n)}) if count > n else list(range(count))


def look(source: Source, samples: int, shards: int, shown: int) -> Report:
    """Read the source. A damaged sample or shard becomes one of the report's faults."""
    report = Report(source, rejected=rejects(source))
    manifest, cosines = source.manifest, []
    chosen = spread(len(manifest.shards), shards)
    each = max(1, samples // max(1, len(chosen)))
    show = set(spread(min(samples, sum(min(each, manifest.shards[k].count) for k in chosen)), shown))
    for k in chosen:
        try:
            file = source.open(k)
        except (OSError, ShardError) as error:
            report.faults.append(str(error))
            continue
        if file.fault:
            report.faults.append(str(file.fault))
        rows = [row for row in range(file.count) if file.samples[row] is not None]
        for row in rows:
            report.stored.update({member: size for member, (_, size) in file.members(row).items()})
        report.scanned += len(rows)
        for i in spread(len(rows), each):
            row = rows[i]
            try:
                tensors, meta = file.decode(row, finite=False), file.meta(row)
            except ShardError as error:
                report.faults.append(str(error))
                continue
            prompt, origin = (meta["prompts"] or [""])[0], meta["origin"]
            for name, tensor in tensors.items():
                report.stats.setdefault(name, FieldStats()).add(tensor)
            report.prompts.append(prompt)
            if "lune" in tensors:
                cosines.append(np.nan_to_num(cosine(tensors["lune"])))
            if report.read in show:
                preview = file.preview(row)
                report.shown.append(Shown(file.key(row), prompt, origin, preview, tensors))
            report.read += 1
    if cosines:
        report.similarity = np.mean(cosines, axis=0)
    return report


def cosine(lune: Tensor) -> np.ndarray:
    """Cosines between the rows of [K, D]."""
    values = lune.double()
    values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (values @ values.T).numpy()


def rejects(source: Source) -> Counter[str]:
    """How often each reason stands in rejected.jsonl; empty where there is none."""
    try:
        text = source.store.fetch("rejected.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return Counter()
    except DownloadError as error:
        if not error.missing:
            raise
        return Counter()
    return Counter(json.loads(line)["reason"].partition(":")[0] for line in text.splitlines())
