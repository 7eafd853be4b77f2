"""What a run reads: its sources, checked to go together, and the sizes of its batches."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.manifest import OWN, diff_producers
from tinyflux.shards.plan import MAX_BATCH
from tinyflux.shards.remote import is_remote, without_revision
from tinyflux.shards.schema import SCHEMA
from tinyflux.shards.source import Source, open_source
from tinyflux.shards.store import open_store
from tinyflux.util.settings import Above, AtLeast, Match, Within, check, require

DEFAULT_GROUPS = ("latents", "text", "lune", "sol", "mask")
"""What a run reads unless it is told otherwise."""


@dataclass
class DataConfig:
    """What a run reads and in which order."""

    sources: list[str] = field(default_factory=list)
    """Folders or URLs of the sources: hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs://, http(s)://."""
    weights: Annotated[list[float], AtLeast(0)] | None = None
    """One number a source: its share of every batch. Default: the sources' sample counts."""
    weights_at: Annotated[list[str], Match(r"\d+:[^:]+", "STEP:WEIGHT,WEIGHT,...")] = field(default_factory=list)
    """Other weights from a step on, such as 10000:0.5,0.5 20000:0,1."""
    dataset_ids: Annotated[list[int], AtLeast(0)] | None = None
    """One id a source, instead of those in the manifests."""
    global_batch_size: Annotated[int, Within(1, MAX_BATCH)] = 256
    """Samples of one optimizer step on all ranks: a multiple of ranks x micro_batch_size."""
    micro_batch_size: Annotated[int, AtLeast(1)] = 8
    """Samples of one forward pass on one rank; gradient accumulation follows from it."""
    unit: Annotated[int, AtLeast(1)] | None = None
    """Samples that are dealt out together and share a latent shape; divides global_batch_size. With sources of several
    shapes it is a multiple of micro_batch_size. Part of the data order. Default: 8, or the largest that divides."""
    seed: int = 0
    """Decides the order of the samples and every random draw of training."""
    val_fraction: Annotated[float, Within(0, 1, open_high=True)] = 0.0
    """Share of the images that is held out for validation."""
    slots_per_stream: Annotated[int, AtLeast(1)] = 4
    """Samples of a batch that come from one shard at a time. Lower: better mixing, more open shards. Higher: fewer
    requests. With shards of one class each, a batch of N is worth about N / slots_per_stream independent samples."""
    resample: Literal["pass", "replace"] = "pass"
    """"pass": every sample once a pass, in a new order each time. "replace": runs of samples from random places."""
    threads: Annotated[int, AtLeast(1)] = 2
    """Decoding threads on each rank."""
    prefetch: Annotated[int, AtLeast(1)] = 2
    """Micro-batches that are ready ahead of the training loop."""
    open_shards: Annotated[int, AtLeast(1)] = 64
    """Shards that a rank keeps open; as many as it reads from at a time, if these are more."""
    cache_dir: str | None = None
    """Where a node keeps shards of remote sources. Default: $TINYFLUX_CACHE/shards or ~/.cache/tinyflux/shards."""
    cache_gb: Annotated[float, Above(0)] = 100.0
    """Size limit of that folder, in GB."""
    timeout: Annotated[float, Above(0)] = 480.0
    """Seconds that a rank waits for a shard before it gives up and says for which. Must be well below
    parallel.timeout: or the other ranks end the run first, without saying why."""
    max_bad_samples: Annotated[int, AtLeast(0)] = 100
    """A rank stops after this many different bad samples (20 in a row stop it too)."""
    allow_missing: list[str] = field(default_factory=list)
    """Names of sources that may lack Lune or Sol; their samples carry a mask and add no such loss."""
    allow_different: list[str] = field(default_factory=list)
    """Names of sources whose producer (models, revisions, scaling) may differ from the first source's."""

    def __post_init__(self):
        check(self, "data.")
        for name in ("weights", "dataset_ids"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.sources):
                raise ValueError(f"data.{name} has {len(given)} entries for {len(self.sources)} sources")
        if self.weights is not None:
            require(any(self.weights), "data.weights", self.weights, "more than zero for one source at least")
        for step, weights in self.stretches.items():
            where, text = "data.weights_at", f"{step}:{','.join(map(str, weights))}"
            require(step > 0, where, text, "of step 1 or later")
            require(len(weights) == len(self.sources), where, text, f"of {len(self.sources)} weights, one a source")
            good = all(np.isfinite(w) and w >= 0 for w in weights) and any(weights)
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
        """Micro-batches of a rank in one step. Raises ValueError where the global batch doesn't divide."""
        steps, rest = divmod(self.global_batch_size, world * self.micro_batch_size)
        if rest:
            raise ValueError(
                f"data.global_batch_size is {self.global_batch_size}, must be a multiple of "
                f"ranks x data.micro_batch_size = {world} x {self.micro_batch_size} = {world * self.micro_batch_size}"
            )
        return steps

    def check_shapes(self, world: int) -> None:
        """Raises ValueError where a micro-batch would mix the shapes of sources that have several."""
        unit, micro = self.unit_size, self.micro_batch_size
        if unit % micro:
            raise ValueError(
                f"the sources have several latent shapes, and a micro-batch has one: data.unit = {unit} must be a "
                f"multiple of data.micro_batch_size = {micro}: set data.unit = {micro}"
            )
        if self.global_batch_size % (world * unit):
            raise ValueError(
                f"the sources have several latent shapes: data.global_batch_size = {self.global_batch_size} must be a "
                f"multiple of ranks x data.unit = {world} x {unit} = {world * unit}"
            )


def resolve_revisions(config: DataConfig, recorded: dict[str, str]) -> list[str | None]:
    """What pins each source's content now, for `open_sources` on all ranks; None for local ones.

    recorded: {url: commit} of the run's checkpoint. A Hub source stays at its commit there, although the branch may
    have moved on, unless its URL now names another revision. Raises ValueError, DownloadError.
    """
    cache = NodeCache(config.cache_dir, int(config.cache_gb * 1e9), config.timeout)
    known = {without_revision(url): commit for url, commit in recorded.items()} | recorded
    return [known.get(url) or open_store(url, cache).revision if is_remote(url) else None for url in config.sources]


def open_sources(
    config: DataConfig, groups: tuple[str, ...] = DEFAULT_GROUPS, revisions: list[str] | None = None
) -> list[Source]:
    """Open the sources of a run and check that they go together.

    groups: those that the run reads (a loss that is off needs no group of its own); latents and texts are always read.
    revisions: those of the sources as another rank or an earlier run opened them, to read the very same content.
    Raises ValueError or OSError, saying which source and field.
    """
    if not config.sources:
        raise ValueError("data.sources is empty: name at least one source folder")
    ids = config.dataset_ids or [None] * len(config.sources)
    cache = NodeCache(config.cache_dir, int(config.cache_gb * 1e9), config.timeout)
    pins = revisions or [None] * len(config.sources)
    sources = [
        open_source(url, dataset_id, cache, revision, groups)
        for url, dataset_id, revision in zip(config.sources, ids, pins, strict=True)
    ]
    names = {source.name for source in sources}
    for option in ("allow_missing", "allow_different"):
        if unknown := set(getattr(config, option)) - names:
            raise ValueError(f"data.{option} names {sorted(unknown)}; the sources are {sorted(names)}")
    wanted = [group for group in SCHEMA if group in groups and group != "mask"]
    for i, source in enumerate(sources):
        _check_groups(source, wanted, config)
        for other in sources[:i]:
            _check_agreement(other, source, config)
    owners: dict[int, Source] = {}
    for source in sources:
        other = owners.setdefault(source.dataset_id, source)
        if other is not source:
            raise ValueError(
                f"sources {other.url} and {source.url} both have dataset id {source.dataset_id}: "
                "give them different ones with data.dataset_ids"
            )
    return sources


def _check_groups(source: Source, wanted: list[str], config: DataConfig) -> None:
    missing = [group for group in wanted if group not in source.groups]
    if missing and source.name not in config.allow_missing:
        raise ValueError(
            f"source {source.url} has no {' and no '.join(missing)}: turn that loss off, or put {source.name!r} "
            "into data.allow_missing to train its samples without it"
        )


def _check_agreement(first: Source, source: Source, config: DataConfig) -> None:
    if None not in (grids := {first.timesteps, source.timesteps}) and len(grids) > 1:
        raise ValueError(f"sources {first.url} and {source.url} differ in their timesteps")
    a, b = first.fields, source.fields
    differing = [f"{name}: {a[name]} against {b[name]}" for name in a if name in b and a[name] != b[name]]
    if differing:
        raise ValueError(f"sources {first.url} and {source.url} differ in {'; '.join(differing)}")
    differing = diff_producers(first.groups, source.groups, without=OWN)
    if differing and not {first.name, source.name} & set(config.allow_different):
        raise ValueError(
            f"sources {first.url} and {source.url} were not made the same way: {'; '.join(differing)}. "
            f"Put {source.name!r} into data.allow_different to use them together"
        )
