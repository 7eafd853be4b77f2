"""Open the sources of a run and check that they are compatible."""

from collections import Counter

from tinyflux.shards.cache import NodeCache
from tinyflux.shards.clients import without_revision
from tinyflux.shards.config import DataConfig
from tinyflux.shards.manifest import OWN, diff_producers
from tinyflux.shards.remote import is_remote
from tinyflux.shards.schema import EXTRAS, SCHEMA
from tinyflux.shards.source import Source, open_source
from tinyflux.shards.store import open_store

DEFAULT_GROUPS = ("latents", "text", "lune", "sol", "mask")
"""The groups that a run reads by default."""


def resolve_revisions(config: DataConfig, recorded: dict[str, str]) -> list[str | None]:
    """The revision of each source, for `open_sources` on all ranks; None for local sources.

    recorded: {url: commit} of the run's checkpoint. A Hub source stays at this commit even if the branch has moved on,
    unless its URL now names another revision. Raises ValueError, DownloadError.
    """
    cache = NodeCache(config.cache_dir, int(config.cache_gb * 1e9), config.timeout)
    known = {without_revision(url): commit for url, commit in recorded.items()} | recorded
    return [known.get(url) or open_store(url, cache).revision if is_remote(url) else None for url in config.sources]


def open_sources(
    config: DataConfig, groups: tuple[str, ...] = DEFAULT_GROUPS, revisions: list[str] | None = None
) -> list[Source]:
    """Open the sources of a run and check that they are compatible.

    groups: the groups that the run needs, besides latents and texts (a loss that is off needs no group). revisions:
    revisions that another rank or an earlier run has opened, to read the same content.
    Raises ValueError or OSError with the source and field.
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
    wanted = [group for group in SCHEMA if group in groups and group not in EXTRAS]
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


def grids_of(sources: list[Source]) -> dict[str, tuple[float, ...]]:
    """The timestep grid of each group that has one, in any of these sources."""
    return {group: grid for source in sources for group, grid in source.grids.items()}


def differing_grid(a: dict[str, tuple], b: dict[str, tuple]) -> str | None:
    """A group that has different timestep grids in two sources."""
    return next((group for group in a if group in b and a[group] != b[group]), None)


def _check_agreement(first: Source, source: Source, config: DataConfig) -> None:
    if group := differing_grid(first.grids, source.grids):
        raise ValueError(f"sources {first.url} and {source.url} differ in the timesteps of {group}")
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


def usual_shape(sources: list[Source]) -> tuple[int, int]:
    """The latent shape (h, w) that most samples have; of equally frequent ones, the squarest."""
    counts: Counter[tuple[int, int]] = Counter()
    for source in sources:
        counts.update(source.manifest.samples_of_shapes())
    return max(counts, key=lambda shape: (counts[shape], min(shape) / max(shape)))
