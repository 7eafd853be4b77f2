"""CPU buffers with a copy of a run's state, from which a checkpoint is written while training continues."""

from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Staging:
    """One set of CPU buffers, reused by every save: allocating fresh memory takes many times as long as the copy.
    They are pinned if the state is on a GPU.

    state: name -> tensor; only shapes and placements matter, and later states must have the same. The buffers are
    allocated in `executor`, while training starts.
    """

    def __init__(self, state: dict[str, Tensor], executor: Executor):
        self.on_gpu = any(x.is_cuda for x in state.values())
        self._buffers = executor.submit(self._allocate, state)

    @torch.no_grad()
    def _allocate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = {name: torch.empty_like(x, device="cpu", pin_memory=self.on_gpu) for name, x in state.items()}
        for x in buffers.values():
            _local(x).zero_()  # the system allocates memory only on the first write
        return buffers

    @torch.no_grad()
    def copy(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Start to copy a state; the next steps may change it at once. Returns the buffers, and a function that waits
        for the copy. The previous save must be complete."""
        buffers = self._buffers.result()
        targets = [_local(buffers[name]) for name in state]
        torch._foreach_copy_(targets, [_local(x) for x in state.values()], non_blocking=True)
        if not self.on_gpu:
            return buffers, lambda: None
        event = torch.cuda.Event()  # later kernels of this stream run after the copy
        event.record()
        return buffers, event.synchronize
