"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) for sharded parameters.

The arithmetic is that of torch.optim.Adafactor, which DTensor cannot run (torch 2.13: in-place ops on partial norms).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.optim.adamw import decay_groups

BETA2_DECAY = -0.8  # the second moments' decay after step n is 1 - n ** BETA2_DECAY
SMALLEST_RMS = 1e-3  # smallest root mean square in the step's size: a parameter of zeros can move
LARGEST_UPDATE = 1.0  # root mean square of an update before it is scaled down


def build(model: nn.Module, config: TrainerConfig) -> "Adafactor":
    """Adafactor for all trained parameters; `config.learning_rate` is relative to each parameter's size."""
    return Adafactor(decay_groups(model.parameters(), config.weight_decay), lr=config.learning_rate)


class Adafactor(torch.optim.Optimizer):
    """Stores the second moments of a matrix as one row and one column of means; no momentum.

    params: vectors and matrices that FSDP sharded by rows, or groups of them. lr: step size relative to each
    parameter's root mean square, at most 1 / sqrt(step). Two all-reduces per step, for any number of parameters.
    """

    def __init__(self, params: Iterable, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self._first_state(p.detach())

    def _first_state(self, p: DTensor) -> dict[str, Tensor]:
        if p.ndim != 2:
            return {"step": torch.zeros(()), "variance": torch.zeros_like(p)}
        rows = p.to_local().new_zeros(p.to_local().shape[0], 1)
        sharded = DTensor.from_local(
            rows, p.device_mesh, p.placements, run_check=False, shape=torch.Size((p.shape[0], 1)), stride=(1, 1)
        )
        return {"step": torch.zeros(()), "row_var": sharded, "col_var": p.to_local().new_zeros(1, p.shape[1])}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient. Must be called on all ranks."""
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not work:
            return
        mesh = work[0][1].device_mesh
        shards = mesh.get_group(mesh.ndim - 1)  # replicas hold the same shards
        parts: list[Tensor] = []
        for _, p in work:
            state, gradient = self.state[p], p.grad.to_local()
            state["step"] += 1
            decay = state["step"].item() ** BETA2_DECAY
            squares = gradient.square()
            parts.append(p.to_local().square().sum().view(1))
            if p.ndim != 2:
                state["variance"].to_local().lerp_(squares, decay)
            else:
                rows = state["row_var"].to_local().lerp_(squares.mean(1, keepdim=True), decay)
                parts += [rows.sum().view(1), squares.sum(0)]
        sums = torch.cat(parts)
        dist.all_reduce(sums, group=shards)

        sums, updates, sizes = iter(sums.split([part.numel() for part in parts])), [], []
        for _, p in work:
            state, eps = self.state[p], torch.finfo(p.dtype).eps
            sizes.append((next(sums) / p.numel()).sqrt())
            if p.ndim != 2:
                variance = state["variance"].to_local().clone()
            else:
                row_mean = next(sums) / p.shape[0]
                state["col_var"].lerp_(next(sums).view(1, -1) / p.shape[0], state["step"].item() ** BETA2_DECAY)
                variance = state["row_var"].to_local() @ state["col_var"] / row_mean.clamp_(min=eps)
            updates.append(variance.clamp_(min=eps * eps).rsqrt_().mul_(p.grad.to_local()))
        norms = torch.stack([update.square().sum() for update in updates])
        dist.all_reduce(norms, group=shards)

        for (group, p), update, size, norm in zip(work, updates, sizes, norms, strict=True):
            lr, local = group["lr"], p.to_local()
            scale = size.clamp_(min=SMALLEST_RMS) * min(lr, self.state[p]["step"].item() ** -0.5)
            scale /= ((norm / p.numel()).sqrt() / LARGEST_UPDATE).clamp_(min=1.0)
            local.mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(scale))
