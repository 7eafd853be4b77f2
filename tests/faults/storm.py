"""A training on two ranks that is repeatedly killed at random moments has the losses of an uninterrupted one.

    python tests/faults/storm.py [--kills 15] [--steps 60]

Each start is killed (SIGKILL: torchrun, one rank, or everything) at a random moment, also during its start, a save or a
validation; then the same command is run again. The last start ends by itself.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.forked import Forked, fork_server
from tests.training import curve, make_source, start_torchrun, train, workers

RANKS = 2


def kill(process: Forked, what: str) -> None:
    """Kill one rank, only torchrun, or everything."""
    ranks = workers(process)
    victims = {"rank": ranks[-1:], "torchrun": [process.pid], "all": [process.pid, *ranks]}[what]
    for pid in victims or [process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--longest", type=float, default=16.0, help="seconds until a kill, at most")
    args = parser.parse_args()
    dice, killed, folder = random.SystemRandom(), 0, Path(tempfile.mkdtemp())
    sources = [make_source(folder / "a", 1), make_source(folder / "b", 2, samples=40)]
    options = ("--trainer.total-steps", args.steps, "--trainer.save-every-steps", 3, "--data.val-fraction", 0.2)
    options += ("--trainer.validate-every", 4)
    done = train(folder / "unbroken", sources, *options, ranks=RANKS)
    assert done.returncode == 0, done.stdout
    run_dir = folder / "run"
    while killed < args.kills:
        process = start_torchrun(run_dir, sources, *options)
        what, moment = dice.choice(("rank", "torchrun", "all")), dice.uniform(1, args.longest)
        until = time.monotonic() + moment
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "run.log").read_text()[-3000:]
            break
        kill(process, what)
        killed += 1
        process.wait(timeout=120)  # of a dead rank, torchrun takes the other one down
        print(f"kill {killed}: {what} after {moment:.1f} s, at step {len(curve(run_dir))}", flush=True)
    done = train(run_dir, sources, *options, ranks=RANKS)
    assert done.returncode == 0, done.stdout
    same = curve(run_dir) == curve(folder / "unbroken")
    print(f"{killed} kills, {len(curve(run_dir))} steps: losses {'equal' if same else 'DIFFER'}, bit by bit; {folder}")
    return 0 if same else 1


if __name__ == "__main__":
    with fork_server():
        status = main()
    sys.exit(status)
