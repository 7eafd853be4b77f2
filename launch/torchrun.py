"""torchrun for ./torchrun.sh: it forwards signals and exit status 75, and shows an error in one line.

Plain torchrun kills its workers 30 s after SIGTERM, dies of SIGUSR1, turns every status into 1 and reports a failed
rank in 34 lines. Restarted ranks get a new store: with a shared one, torch 2.13 gives them the addresses of dead ranks.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import main

from tinyflux.util import cli

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# a worker that gets the signal before it has installed its handlers dies of it, and has nothing to save
STOPPED = {cli.SAVED, *(-number for number in FORWARDED)}
SHUTDOWN = "600"
"""Seconds between SIGTERM and SIGKILL when torch itself ends the workers."""


def forward(number: int, _frame) -> None:
    """Send a signal to the workers: each is in its own session, so a signal to our process group misses them."""
    workers = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    for pid in workers:
        os.kill(int(pid), number)
    if not workers:  # the nodes are still at the rendezvous: there is nothing to save
        sys.exit(cli.SAVED)


def status(failures: dict[int, ProcessFailure]) -> int:
    """The exit status of a job whose failed ranks these are. Prints the errors that no rank has printed itself.

    failures: keyed by rank.
    """
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    codes = [failure.exitcode for failure in failures.values()]
    if cli.INTERRUPTED in codes:
        return cli.INTERRUPTED
    if cli.SAVED in codes or STOPPED.issuperset(codes):
        return cli.SAVED
    told = {rank: failure.message["message"] for rank, failure in failures.items() if isinstance(failure.message, dict)}
    seen = {told[rank] for rank in told if failures[rank].local_rank == 0}  # local rank 0 prints its error itself
    for rank, message in sorted(told.items()):
        if message not in seen:
            print(f"error: rank {rank}: {message}", file=sys.stderr)
            seen.add(message)
    if failures[first].exitcode < 0 and not told:
        name = signal.Signals(-failures[first].exitcode).name
        reason = " (most often out of memory)" if name == "SIGKILL" else ""
        print(f"error: rank {first} on {os.uname().nodename} died of {name}{reason}", file=sys.stderr)
    positive = [code for code in codes if code > 0]
    return failures[first].exitcode if failures[first].exitcode > 0 else max(positive, default=cli.FAILED)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN)
    # torch's logs about a failed worker or a forwarded signal; `status` prints the important part
    for name in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").setLevel(logging.CRITICAL)
    for number in FORWARDED:
        signal.signal(number, forward)
    ours = ["--signals-to-handle", "SIGHUP,SIGQUIT"] if hasattr(LaunchConfig, "signals_to_handle") else []
    try:
        main([*ours, *sys.argv[1:]])
    except ChildFailedError as error:
        sys.exit(status(error.failures))
