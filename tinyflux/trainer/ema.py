"""Exponential moving average of the weights, in float32, sharded like the parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def _local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return x._local_tensor if isinstance(x, DTensor) else x  # to_local() of all takes as long as the arithmetic


def _full(x: Tensor) -> Tensor:
    """The unsharded tensor. If it is sharded, must be called on all ranks."""
    return x.full_tensor() if isinstance(x, DTensor) else x


CHUNK = 64  # tensors to update at a time: the differences of all at once would need another copy of the model


class EMA:
    """Shadow weights: shadow += (1 - d) (weights - shadow), with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The rising d makes the first updates forget the random initialisation. `apply_shadow` swaps weights and shadow in
    place, one tensor at a time, without another copy of the model.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}: it must be in [0, 1)")
        self.model, self.decay, self.swapped = model, decay, False
        self.device = next(model.parameters()).device
        self.count = torch.zeros((), dtype=torch.float64, device=self.device)  # number of updates
        self.shadow = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        shadow = [_local(x) for x in self.shadow.values()]
        return shadow, [_local(p) for p in self.model.parameters()]

    @property
    def updates(self) -> int:
        """Number of updates. Waits for the device."""
        return int(self.count)

    @updates.setter
    def updates(self, count: int) -> None:
        self.count.fill_(count)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """One update, after an optimizer step. skip: 0-d on the device, 1 if the step was skipped."""
        if self.swapped:
            raise RuntimeError("the shadow weights are in the model: call restore() before update()")
        taken = 1.0 if skip is None else 1 - skip.double()
        decay = ((1 + self.count) / (10 + self.count)).clamp(max=self.decay)
        self.count += taken
        share = ((1 - decay) * taken).float()
        shadow, weights = self._pairs()
        for at in range(0, len(shadow), CHUNK):
            some = shadow[at : at + CHUNK]
            step = torch._foreach_sub(weights[at : at + CHUNK], some)
            torch._foreach_mul_(step, share)
            torch._foreach_add_(some, step)

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # free gathered weights, so that the next forward gathers the swapped ones
        for shadow, weight in zip(*self._pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(kept)
        self.swapped = not self.swapped

    def apply_shadow(self) -> None:
        """Put the averaged weights into the model; `restore` swaps back."""
        if not self.swapped:
            self._swap()

    def restore(self) -> None:
        """Put the trained weights back into the model."""
        if self.swapped:
            self._swap()

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Use the averaged weights in the model within a `with` block."""
        self.apply_shadow()
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights into another model with the same parameter names. If they are sharded, must be
        called on all ranks."""
        parameters = dict(model.named_parameters())
        if missing := sorted(self.shadow.keys() ^ parameters.keys()):
            raise ValueError(f"the models differ in {', '.join(missing)}")
        for name, shadow in self.shadow.items():
            parameters[name].copy_(_full(shadow))

    def state_dict(self) -> dict:
        """`shadow`: name -> tensor, sharded like the model; `decay` and `updates`."""
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict`; names and shapes must match. The configured decay is kept."""
        if differ := sorted(self.shadow.keys() ^ state["shadow"].keys()):
            raise ValueError(f"the EMA state differs from the model in {', '.join(differ)}")
        self.updates = int(state["updates"])
        for name, shadow in self.shadow.items():
            shadow.copy_(state["shadow"][name])

    def save(self, path: str | Path) -> None:
        """Write the averaged weights and the counter to a safetensors file (one process, unsharded model)."""
        tensors = {name: _full(x).contiguous().cpu() for name, x in self.shadow.items()}
        save_file(tensors, path, metadata={"updates": str(self.updates), "decay": str(self.decay)})

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            updates = int((file.metadata() or {}).get("updates", 0))
        self.load_state_dict({"updates": updates, "shadow": load_file(path)})
