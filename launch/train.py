"""Train TinyFlux on precached shards.

    ./torchrun.sh launch/train.py --config deep-8gpu --run-dir runs/mine \\
        --data.sources data/portraits data/imagenet --data.weights 0.7 0.3
    torchrun --nproc_per_node 8 launch/train.py --config FILE.toml --run-dir DIR      (plain torchrun)
    python launch/train.py --config FILE.toml --run-dir DIR              (one device)
    ... --dry-run                                                        (sizes, memory, data speed; starts nothing)

Every key of a config file is an option too, such as --trainer.total-steps 300. The same command resumes the run.
Exit status: 0 done, 1 failed, 2 refused before anything started, 75 stopped by a signal, checkpoint saved (run the
same command to resume).
"""

import sys
from pathlib import Path

from tinyflux.trainer.config import load_config
from tinyflux.util import cli

PRESETS = Path(__file__).parent / "configs"


def train(argv: list[str]) -> int:
    """Read the settings, then train. The trainer is imported late because that takes seconds."""
    config, given = load_config(argv, PRESETS, __doc__)
    from tinyflux.trainer.start import start

    return start(config, given)


def main(argv: list[str]) -> int:
    """The command. Returns the exit status."""
    return cli.report(lambda: train(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
