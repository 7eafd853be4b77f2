"""A command that waits at certain places until a test lets it go on: so the test strikes there on any machine.

    python tests/held.py launch/train.py ...            (or the name of a module, such as sharding.build)

The environment variable HOLDS has the places, {place: file}, as JSON. A process waits at a place until its file exists:

    start       training, after the imports; until all ranks have come, which the file's name with their numbers says
    step N      training, before its step N, counted from 0
    save N      training, when all files of checkpoint step_N are written except its metadata.json
    shards      building, before a shard is written, while at least as many are finished as the file's number says
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

HOLDS = "TINYFLUX_HOLDS"


def holding(places: dict[str, Path]) -> dict[str, str]:
    """The environment variable that makes a command wait."""
    return {HOLDS: json.dumps({place: str(path) for place, path in places.items()})}


def wait_at(place: str) -> None:
    """Wait until the place's file exists, if it has one."""
    if file := json.loads(os.environ[HOLDS]).get(place):
        while not os.path.exists(file):
            time.sleep(0.005)


def before(owner: object, name: str, wait: Callable[..., None]) -> None:
    """Have `wait` called before each call of a function, with its arguments."""
    function = getattr(owner, name)

    def waiting(*args, **kwargs):
        wait(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, waiting)


def hold_training() -> None:
    from tinyflux.run import checkpoint
    from tinyflux.trainer.start import Trainer

    if file := json.loads(os.environ[HOLDS]).get("start"):
        Path(f"{file}.{os.environ['RANK']}").touch()
        while not all(os.path.exists(f"{file}.{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))):
            time.sleep(0.005)
    before(Trainer, "train_step", lambda trainer, _: wait_at(f"step {trainer.step}"))
    before(checkpoint, "write_metadata", lambda folder, metadata: wait_at(f"save {metadata['step']}"))


def hold_building() -> None:
    from tinyflux.precache import engine

    limit = Path(json.loads(os.environ[HOLDS])["shards"])

    def wait(path: Path, *_) -> None:
        while len(list(path.parent.glob(".build/0*.json"))) >= int(limit.read_text()):
            time.sleep(0.005)

    before(engine, "write_shard", wait)


if __name__ == "__main__":
    command, sys.argv = sys.argv[1], sys.argv[1:]
    if command == "sharding.build":
        hold_building()
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    else:
        hold_training()
        runpy.run_path(command, run_name="__main__")
