"""`tinyflux COMMAND ...` and `python -m launch COMMAND ...`: the commands of this package under one name.

A command's module runs as `__main__`, so options, output and exit status are the same as when it is run directly.
"""

import runpy
import sys
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "build": ("sharding.build", "images and captions -> shards"),
    "verify": ("sharding.verify", "check or repair a source"),
    "inspect": ("sharding.inspect", "show what is in a source, as text or as a page"),
    "push": ("sharding.push", "upload a source to a dataset repo on the Hub"),
    "pull": ("sharding.pull", "download a source from the Hub, a bucket or a web server"),
    "plan": ("launch.plan", "show what each rank sees at a step"),
    "train": ("launch.train", "train on sources, on one device"),
    "torchrun": ("launch.torchrun", "several devices: tinyflux torchrun --nproc_per_node 8 -m launch.train ..."),
    "sample": ("launch.sample", "prompts -> pictures"),
    "app": ("launch.app", "a page to draw with, in the browser"),
    "evaluate": ("launch.evaluate", "scores of a checkpoint on held-out samples"),
    "report": ("tinyflux.run.report", "write a run's report again, with an earlier run's curves"),
    "export": ("tinyflux.run.export", "export a checkpoint's weights in the published layout"),
    "demo": ("launch.demo", "try everything offline, in minutes"),
}


def usage() -> str:
    """The help text: one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: tinyflux COMMAND [OPTION ...]", "", *lines, "", "Options: tinyflux COMMAND --help"])


def main() -> int:
    """Run the command that the first argument names. Returns the exit status, or exits with the command's own."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        try:
            print(version("tinyflux-deep"))
        except PackageNotFoundError:
            print("unknown: the package is not installed, it runs from its source folder")
        return 0
    if name not in COMMANDS:
        from tinyflux.util.settings import did_you_mean

        print(f"error: no command {name!r}: {did_you_mean(name, COMMANDS)}" if name else usage(), file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    sys.argv = [f"tinyflux {name}", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
