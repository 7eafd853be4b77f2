"""What a run reads: its sources, checked to go together, and the sizes of its batches."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tinyflux.shards.manifest import OWN, diff_producers
from tinyflux.shards.remote import NodeCache, RemoteStore, is_remote, without_revision
from tinyflux.shards.schema import SCHEMA
from tinyflux.shards.source import Source, open_source


@dataclass
class DataConfig:
    """What a run reads and in which order."""

    sources: list[str] = field(default_factory=list)
    """Folders or URLs of the sources: hf://datasets/USER/REPO[@REVISION][/FOLDER], s3://, gs://, http(s)://."""
    weights: list[float] | None = None
    """One positive number a source: its share of every batch. Default: the sources' sample counts."""
    dataset_ids: list[int] | None = None
    """One id a source, instead of those in the manifests."""
    global_batch_size: int = 256
    """Samples of one optimizer step on all ranks: a multiple of ranks x micro_batch_size."""
    micro_batch_size: int = 32
    """Samples of one forward pass on one rank; gradient accumulation follows from it."""
    seed: int = 0
    """Decides the order of the samples and every random draw of training."""
    val_fraction: float = 0.0
    """Share of the images that is held out for validation."""
    slots_per_stream: int = 8
    """Samples of a batch that come from one shard at a time: more means fewer open shards and less mixing."""
    resample: Literal["pass", "replace"] = "pass"
    """"pass": every sample once a pass, in a new order each time. "replace": runs of samples from random places."""
    threads: int = 2
    """Decoding threads on each rank."""
    prefetch: int = 2
    """Micro-batches that are ready ahead of the training loop."""
    open_shards: int = 64
    """Shards that a rank keeps open."""
    cache_dir: str | None = None
    """Where a node keeps shards of remote sources. Default: $TINYFLUX_CACHE/shards or ~/.cache/tinyflux/shards."""
    cache_gb: float = 100.0
    """Size limit of that folder, in GB."""
    timeout: float = 1800.0
    """Seconds that a rank waits for a shard before it gives up and says for which."""
    max_bad_samples: int = 100
    """A rank stops after this many different bad samples (20 in a row stop it too)."""
    allow_missing: list[str] = field(default_factory=list)
    """Names of sources that may lack Lune or Sol; their samples carry a mask and add no such loss."""
    allow_different: list[str] = field(default_factory=list)
    """Names of sources whose producer (models, revisions, scaling) may differ from the first source's."""

    def __post_init__(self):
        for name in ("global_batch_size", "micro_batch_size", "slots_per_stream", "threads", "prefetch", "open_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, must be at least 1")
        if self.max_bad_samples < 0:
            raise ValueError(f"data.max_bad_samples is {self.max_bad_samples}, must be at least 0")
        for name in ("cache_gb", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}, must be positive")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}, must be in [0, 1)")
        if self.resample not in ("pass", "replace"):
            raise ValueError(f"data.resample is {self.resample!r}, must be 'pass' or 'replace'")
        for name in ("weights", "dataset_ids"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.sources):
                raise ValueError(f"data.{name} has {len(given)} entries for {len(self.sources)} sources")
        if self.weights is not None and not all(np.isfinite(w) and w > 0 for w in self.weights):
            raise ValueError(f"data.weights is {self.weights}, must be positive numbers")
        if self.dataset_ids is not None and min(self.dataset_ids, default=0) < 0:
            raise ValueError(f"data.dataset_ids is {self.dataset_ids}, must be integers from 0")

    def accumulation(self, world: int) -> int:
        """Micro-batches of a rank in one step. Raises ValueError where the global batch doesn't divide."""
        steps, rest = divmod(self.global_batch_size, world * self.micro_batch_size)
        if rest:
            raise ValueError(
                f"data.global_batch_size is {self.global_batch_size}, must be a multiple of "
                f"ranks x data.micro_batch_size = {world} x {self.micro_batch_size} = {world * self.micro_batch_size}"
            )
        return steps


def resolve_revisions(config: DataConfig, recorded: dict[str, str]) -> list[str | None]:
    """What pins each source's content now, for `open_sources` on all ranks; None for local ones.

    recorded: {url: commit} of the run's checkpoint. A Hub source stays at its commit there, although the branch may
    have moved on, unless its URL now names another revision. Raises ValueError, DownloadError.
    """
    cache = NodeCache(config.cache_dir, int(config.cache_gb * 1e9))
    known = {without_revision(url): commit for url, commit in recorded.items()} | recorded
    return [known.get(url) or RemoteStore(url, cache).revision if is_remote(url) else None for url in config.sources]


def open_sources(
    config: DataConfig, groups: tuple[str, ...] = tuple(SCHEMA), revisions: list[str] | None = None
) -> list[Source]:
    """Open the sources of a run and check that they go together.

    groups: those that the run reads (a loss that is off needs no group of its own); latents and texts are always read.
    revisions: those of the sources as another rank or an earlier run opened them, to read the very same content.
    Raises ValueError or OSError, saying which source and field.
    """
    if not config.sources:
        raise ValueError("data.sources is empty: name at least one source folder")
    ids = config.dataset_ids or [None] * len(config.sources)
    cache = NodeCache(config.cache_dir, int(config.cache_gb * 1e9))
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
    for source in sources:
        _check_agreement(sources[0], source, wanted, config)
    owners: dict[int, Source] = {}
    for source in sources:
        other = owners.setdefault(source.dataset_id, source)
        if other is not source:
            raise ValueError(
                f"sources {other.url} and {source.url} both have dataset id {source.dataset_id}: "
                "give them different ones with data.dataset_ids"
            )
    return sources


def _check_agreement(first: Source, source: Source, wanted: list[str], config: DataConfig) -> None:
    missing = [group for group in wanted if group not in source.groups]
    if missing and source.name not in config.allow_missing:
        raise ValueError(
            f"source {source.url} has no {' and no '.join(missing)}: turn that loss off, or put {source.name!r} "
            "into data.allow_missing to train its samples without it"
        )
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
