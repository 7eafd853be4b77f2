"""What a run will see: the samples of a step on each rank, and each source's share of all samples so far.

    python launch/plan.py --step 100 --ranks 8 --config FILE.toml
    python launch/plan.py --step 100 --data.sources data/portraits data/imagenet --data.weights 0.7 0.3

Only the [data] table of the file is read; its keys are options too, as in training. For a remote source only the
manifest is downloaded, so its samples are shown without keys.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tinyflux.shards.config import DataConfig
from tinyflux.util import cli, settings
from tinyflux.util.settings import AtLeast

if TYPE_CHECKING:  # torch takes seconds to import
    from tinyflux.shards.reader import Reader

HEAD = ("rank", "slot", "source", "shape", "shard", "row", "caption", "key", "prompt")
LONGEST = 60  # characters of a prompt


@dataclass
class Options:
    step: Annotated[int, AtLeast(0)]
    """The step to show; the first is 0."""
    ranks: Annotated[int, AtLeast(1)] = 1
    """Ranks of the run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources and batches."""

    def __post_init__(self):
        settings.check(self)


def samples(reader: "Reader", step: int, ranks: int) -> Iterator[tuple]:
    """Rows of HEAD: the samples of a step in slot order. The key of a bad sample is its error.

    caption: the drawn caption and the number of captions, such as 2/3.
    """
    import numpy as np

    from tinyflux.shards.format import ShardError
    from tinyflux.shards.reader import caption_of
    from tinyflux.util import rng

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


def shares(reader: "Reader", step: int) -> Iterator[tuple]:
    """Rows of the second table: each source's samples up to and including the step, and its requested share."""
    plan = reader.plan
    taken = plan.start(step + 1)
    for source, weight, count in zip(plan.sources, plan.weights(step), taken, strict=True):
        share, passes = f"{count / sum(taken):.4%}", f"{count / source.total:.2f}"
        yield source.name, count, share, f"{weight:.4%}", passes


def layers(config: DataConfig) -> Iterator[tuple]:
    """Rows of the third table: where the groups of each source are stored, in its base and overlays."""
    from tinyflux.shards.cache import NodeCache
    from tinyflux.shards.source import open_source

    cache = NodeCache(config.cache_dir, int(config.cache_gb * 1e9), config.timeout)
    for url in config.sources:
        source = open_source(url, cache=cache)
        for i, layer in enumerate(source.layers):
            yield source.name, "overlay" if i else "base", ", ".join(layer.groups), layer.url


def show(options: Options) -> None:
    """Print the tables. Raises as `open_sources`."""
    from tinyflux.shards.reader import Reader
    from tinyflux.shards.sources import open_sources

    config, step, ranks = options.data, options.step, options.ranks
    micro_batches = config.accumulation(ranks)
    reader = Reader(open_sources(config, ()), config, ranks)
    if len(reader.plan.shapes) > 1:
        config.check_shapes(ranks)
    batch = f"{config.global_batch_size} samples, {micro_batches} micro-batches on each of {ranks} ranks"
    print(f"step {step}, seed {config.seed}: {batch}")
    print(cli.table([HEAD, *samples(reader, step, ranks)]), end="\n\n")
    print(cli.table([("source", "samples", "share", "requested", "passes"), *shares(reader, step)]), end="\n\n")
    print(cli.table([("source", "layer", "groups", "from"), *layers(config)]))


def main(argv: list[str]) -> int:
    """The command. Returns the exit status."""

    def command() -> int:
        tables = ("model", "trainer", "parallel")  # the other tables of a run's config
        options, _ = settings.load(
            Options,
            argv,
            presets=Path(__file__).parent / "configs",
            description=__doc__,
            prog="python launch/plan.py",
            ignored=tables,
        )
        show(options)
        return cli.DONE

    return cli.report(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
