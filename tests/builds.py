"""A rank of a build as a process of its own, forked from a server that has the imports behind it."""

import multiprocessing
import os
import resource
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["sharding.build"])


def start(folder: Path, log: Path, args: list[str], env: dict[str, str], file_limit: int | None = None) -> BaseProcess:
    """`python -m sharding.build ARGS` in `folder`, its output in `log`; `file_limit` is the most bytes of a file."""
    process = _processes.Process(target=_rank, args=(folder, log, args, env, file_limit))
    process.start()
    return process


def _rank(folder: Path, log: Path, args: list[str], env: dict[str, str], file_limit: int | None) -> None:
    os.chdir(folder)
    os.environ.update(env)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    from sharding import build  # here, so that only the server and its forks import it

    sys.exit(build.main(args))
