"""The plan: which samples a step takes, as a pure function of (seed, step).

At every step any two samples of a source have been seen equally often, give or take one, on any number
of ranks, and a sample repeats inside a batch only where a pass ends. All integers, no state: the position
of a run is its step. A change to anything here that moves a sample is a new PLAN_VERSION.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinyflux.util import rng

PLAN_VERSION = 1

# Consecutive Fibonacci numbers: STRIDE * k mod PERIOD fills [0, PERIOD) as evenly as any sequence can,
# so that the fractional parts of the sources' shares are rounded up at evenly spread steps.
PERIOD = 75025
STRIDE = 46368


@dataclass(frozen=True, eq=False)
class PlanSource:
    """What the plan needs to know of a source.

    sizes int64 [shards]: training samples of each shard, zero allowed.
    """

    name: str
    dataset_id: int
    sizes: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.asarray(self.sizes, np.int64))
        if not self.sizes.sum():
            raise ValueError(f"source {self.name!r} has no training samples")

    @property
    def total(self) -> int:
        return int(self.sizes.sum())


@dataclass(frozen=True, eq=False)
class Draws:
    """The samples of one global batch in slot order; every array is int64 [G].

    source: index into the plan's sources. shard: index in the source. row: among the shard's training rows.
    visit: how many samples of the source came before. lap: the pass over the source.
    offset: place of the row in the shard's order of that pass.
    """

    source: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    visit: np.ndarray
    lap: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, slots: slice) -> "Draws":
        return Draws(*(getattr(self, name)[slots] for name in self.__dataclass_fields__))


class Plan:
    """The order of all samples of a run over weighted sources.

    weights: one positive number a source, normalised here. slots_per_stream: how many samples of a batch
    come from one lane, a reader that goes through shard after shard. resample: "pass" shuffles whole passes;
    "replace" draws runs of consecutive samples with replacement. Raises ValueError naming the bad argument.
    """

    def __init__(
        self,
        sources: Sequence[PlanSource],
        weights: Sequence[float],
        *,
        global_batch_size: int,
        seed: int,
        slots_per_stream: int = 8,
        resample: str = "pass",
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources need as many weights, not {len(weights)}")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weights must be positive numbers, not {list(weights)}")
        if resample not in ("pass", "replace"):
            raise ValueError(f"resample must be 'pass' or 'replace', not {resample!r}")
        for name, value in (("global_batch_size", global_batch_size), ("slots_per_stream", slots_per_stream)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        ids = [source.dataset_id for source in sources]
        if len(set(ids)) != len(ids):
            raise ValueError(f"dataset ids must be unique in a run, not {ids}: override them")

        self.sources = tuple(sources)
        self.weights = tuple(w / sum(weights) for w in weights)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.slots_per_stream = slots_per_stream
        self.resample = resample

        shares = np.cumsum(self.weights) / np.sum(self.weights)
        edges = [round(global_batch_size * PERIOD * share) for share in shares.tolist()]
        edges[-1] = global_batch_size * PERIOD
        if min(np.diff([0, *edges])) < 1:
            raise ValueError(f"a weight of {list(self.weights)} is too small for a batch of {global_batch_size}")
        self._edges = [0, *edges]
        phase = np.arange(PERIOD, dtype=np.int64) * STRIDE % PERIOD
        self._tables = [np.concatenate(([0], np.cumsum((b - phase + PERIOD - 1) // PERIOD))) for b in self._edges]
        widths = np.diff(self._edges).tolist()
        self.lanes = tuple(-(-width // (PERIOD * slots_per_stream)) for width in widths)
        self._lap_order = lru_cache(4 * len(sources))(self._make_lap_order)
        self._row_order = lru_cache(8192)(self._make_row_order)

    @property
    def total(self) -> int:
        """Training samples in all sources."""
        return sum(source.total for source in self.sources)

    def epoch(self, step: int) -> int:
        """How often as many samples as the sources hold were taken before the step."""
        return step * self.global_batch_size // self.total

    def start(self, step: int) -> list[int]:
        """Samples of each source that come before the step."""
        laps, rest = divmod(step, PERIOD)
        # a whole period adds b to the sum of ceil((b - f) / PERIOD), because f takes every residue once
        before = [laps * b + int(table[rest]) for b, table in zip(self._edges, self._tables, strict=True)]
        return np.diff(before).tolist()

    def batch(self, step: int, rows: bool = True) -> Draws:
        """The global batch of a step, in slot order: rank r of R owns slots [r*G/R, (r+1)*G/R).

        rows: without them `row` is zero, which is all that it takes to know the shards.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        parts, order = [], []
        for s, (first, stop) in enumerate(zip(self.start(step), self.start(step + 1), strict=True)):
            visit = np.arange(first, stop, dtype=np.int64)
            parts.append(self._locate(s, visit, rows))
            order.append((visit % self.lanes[s] + 0.5) / self.lanes[s])
        fields = {name: np.concatenate([getattr(p, name) for p in parts]) for name in Draws.__dataclass_fields__}
        slots = np.lexsort((fields["visit"], fields["source"], np.concatenate(order)))
        return Draws(**{name: values[slots] for name, values in fields.items()})

    def replacements(self, draws: Draws, slot: int) -> Iterator[int]:
        """The rows that stand in for a bad one: those after it in its shard's order, once around."""
        order = self._row_order(*(int(x[slot]) for x in (draws.source, draws.lap, draws.shard)))
        start = int(draws.offset[slot])
        for i in range(1, len(order)):
            yield int(order[(start + i) % len(order)])

    def _locate(self, s: int, visit: np.ndarray, rows: bool) -> Draws:
        T, C = self.sources[s].total, self.lanes[s]
        lap, q = np.divmod(visit, T)
        j, lane = np.divmod(q, C)
        if self.resample == "replace":
            run = -(-T // len(self.sources[s].sizes))  # samples of an average shard
            starts = [self._uniform(T, s, *which) for which in zip(lap, lane, j // run, strict=True)]
            x = (np.array(starts, np.int64) + j % run) % T
        else:  # the line of a pass is cut into one contiguous piece a lane
            x = lane * (T // C) + np.minimum(lane, T % C) + j

        shard, offset, row = np.empty_like(x), np.empty_like(x), np.zeros_like(x)
        for p in np.unique(lap):
            here = lap == p
            shards, ends = self._lap_order(s, int(p))
            place = np.searchsorted(ends, x[here], side="right")
            shard[here] = shards[place]
            offset[here] = x[here] - (ends[place] - self.sources[s].sizes[shards[place]])
        for i, which in enumerate(zip(lap.tolist(), shard.tolist(), strict=True) if rows else ()):
            row[i] = self._row_order(s, *which)[offset[i]]
        return Draws(np.full_like(x, s), shard, row, visit, lap, offset)

    def _key(self, what: str, s: int, *parts: int) -> int:
        return rng.key(self.seed, what, self.sources[s].dataset_id, *(int(part) for part in parts))

    def _uniform(self, n: int, s: int, *parts: int) -> int:
        return self._key("start", s, *parts) * n >> 64

    def _make_lap_order(self, s: int, lap: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.sources[s].sizes
        shards = rng.permutation(len(sizes), self._key("shards", s, lap))
        return shards, np.cumsum(sizes[shards])

    def _make_row_order(self, s: int, lap: int, shard: int) -> np.ndarray:
        return rng.permutation(int(self.sources[s].sizes[shard]), self._key("rows", s, lap, shard))


def split(origin_hashes: np.ndarray, source: int | str, val_fraction: float) -> np.ndarray:
    """Which samples are held out: a keyed hash of their image's origin, so captions of one image stay together.

    origin_hashes uint32 [N], source: what the source is called. Returns bool [N], True where held out.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), not {val_fraction}")
    hashes = np.asarray(origin_hashes, np.uint64) & np.uint64(0xFFFF)
    draws = rng.splitmix64(np.uint64(rng.key("validation", source)) + hashes)
    return (draws >> np.uint64(11)) < np.uint64(int(val_fraction * 2**53))
