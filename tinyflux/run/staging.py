"""The copy of a run's state that a checkpoint is written from while training continues."""

from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Staging:
    """One set of CPU buffers, pinned where the state is on a GPU, that every save uses again: to get fresh memory from
    the system takes many times as long as to copy into it.

    state: name -> tensor, as every later one will be; only its shapes and placements matter. The buffers are made in
    `executor`, so that a training can start meanwhile.
    """

    def __init__(self, state: dict[str, Tensor], executor: Executor):
        self.on_gpu = any(x.is_cuda for x in state.values())
        self._buffers = executor.submit(self._allocate, state)

    @torch.no_grad()
    def _allocate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = {name: torch.empty_like(x, device="cpu", pin_memory=self.on_gpu) for name, x in state.items()}
        for x in buffers.values():
            _local(x).zero_()  # the system gives memory when it is written to
        return buffers

    @torch.no_grad()
    def copy(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Begin to copy a state; the steps after it may change it at once. Returns the buffers, and what waits until
        they are full. The save before it must be over."""
        buffers = self._buffers.result()
        targets = [_local(buffers[name]) for name in state]
        torch._foreach_copy_(targets, [_local(x) for x in state.values()], non_blocking=True)
        if not self.on_gpu:
            return buffers, lambda: None
        event = torch.cuda.Event()  # later kernels of this stream come after the copy
        event.record()
        return buffers, event.synchronize
