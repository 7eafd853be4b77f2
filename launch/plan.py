"""What a run will see: the samples of a step on each rank, and each source's share of all samples so far.

    python launch/plan.py --step 100 --ranks 8 --config FILE.toml
    python launch/plan.py --step 100 --data.sources data/portraits data/imagenet --data.weights 0.7 0.3

Only the [data] table of the file is read; its keys are options too, as in training. For a remote source only the
manifest is downloaded, so its samples are shown without keys.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tinyflux.shards.config import DataConfig
from tinyflux.util import cli, settings
from tinyflux.util.settings import AtLeast


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


def show(options: Options) -> None:
    """Print the tables. Raises as `open_sources`."""
    from tinyflux.shards import forecast  # torch takes seconds to import
    from tinyflux.shards.reader import Reader
    from tinyflux.shards.sources import open_sources

    config, step, ranks = options.data, options.step, options.ranks
    micro_batches = config.accumulation(ranks)
    reader = Reader(open_sources(config, ()), config, ranks)
    if len(reader.plan.shapes) > 1:
        config.check_shapes(ranks)
    batch = f"{config.global_batch_size} samples, {micro_batches} micro-batches on each of {ranks} ranks"
    print(f"step {step}, seed {config.seed}: {batch}")
    print(cli.table([forecast.SAMPLES, *forecast.samples(reader, step, ranks)]), end="\n\n")
    print(cli.table([forecast.SHARES, *forecast.shares(reader, step)]), end="\n\n")
    print(cli.table([forecast.LAYERS, *forecast.layers(reader.sources)]))


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
