"""Does distillation help? The demo's network with and without the teachers Lune and Sol.

python tests/bench/distil.py --sources demo/data/shapes demo/data/patterns [--out bench-runs]

Without a teacher, its head is trained only by the main loss. `launch/demo.py` builds the sources. Finished runs are not
run again.
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.demo_runs import Variant, compare

ADAMW = ("--trainer.optimizer", "adamw")


def main(
    sources: tuple[Path, Path], out: Path = Path("bench-runs"), steps: int = 800, seeds: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Train all of it and print a table.

    Args:
        sources: the demo's shapes and patterns.
        out: folder of the runs.
        steps: of each run.
        seeds: of weights, data order and draws.
    """
    without = ("--trainer.no-enable-lune", "--trainer.no-enable-sol")
    variants = [Variant("adamw", steps, ADAMW), Variant("adamw without teachers", steps, (*ADAMW, *without))]
    compare(out, sources, seeds, variants)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
