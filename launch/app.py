"""A page to draw with, in the browser: prompts, settings, and the checkpoints of a run side by side.

python launch/app.py --checkpoint runs/mine
python launch/app.py --checkpoint AbstractPhil/tinyflux-deep --port 8080 --out pictures

Needs gradio: pip install 'tinyflux-deep[app]'. The page listens on localhost only and loads nothing from the internet.
From another machine: ssh -L 7860:localhost:7860 HOST, then http://localhost:7860. Each picture stores its settings.
"""

import logging
import sys

from tinyflux.trainer.app import AppOptions, app
from tinyflux.util import cli


def command(options: AppOptions) -> None:
    """Serve the page until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    app(options)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return cli.run(command, AppOptions, argv, prog="app", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
