"""What a run will see: the samples of a step on each rank, and the shares of the sources up to it.

    python launch/plan.py --step 100 --ranks 8 --config FILE.toml
    python launch/plan.py --step 100 --data.sources data/portraits data/imagenet --data.weights 0.7 0.3

Of the file only the [data] table is read; its keys are options too, as in training. Of remote sources only the
manifests are fetched, so their samples are shown without keys.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import tyro

from tinyflux.shards.config import DataConfig, open_sources
from tinyflux.shards.format import ShardError
from tinyflux.shards.reader import Reader
from tinyflux.shards.store import LocalStore

HEAD = ("rank", "slot", "source", "shard", "row", "key")


@dataclass
class Options:
    step: int
    """The step to show; the first is 0."""
    ranks: int = 1
    """Ranks of the run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources and batches."""

    def __post_init__(self):
        for name, least in (("step", 0), ("ranks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")


def samples(reader: Reader, step: int, ranks: int) -> Iterator[tuple]:
    """Rows of HEAD: the samples of a step in slot order. A bad sample, which training would replace, says so."""
    draws = reader.plan.batch(step)
    for slot, (s, shard, row) in enumerate(zip(draws.source, draws.shard, draws.row, strict=True)):
        source = reader.sources[s]
        position = int(reader.train[s][reader.train_starts[s][shard] + row])  # `row` counts training samples only
        row, key = position - int(source.manifest.starts[shard]), "-"
        if isinstance(source.store, LocalStore):
            try:
                key = reader.shards.get(int(s), int(shard)).key(row)
            except ShardError as error:
                key = f"bad: {error}"
        yield slot * ranks // len(draws), slot, source.name, source.manifest.shards.name(shard), row, key


def shares(reader: Reader, step: int) -> Iterator[tuple]:
    """Rows of the second table: what each source has given once the step is done, and what was asked for."""
    plan = reader.plan
    taken = plan.start(step + 1)
    for source, weight, count in zip(plan.sources, plan.weights, taken, strict=True):
        yield source.name, count, f"{count / sum(taken):.4%}", f"{weight:.4%}", f"{count / source.total:.2f}"


def table(head: tuple, rows: list[tuple]) -> str:
    """Text in columns as wide as they need to be."""
    lines = [[str(value) for value in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def load_options(argv: list[str]) -> Options:
    """The options; the file's values come before the command line's. Raises ValueError, OSError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(argv)
    arguments = []
    if known.config:
        try:
            data = tomllib.loads(Path(known.config).read_text()).get("data", {})
        except ValueError as error:
            raise ValueError(f"{known.config}: {error}") from error
        accepted = [f.name for f in fields(DataConfig)]
        for key, value in data.items():
            if key not in accepted:
                raise ValueError(f"{known.config}: unknown key data.{key}. Accepted here: {', '.join(accepted)}")
            values = value if isinstance(value, list) else [value]
            arguments += [f"--data.{key.replace('_', '-')}", *map(str, values)]
    return tyro.cli(Options, args=arguments + rest, prog="python launch/plan.py", description=__doc__)


def main(argv: list[str]) -> int:
    """The command. Returns the exit status."""
    try:
        options = load_options(argv)
        config, step, ranks = options.data, options.step, options.ranks
        micro_batches = config.accumulation(ranks)
        reader = Reader(open_sources(config, ()), config)
        batch = f"{config.global_batch_size} samples, on each of {ranks} ranks {micro_batches} micro-batches"
        print(f"step {step}, seed {config.seed}: {batch}")
        print(table(HEAD, list(samples(reader, step, ranks))), end="\n\n")
        print(table(("source", "samples", "share", "requested", "passes"), list(shares(reader, step))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
