"""How much faster does Muon train than AdamW?

python tests/bench/muon.py --sources demo/data/shapes demo/data/patterns [--out bench-runs]

AdamW trains once per seed; Muon trains as long, and also in shorter schedules. `launch/demo.py` builds the sources.
Finished runs are not run again.
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.demo_runs import Variant, compare


def main(
    sources: tuple[Path, Path],
    out: Path = Path("bench-runs"),
    steps: int = 800,
    shorter: tuple[float, ...] = (0.65,),
    seeds: tuple[int, ...] = (0, 1, 2),
    scale: float = 0.4,
) -> None:
    """Train all of it and print a table.

    Args:
        sources: the demo's shapes and patterns.
        out: folder of the runs.
        steps: of AdamW's schedule, and of Muon's first.
        shorter: Muon's other schedules, as parts of `steps`.
        seeds: of weights, data order and draws.
        scale: trainer.muon_scale.
    """
    muon = ("--trainer.optimizer", "muon", "--trainer.muon-scale", scale)
    variants = [Variant("adamw", steps, ("--trainer.optimizer", "adamw"))]
    variants += [Variant("muon", round(part * steps), muon) for part in (1, *shorter)]
    compare(out, sources, seeds, variants)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
