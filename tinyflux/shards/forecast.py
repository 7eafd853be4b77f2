"""What a run will read, as rows of tables: a step's samples, the sources' shares, where their groups are stored."""

from collections.abc import Iterator

import numpy as np

from tinyflux.shards.format import ShardError
from tinyflux.shards.reader import Reader, caption_of
from tinyflux.shards.source import Source
from tinyflux.util import rng

SAMPLES = ("rank", "slot", "source", "shape", "shard", "row", "caption", "key", "prompt")
SHARES = ("source", "samples", "share", "requested", "passes")
LAYERS = ("source", "layer", "groups", "from")
LONGEST = 60  # characters of a prompt


def samples(reader: Reader, step: int, ranks: int) -> Iterator[tuple]:
    """Rows of SAMPLES: the samples of a step in slot order. The key of a bad sample is its error.

    caption: the drawn caption and the number of captions, such as 2/3.
    """
    draws, sources = reader.plan.batch(step), reader.sources
    rows = reader.locate(draws).tolist()
    places = zip(draws.source.tolist(), draws.shard.tolist(), rows, strict=True)
    counts = np.array([sources[s].captions[int(sources[s].manifest.starts[k]) + row] for s, k, row in places])
    chosen = caption_of(rng.sample_seeds(reader.config.seed, step, np.arange(len(draws))), counts).tolist()
    for slot, (row, caption) in enumerate(zip(rows, chosen, strict=True)):
        s, shard, key, prompt = int(draws.source[slot]), int(draws.shard[slot]), "-", "-"
        source, shape = sources[s], "x".join(map(str, reader.plan.shapes[draws.shape[slot]]))
        if all(layer.store.cache is None for layer in source.layers):  # do not download shards just to show keys
            try:
                file = reader.shards.get(s, shard)
                key, prompt = file.key(row), file.meta(row)["prompts"][caption]
            except (ShardError, IndexError) as error:
                key = f"bad: {error}"
        prompt = prompt if len(prompt) <= LONGEST else f"{prompt[:LONGEST]}..."
        where = (source.name, shape, source.manifest.shards.name(shard), row)
        yield slot * ranks // len(draws), slot, *where, f"{caption + 1}/{counts[slot]}", key, prompt


def shares(reader: Reader, step: int) -> Iterator[tuple]:
    """Rows of SHARES: each source's samples up to and including the step, and its requested share."""
    plan = reader.plan
    taken = plan.start(step + 1)
    for source, weight, count in zip(plan.sources, plan.weights(step), taken, strict=True):
        share, passes = f"{count / sum(taken):.4%}", f"{count / source.total:.2f}"
        yield source.name, count, share, f"{weight:.4%}", passes


def layers(sources: list[Source]) -> Iterator[tuple]:
    """Rows of LAYERS: where all groups of each source are stored, in its base and overlays, read or not."""
    for source in sources:
        for i, layer in enumerate(source.all_layers):
            yield source.name, "overlay" if i else "base", ", ".join(layer.groups), layer.url
