"""Fixtures of several test files, and the server that all workers of a pytest run share."""

import os
import threading

import pytest

from tests.forked import fork_server

# several workers of pytest share the cores: torch on one of them, and no pool of compilers
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

LONGEST = ("test_slurm.py", "test_parallel.py", "test_restart.py")
"""Files that are begun first, lest the other workers wait for them in the end."""


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has its controller's
        server = fork_server()
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture
def one_thread():
    """Torch on one thread: the order of a sum depends on it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def retried(monkeypatch) -> threading.Event:
    """Set as soon as a download has failed and is about to be tried again."""
    from tinyflux.shards.remote import Patience

    event, wait = threading.Event(), Patience.wait
    monkeypatch.setattr(Patience, "wait", lambda *arguments: event.set() or wait(*arguments))
    return event


@pytest.fixture
def alone(monkeypatch):
    """No rank of another job, and the same number of threads after a build as before."""
    import torch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
