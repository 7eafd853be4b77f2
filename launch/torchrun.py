"""torchrun that passes on SIGUSR1 and exit status 75, for ./torchrun.sh: its own dies of the one and exits with 1.

Ranks that are started again get a store of their own: torch 2.13 would show them the dead ones' addresses.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

PREEMPTED = 75  # of tinyflux.trainer.trainer, whose import would take seconds
# a worker that is told before its loop listens dies of the signal, and has nothing to save
STOPPED = {PREEMPTED, -signal.SIGUSR1}


def forward(number: int, _frame) -> None:
    """Send a signal to the workers: they have sessions of their own, so a signal to our group misses them."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            os.kill(int(pid), number)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    signal.signal(signal.SIGUSR1, forward)
    try:
        main()
    except ChildFailedError as error:
        if STOPPED.isdisjoint(failure.exitcode for failure in error.failures.values()):
            raise
        sys.exit(PREEMPTED)
