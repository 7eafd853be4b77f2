"""Scores of a checkpoint on held-out samples of a source, with the same samples and noise every time.

python launch/evaluate.py --checkpoint runs/mine --source data/portraits
python launch/evaluate.py --checkpoint runs/mine/checkpoints/step_5000 --source hf://datasets/user/repo/portraits

Writes the loss by t, the CLIP score and the CMMD (and the FID with --inception) as JSON, to TensorBoard at that step,
and as a page of the best and the worst pictures.
"""

import logging
import sys

from tinyflux.trainer.evaluate import EvaluateOptions, evaluate
from tinyflux.util import cli


def command(options: EvaluateOptions) -> None:
    """Evaluate and print the scores."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    path, scores = evaluate(options)
    rows = [(key, value) for key, value in scores.items() if key != "loss_by_t"]
    print(cli.table([*rows, *((f"loss at t={t}", value) for t, value in scores["loss_by_t"].items())]))
    print(path)
    print(path.with_suffix(".html"))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return cli.run(command, EvaluateOptions, argv, prog="evaluate", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
