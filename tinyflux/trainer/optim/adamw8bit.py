"""AdamW with 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861): torchao's, from the extra [8bit].

Blocks of 256 values share a scale. Here a block never crosses a row of the matrix, so the values do not depend on the
number of ranks, and a checkpoint can be resumed on another number of ranks, bit for bit.
"""

import contextlib
import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns that a CPU build lacks kernels, which are not used here

import torchao.optim  # noqa: E402
from torchao.optim.subclass_8bit import OptimState8bit  # noqa: E402

from tinyflux.trainer.config import TrainerConfig  # noqa: E402
from tinyflux.trainer.optim.adamw import decay_groups  # noqa: E402

BLOCK, SMALLEST = 256, 4096  # values that share a scale; smaller parameters keep moments of 32 bits
MOMENTS = ("exp_avg", "exp_avg_sq")


def build(model: nn.Module, config: TrainerConfig) -> "AdamW8bit":
    """AdamW8bit for all trained parameters."""
    groups = decay_groups(model.parameters(), config.weight_decay)
    return AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)


def is_small(p: Tensor) -> bool:
    """Whether a parameter keeps 32-bit moments: it has too few values, or its rows are not a multiple of blocks."""
    return p.ndim != 2 or p.numel() < SMALLEST or p.shape[1] % BLOCK > 0


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao's AdamW8bit, with blocks that do not depend on the sharding. params: sharded by rows, or groups of them.
    The state exists from the start."""

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.95)):
        super().__init__(params, lr=lr, betas=betas)
        for group in self.param_groups:
            for p in group["params"]:
                moments = {name: self._new_buffer(p.detach(), signed=name == "exp_avg") for name in MOMENTS}
                self.state[p] = {"step": torch.zeros(()), **moments}

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        local = p.to_local()
        if is_small(p) or not local.numel():
            return torch.zeros_like(p)
        zeros = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device, dtype=p.dtype)
        return _sharded(zeros, p, p.shape)

    def step(self, closure=None) -> None:
        # its compilation is for CUDA; on a CPU it would take minutes and a C++ compiler to save microseconds
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            super().step(closure)

    @torch.no_grad()
    def plain_state(self, p: DTensor) -> dict[str, Tensor]:
        """A parameter's state as plain sharded tensors that share its memory: codes [rows, columns] and scale
        [rows, blocks] of each moment."""
        state = self.state[p]
        if is_small(p):
            return state
        rows, columns = p.shape
        plain = {"step": state["step"]}
        for name in MOMENTS:
            local = state[name].to_local()
            if isinstance(local, OptimState8bit):
                codes, scale = local.codes, local.scale.view(-1, columns // BLOCK)
            else:  # a rank without rows of this parameter
                codes, scale = local.new_empty(0, columns, dtype=torch.uint8), local.new_empty(0, columns // BLOCK)
            plain[f"{name}_codes"] = _sharded(codes, p, (rows, columns))
            plain[f"{name}_scale"] = _sharded(scale, p, (rows, columns // BLOCK))
        return plain


def _sharded(local: Tensor, p: DTensor, shape: tuple[int, ...]) -> DTensor:
    """A DTensor of this shape with its rows sharded like those of `p`, without a copy."""
    stride = (*shape[1:], 1)
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
