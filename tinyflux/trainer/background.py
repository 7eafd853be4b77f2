"""Work of rank 0 beside the training, in a thread: pictures are decoded there, and scored."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch.distributed as dist


class Background:
    """A thread that does one piece of work after the other; those that come while it is busy may be left out."""

    def __init__(self, name: str):
        self._executor = ThreadPoolExecutor(1, name)
        self._newest: Future | None = None

    def is_busy(self) -> bool:
        """Whether rank 0 is still at it. Must be called on all ranks."""
        busy = [self._newest is not None and not self._newest.done()]
        dist.broadcast_object_list(busy, src=0)
        return busy[0]

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Do this too, after all that was submitted before."""
        self._newest = self._executor.submit(work, *arguments)

    def wait(self, patience: float | None = None) -> bool:
        """Wait until all is done, for at most `patience` seconds. Returns whether it is."""
        return self._newest is None or not wait([self._newest], patience).not_done
