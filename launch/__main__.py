"""`tinyflux COMMAND ...` and `python -m launch COMMAND ...`: the commands of this package under one name.

A command's module runs as if it had been started itself, so that options, output and exit status are the very same.
"""

import difflib
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "build": ("sharding.build", "images and captions -> shards"),
    "verify": ("sharding.verify", "check a source, repair it"),
    "inspect": ("sharding.inspect", "show what is in a source, in words or as a page"),
    "push": ("sharding.push", "upload a source to a dataset repo of the Hub"),
    "pull": ("sharding.pull", "fetch a source from anywhere"),
    "plan": ("launch.plan", "what each rank of a training sees at a step"),
    "train": ("launch.train", "train on sources, on one device"),
    "torchrun": ("launch.torchrun", "several devices: tinyflux torchrun --nproc_per_node 8 -m launch.train ..."),
    "sample": ("launch.sample", "prompts -> pictures"),
    "app": ("launch.app", "a page to draw with, in the browser"),
    "evaluate": ("launch.evaluate", "scores of a checkpoint on held-out samples"),
    "report": ("tinyflux.run.report", "write the page of a run again, over an earlier run's curves"),
    "export": ("tinyflux.run.export", "weights out of a checkpoint, in the published layout"),
    "demo": ("launch.demo", "all of it, offline, in minutes"),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: tinyflux COMMAND [OPTION ...]", "", *lines, "", "tinyflux COMMAND --help says more."])


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
            print("not installed: run from its folder")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        told = f"error: no command {name!r}{f', did you mean {near[0]}?' if near else ''}\n\n" if name else ""
        print(f"{told}{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    sys.argv = [f"tinyflux {name}", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
