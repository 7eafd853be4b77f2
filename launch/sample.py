"""Prompts -> pictures with a trained TinyFlux: a checkpoint file, a run folder, or a Hub repo.

python launch/sample.py --checkpoint runs/mine --prompt "a red circle on a blue background" --out grid.png
python launch/sample.py --checkpoint AbstractPhil/tinyflux-deep --prompt "a portrait" "a house" --seed 3
python launch/sample.py --checkpoint runs/mine --prompt-file prompts.txt --solver heun --guidance-interval 0.1 0.8

Zoo, shift, guidance and size default to those of the run. The PNG stores its parameters as JSON in the text chunk
"parameters".
"""

import logging
import sys

from tinyflux.trainer.drawing import SampleOptions, sample
from tinyflux.util import cli


def command(options: SampleOptions) -> None:
    """Sample and print the paths of the pictures."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tinyflux").setLevel(logging.INFO)
    for path in sample(options):
        print(path)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return cli.run(command, SampleOptions, argv, prog="sample", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
