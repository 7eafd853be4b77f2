"""The data settings of a run: sources and batch sizes. Does not import torch, so that --help is fast."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tinyflux.util.settings import Above, AtLeast, Match, Within, check, require

MAX_BATCH = 1 << 18
"""A slot's place in a step is sorted as one integer of 64 bits."""


@dataclass
class DataConfig:
    """What a run reads and in which order."""

    sources: list[str] = field(default_factory=list)
    """Folders or URLs of the sources: hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs://, http(s)://."""
    weights: Annotated[list[float], AtLeast(0)] | None = None
    """One number per source: its share of every batch. Default: proportional to the sources' sample counts."""
    weights_at: Annotated[list[str], Match(r"\d+:[^:]+", "STEP:WEIGHT,WEIGHT,...")] = field(default_factory=list)
    """Other weights from a step on: 10000:0.5,0.5 20000:0,1."""
    dataset_ids: Annotated[list[int], AtLeast(0)] | None = None
    """One id per source, overriding those in the manifests."""
    global_batch_size: Annotated[int, Within(1, MAX_BATCH)] = 256
    """Samples of one optimizer step on all ranks together; a multiple of ranks x micro_batch_size."""
    micro_batch_size: Annotated[int, AtLeast(1)] = 8
    """Samples of one forward pass on one rank; gradient accumulation follows from it."""
    unit: Annotated[int, AtLeast(1)] | None = None
    """Samples of one latent shape that the plan places together; must divide global_batch_size. With several latent
    shapes it must be a multiple of micro_batch_size. Changes the data order. Default: 8, or the largest divisor."""
    seed: int = 0
    """Seed of the data order and of every random draw in training."""
    val_fraction: Annotated[float, Within(0, 1, open_high=True)] = 0.0
    """Share of the images that is held out for validation."""
    slots_per_stream: Annotated[int, AtLeast(1)] = 4
    """Samples of a batch that come from one shard at a time. Lower: better mixing, more open shards. Higher: fewer
    requests. With shards of one class each, a batch of N is worth about N / slots_per_stream independent samples."""
    resample: Literal["pass", "replace"] = "pass"
    """"pass": every sample once per pass, in a new order each time. "replace": draw short runs of samples with
    replacement."""
    threads: Annotated[int, AtLeast(1)] = 2
    """Decoding threads on each rank."""
    prefetch: Annotated[int, AtLeast(1)] = 2
    """Micro-batches to load ahead of the training loop."""
    open_shards: Annotated[int, AtLeast(1)] = 64
    """Shards that a rank keeps open, or more if it reads from more at a time."""
    cache_dir: str | None = None
    """Folder of a node for shards of remote sources. Default: $TINYFLUX_CACHE/shards or ~/.cache/tinyflux/shards."""
    cache_gb: Annotated[float, Above(0)] = 100.0
    """Size limit of that folder, in GB."""
    timeout: Annotated[float, Above(0)] = 480.0
    """Seconds that a rank waits for a shard before it stops with an error that names the shard. Must be well below
    parallel.timeout, or the other ranks end the run first without naming it."""
    max_bad_samples: Annotated[int, AtLeast(0)] = 100
    """Stop the run after more than this many different bad samples on a rank (or 20 in a row)."""
    allow_missing: list[str] = field(default_factory=list)
    """Names of sources that may lack Lune or Sol; their samples carry a mask and add no such loss."""
    allow_different: list[str] = field(default_factory=list)
    """Names of sources whose producer (models, revisions, scaling) may differ from those of the other sources."""

    def __post_init__(self):
        check(self, "data.")
        for name in ("weights", "dataset_ids"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.sources):
                raise ValueError(f"data.{name} has {len(given)} entries for {len(self.sources)} sources")
        if self.weights is not None:
            require(any(self.weights), "data.weights", self.weights, "more than zero for one source at least")
        once = len(self.stretches) == len(self.weights_at)
        require(once, "data.weights_at", self.weights_at, "one entry a step")
        for step, weights in self.stretches.items():
            where, text = "data.weights_at", f"{step}:{','.join(map(str, weights))}"
            require(step > 0, where, text, "of step 1 or later")
            require(len(weights) == len(self.sources), where, text, f"of {len(self.sources)} weights, one a source")
            good = all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)
            require(good, where, text, "of numbers from 0, more than zero for one source at least")
        size, unit = self.global_batch_size, self.unit_size
        require(size % unit == 0, "data.unit", unit, f"a divisor of data.global_batch_size = {size}")

    @property
    def unit_size(self) -> int:
        """`unit`, or its default."""
        if self.unit is not None:
            return self.unit
        return self.global_batch_size if self.global_batch_size < 8 else math.gcd(8, self.global_batch_size)

    @property
    def stretches(self) -> dict[int, list[float]]:
        """`weights_at` as {step: weights}. Raises ValueError."""
        found: dict[int, list[float]] = {}
        for entry in self.weights_at:
            step, _, weights = entry.partition(":")
            try:
                found[int(step)] = [float(weight) for weight in weights.split(",")]
            except ValueError as error:
                raise ValueError(f"data.weights_at is {entry!r}: it must be STEP:WEIGHT,WEIGHT,...") from error
        return found

    def accumulation(self, world: int) -> int:
        """Micro-batches of a rank in one step. Raises ValueError if the global batch doesn't divide."""
        steps, rest = divmod(self.global_batch_size, world * self.micro_batch_size)
        if rest:
            raise ValueError(
                f"data.global_batch_size is {self.global_batch_size}, must be a multiple of "
                f"ranks x data.micro_batch_size = {world} x {self.micro_batch_size} = {world * self.micro_batch_size}"
            )
        return steps

    def check_shapes(self, world: int) -> None:
        """Raises ValueError if sources have several shapes and a micro-batch would mix them."""
        unit, micro = self.unit_size, self.micro_batch_size
        if unit % micro:
            raise ValueError(
                f"the sources have several latent shapes, but a micro-batch has one: data.unit = {unit} must be a "
                f"multiple of data.micro_batch_size = {micro}: set data.unit = {micro}"
            )
        if self.global_batch_size % (world * unit):
            raise ValueError(
                f"the sources have several latent shapes: data.global_batch_size = {self.global_batch_size} must be a "
                f"multiple of ranks x data.unit = {world} x {unit} = {world * unit}"
            )
