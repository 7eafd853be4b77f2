"""The sources of a run: opened alike on all ranks, and recorded in its checkpoints."""

from pathlib import Path

import torch.distributed as dist

from tinyflux.run.folders import newest_identity
from tinyflux.shards.config import DataConfig, open_sources, resolve_revisions
from tinyflux.shards.plan import PLAN_VERSION
from tinyflux.shards.source import Source
from tinyflux.shards.stream import Stream


def open_run_sources(config: DataConfig, groups: tuple[str, ...], checkpoints: Path) -> list[Source]:
    """The sources of a run, every remote one at the same revision on all ranks. Must be called on all ranks.

    What a checkpoint of the run recorded is read again (see `resolve_revisions`). Raises as `open_sources`.
    """
    found, error = [None, None], None
    if dist.get_rank() == 0:
        try:
            identity = newest_identity(checkpoints)
            found[0] = resolve_revisions(config, identity.get("revisions", {}))
        except (ValueError, OSError) as caught:  # the others must not wait for rank 0
            error, found[1] = caught, str(caught)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise error or ValueError(found[1])
    return open_sources(config, groups, found[0])


def data_identity(stream: Stream) -> dict:
    """What the order of a run's samples depends on besides the step."""
    c = stream.config
    sums = ["+".join(layer.manifest.sha256 for layer in s.layers) for s in stream.sources]
    manifests = dict(zip(stream.labels, sums, strict=True))
    commits = {s.url: s.revision for s in stream.sources if s.url.startswith("hf://")}
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
