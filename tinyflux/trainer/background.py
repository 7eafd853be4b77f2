"""A background thread on rank 0 that decodes and scores pictures during training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch.distributed as dist

from tinyflux.util.log import say


class Background:
    """A thread that does one job after the other. Callers may skip a job while it is busy."""

    def __init__(self, name: str):
        self.name, self._executor = name, ThreadPoolExecutor(1, name)
        self._newest: Future | None = None

    def is_busy(self) -> bool:
        """Whether rank 0 is still working. Must be called on all ranks."""
        busy = [self._newest is not None and not self._newest.done()]
        dist.broadcast_object_list(busy, src=0)
        return busy[0]

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Do this after all earlier jobs."""
        self._newest = self._executor.submit(self._do, work, *arguments)

    def _do(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001  one that the job does not handle, such as MemoryError
            say(f"WARNING: {self.name}: {error!r}; training continues")

    def wait(self, patience: float | None = None) -> bool:
        """Wait at most `patience` seconds until all jobs are done. Returns whether they are."""
        return self._newest is None or not wait([self._newest], patience).not_done
