"""Collect the data for `sharding.inspect`: sizes, statistics, prompts, rejects, faults, and a few samples."""

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tinyflux.shards.clients import DownloadError
from tinyflux.shards.format import SUFFIX, ShardError
from tinyflux.shards.manifest import diff_fingerprints
from tinyflux.shards.source import Source
from tinyflux.util.pixels import to_uint8

VALUES = 4096  # values per field of a sample for the histogram


@dataclass
class FieldStats:
    """Statistics of a field over the read samples."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    bad: int = 0
    """Number of NaN or infinite values, which are excluded from the rest."""
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
    shape: tuple[int, int]
    prompts: list[str]
    origin: str
    preview: bytes | None
    tensors: dict[str, Tensor]
    decoded: bytes | None = None
    """JPEG of the VAE's reconstruction."""


@dataclass
class Sizes:
    """Number of members, and their bytes."""

    members: int = 0
    bytes: int = 0


@dataclass
class Report:
    """The collected data. Sizes in bytes are sums over `scanned` samples, everything else covers `read` samples."""

    source: Source
    scanned: int = 0
    read: int = 0
    stored: dict[tuple[str, tuple[int, int]], Sizes] = field(default_factory=dict)
    """By the member's extension, captions without their number, and the latents' shape."""
    stats: dict[tuple[str, tuple[int, ...]], FieldStats] = field(default_factory=dict)
    """By the field's name and its shape."""
    prompts: list[str] = field(default_factory=list)
    similarity: np.ndarray | None = None
    """Mean cosine of Lune's features between buckets [K, K]."""
    rejected: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def ratio(self, group: str, shape: tuple[int, int] | None = None) -> float:
        """Stored bytes divided by tensor bytes of a group's members, for one latent shape or all."""
        raw = stored = 0
        for (member, of), sizes in self.stored.items():
            if member == f"{group}{SUFFIX}" and shape in (None, of):
                stored += sizes.bytes
                raw += sizes.members * self.source.groups[group].nbytes(of)
        return stored / raw if raw else float("nan")

    def add_sizes(self, shape: tuple[int, int], members: dict[str, int]) -> None:
        """Add a sample's members and their bytes."""
        for member, size in members.items():
            group, dot, rest = member.partition(".")
            name = f"{group}{SUFFIX}" if dot and rest.endswith(SUFFIX[1:]) else member
            sizes = self.stored.setdefault((name, shape), Sizes())
            sizes.members, sizes.bytes = sizes.members + 1, sizes.bytes + size


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
        shape, first = manifest.shards[k].shape, int(manifest.starts[k])
        for row in rows:
            found = file.members(row, int(source.captions[first + row]))
            report.add_sizes(shape, {member: holder.size(row, member) for member, holder in found.items()})
        report.scanned += len(rows)
        for i in spread(len(rows), each):
            row = rows[i]
            try:
                tensors, meta = file.decode(row, finite=False), file.meta(row)
            except ShardError as error:
                report.faults.append(str(error))
                continue
            for name, tensor in tensors.items():
                report.stats.setdefault((name, tuple(tensor.shape)), FieldStats()).add(tensor)
            report.prompts += meta["prompts"]
            if "lune" in tensors:
                cosines.append(np.nan_to_num(cosine(tensors["lune"])))
            if report.read in show:
                preview = file.preview(row)
                shown = (file.key(row), shape, meta["prompts"], meta["origin"])
                report.shown.append(Shown(*shown, preview, tensors))
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
    """Number of rejects by reason in rejected.jsonl; empty if there is none."""
    try:
        text = source.store.fetch("rejected.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return Counter()
    except DownloadError as error:
        if not error.lacks:
            raise
        return Counter()
    return Counter(map(_reason, text.splitlines()))


def _reason(line: str) -> str:
    try:
        return json.loads(line)["reason"].partition(":")[0]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "unreadable line of rejected.jsonl"


def decode(report: Report, zoo_name: str) -> None:
    """Decode the latents of the samples on the page. Raises ValueError if the VAE is not the source's."""
    from tinyflux.model.zoo import ModelZoo
    from tinyflux.precache.images import preview

    zoo = ModelZoo(zoo=zoo_name)
    zoo.load_vae()
    known = [
        {k: v for k, v in vae.items() if k != "dtype"}
        for vae in (report.source.groups["latents"].producer.get("vae", {}), zoo.fingerprint()["vae"])
    ]
    if differences := diff_fingerprints(*known):
        raise ValueError(f"--zoo {zoo_name} is not what the source was built with: vae.{'; vae.'.join(differences)}")
    for sample in report.shown:
        pixels = zoo.decode_latents(sample.tensors["latents"].float()[None])[0]  # [3, H, W]
        sample.decoded = preview(to_uint8(pixels).permute(1, 2, 0).numpy())
