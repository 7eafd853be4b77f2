"""Precache a source: images and captions -> shards of latents, text states and teacher features.

    python -m sharding.build --source shapes --zoo tiny --limit 200     a first try, offline
    python -m sharding.build --source portraits --sources my.toml       writes to data/portraits
    python -m sharding.build --source cache/old --kind cache            converts a legacy cache, without any models
    torchrun --nproc-per-node 8 -m sharding.build --source portraits    the same on 8 devices
    sbatch --array=0-31 launch/slurm/build.sbatch --source portraits    the same as 32 jobs of a SLURM array
    python -m sharding.build --source portraits --only lune --out data/portraits-lune    an overlay that adds Lune

After an interruption the same command resumes.
"""

import sys
import warnings
from pathlib import Path

from tinyflux.precache.config import BuildConfig, Place
from tinyflux.util import cli


def build(config: BuildConfig) -> int:
    """Build the source, or this rank's share of it. Returns the exit status.

    Raises ValueError, OSError or RuntimeError with a message for the user.
    """
    from tinyflux.precache.sources import find_source, load_sources, table

    if config.list:
        print(table(load_sources(config.sources)))
        return cli.DONE
    import transformers

    from tinyflux.precache.build import build, estimate, recipe_of
    from tinyflux.precache.ledger import Ledger

    transformers.logging.disable_progress_bar()  # the build has its own progress bar
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata, and sizes that max_pixels rejects
    source, place = find_source(config.source, config.sources, config.kind, config.dataset_id), Place.of_environment()
    out = Path(config.out or Path("data") / source.name)
    ledger = Ledger(out, source.name, source.dataset_id, place.rank, place.world)
    recipe = recipe_of(source, config.only)(config, source, ledger, place)
    return estimate(recipe, place.world) if config.estimate else build(recipe)


def main(args: list[str] | None = None) -> int:
    """The command; `args` default to those of the process."""
    # RuntimeError: out of memory, a lost device, a model that cannot be loaded
    return cli.run(
        build, BuildConfig, args, prog="python -m sharding.build", description=__doc__, failures=(RuntimeError,)
    )


if __name__ == "__main__":
    sys.exit(main())
