"""The sources of a run: opened at the same revision on all ranks, and recorded in its checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from tinyflux.run.folders import newest_identity
from tinyflux.shards.clients import repo_of
from tinyflux.shards.config import DataConfig
from tinyflux.shards.plan import PLAN_VERSION
from tinyflux.shards.source import Source
from tinyflux.shards.sources import open_sources, resolve_revisions
from tinyflux.shards.stream import Stream


def open_run_sources(config: DataConfig, groups: tuple[str, ...], checkpoints: Path) -> list[Source]:
    """The sources of a run, every remote one at the same revision on all ranks. Must be called on all ranks.

    Revisions recorded in the run's checkpoint are used again (see `resolve_revisions`). If one rank fails, all raise:
    this rank its own error, the others ValueError or OSError with its message. Raises as `open_sources`.
    """
    revisions = [None]
    with _together():
        if dist.get_rank() == 0:
            identity = newest_identity(checkpoints)
            revisions = [resolve_revisions(config, identity.get("revisions", {}))]
    dist.broadcast_object_list(revisions, src=0)
    with _together():
        return open_sources(config, groups, revisions[0])


@contextmanager
def _together() -> Iterator[None]:
    """Leave the block on all ranks, or raise on all of them, so that no rank waits for one that has failed."""
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  it is raised below
        error = caught
    told = None if error is None else (isinstance(error, ValueError), f"rank {dist.get_rank()}: {error!r:.1000}")
    everyone: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    if error is not None:
        raise error
    for fault in filter(None, everyone):
        raise (ValueError if fault[0] else OSError)(fault[1])


def data_identity(stream: Stream) -> dict:
    """Everything that a run's data order depends on, besides the step."""
    c = stream.config
    sums = ["+".join(layer.manifest.sha256 for layer in s.layers) for s in stream.sources]
    manifests = dict(zip(stream.labels, sums, strict=True))
    commits = {s.url: s.revision for s in stream.sources if repo_of(s.url)}
    return {
        **({"revisions": commits} if commits else {}),
        "plan_version": PLAN_VERSION,
        "global_batch_size": c.global_batch_size,
        "unit": c.unit_size,
        "seed": c.seed,
        "sources": manifests,
        "dataset_ids": [s.dataset_id for s in stream.sources],
        "weights": [[step, *weights] for step, weights in stream.plan.weights_at.items()],
        "val_fraction": c.val_fraction,
        "slots_per_stream": c.slots_per_stream,
        "resample": c.resample,
    }
