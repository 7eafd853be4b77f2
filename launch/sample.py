"""Prompts to a picture with a trained TinyFlux: a checkpoint file, a run folder, or a Hub repo.

python launch/sample.py --checkpoint runs/mine --prompt "a red circle on a blue background" --out grid.png
python launch/sample.py --checkpoint AbstractPhil/tinyflux-deep --prompt "a portrait" "a house" --seed 3
python launch/sample.py --checkpoint runs/mine --prompt-file prompts.txt --solver heun --guidance-interval 0.1 0.8

Zoo, shift, guidance and size are those of the run unless given. The PNG has its parameters in the text chunk
"parameters", as JSON.
"""

import logging
import sys

import tyro

from tinyflux.trainer.drawing import SampleOptions, sample


def main(argv: list[str]) -> int:
    """Parse, sample, print the paths. Returns the exit status."""
    try:
        options = tyro.cli(SampleOptions, args=argv, description=__doc__)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        logging.getLogger("tinyflux").setLevel(logging.INFO)
        for path in sample(options):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
