"""What a run will see: the samples of a step on each rank, and the shares of the sources up to it.

    python launch/plan.py --step 100 --ranks 8 --config FILE.toml
    python launch/plan.py --step 100 --data.sources data/portraits data/imagenet --data.weights 0.7 0.3

Only the [data] table of the file is read; its keys are options too, as in training. Of a remote source only the
manifest is fetched, so its samples are shown without keys.
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

HEAD = ("rank", "slot", "source", "shape", "shard", "row", "key")


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
    """Rows of HEAD: the samples of a step in slot order. A bad sample, which training would replace, says so."""
    from tinyflux.shards.format import ShardError

    draws = reader.plan.batch(step)
    for slot, row in enumerate(reader.locate(draws).tolist()):
        s, shard, key = int(draws.source[slot]), int(draws.shard[slot]), "-"
        source, shape = reader.sources[s], "x".join(map(str, reader.plan.shapes[draws.shape[slot]]))
        if all(layer.store.cache is None for layer in source.layers):  # no remote shard is fetched for it
            try:
                key = reader.shards.get(s, shard).key(row)
            except ShardError as error:
                key = f"bad: {error}"
        yield slot * ranks // len(draws), slot, source.name, shape, source.manifest.shards.name(shard), row, key


def shares(reader: "Reader", step: int) -> Iterator[tuple]:
    """Rows of the second table: what each source has given once the step is done, and what was asked for."""
    plan = reader.plan
    taken = plan.start(step + 1)
    for source, weight, count in zip(plan.sources, plan.weights(step), taken, strict=True):
        yield source.name, count, f"{count / sum(taken):.4%}", f"{weight:.4%}", f"{count / source.total:.2f}"


def show(options: Options) -> None:
    """Print both tables. Raises as `open_sources`."""
    from tinyflux.shards.reader import Reader
    from tinyflux.shards.sources import open_sources

    config, step, ranks = options.data, options.step, options.ranks
    micro_batches = config.accumulation(ranks)
    reader = Reader(open_sources(config, ()), config, ranks)
    if len(reader.plan.shapes) > 1:
        config.check_shapes(ranks)
    batch = f"{config.global_batch_size} samples, on each of {ranks} ranks {micro_batches} micro-batches"
    print(f"step {step}, seed {config.seed}: {batch}")
    print(cli.table([HEAD, *samples(reader, step, ranks)]), end="\n\n")
    print(cli.table([("source", "samples", "share", "requested", "passes"), *shares(reader, step)]))


def main(argv: list[str]) -> int:
    """The command. Returns the exit status."""

    def command() -> int:
        tables = ("model", "trainer", "parallel")  # a run's other tables
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
