"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for the rest.

torch.optim.Muon handles one unsharded matrix at a time: sharded ones would be gathered for each product, and every rank
would compute all of them. Here one rank of the shard group orthogonalises each matrix, and matrices of the same shape
are batched.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.optim.adamw import AdamW, decay_groups, local
from tinyflux.trainer.optim.exchange import Exchange

MOMENTUM = 0.95
ITERATIONS, QUINTIC = 5, (3.4445, -4.7750, 2.0315)  # singular values from 0.01 to 1 end between 0.7 and 1.2
SMALLEST_NORM = 1e-7


def build(model: nn.Module, config: TrainerConfig) -> "Muon":
    """Muon for a TinyFluxDeep: the updates of the blocks' matrices are orthogonalised, the rest uses AdamW."""
    stacks = {}
    for block in (*model.double_blocks, *model.single_blocks):
        for name, p in block.named_parameters():
            if p.requires_grad and p.ndim == 2:
                stacks[p] = stacked_matrices(name, p)
    rest = [p for p in model.parameters() if p not in stacks]
    groups = decay_groups(rest, config.weight_decay)
    return Muon(
        stacks,
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        scale=config.muon_scale,
    )


def stacked_matrices(name: str, p: Tensor) -> int:
    """Number of matrices stacked in a parameter of a block. Fused projections (queries, keys, values; shift, scale,
    gate) are separate maps; if they were orthogonalised together, the largest would dominate."""
    fused = name.endswith(("qkv.weight", "norm.linear.weight", "norm1.linear.weight"))
    return p.shape[0] // p.shape[1] if fused else 1


def orthogonal(x: Tensor) -> Tensor:
    """Orthogonalise matrices by Newton-Schulz iterations: nearly the same singular vectors, singular values near 1.

    x float32 [M, rows, columns], M matrices. In float32 the result hardly depends on the summation order of the
    gradient, and these products are under 1% of a step.
    """
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def move(
    values: list[Tensor], by: list[Tensor], *, rate: float, decay: float, skip: Tensor | None, maximize: bool = False
) -> None:
    """values -= rate * (by + decay * values), with -by if `maximize`, in place. All must be contiguous.

    torch's fused SGD does nothing if `skip` (0-d) is 1, without making the host wait.
    """
    sgd(
        values,
        by,
        [None] * len(values),
        fused=True,
        found_inf=skip,
        lr=rate,
        weight_decay=decay,
        maximize=maximize,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
    )


class Muon(AdamW):
    """stacks: parameters to orthogonalise, sharded by rows or unsharded -> number of matrices stacked in each; their
    state is `momentum`. rest: parameters for AdamW, or groups of them. scale: root mean square of an orthogonalised
    update; 0.2 matches AdamW, so one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, eq. 4).
    """

    skips_on_device = True

    def __init__(
        self,
        stacks: dict[nn.Parameter, int],
        rest: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        scale: float = 0.2,
    ):
        self.stacks, self.scale = stacks, scale
        self.exchanges: dict[tuple[int, ...], Exchange] = {}
        # sorted by shape, so that round-robin gives every rank an equal share of each shape
        matrices = sorted(stacks, key=lambda p: tuple(p.shape))
        super().__init__([{"params": matrices, "weight_decay": weight_decay}, *rest], lr, betas)

    def _first_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(p)} if p in self.stacks else super()._first_state(p)

    def _update(self, group: dict, parameters: list[nn.Parameter]) -> None:
        if parameters[0] not in self.stacks:
            return super()._update(group, parameters)
        gradients, momenta = [local(p.grad) for p in parameters], [local(self.state[p]["momentum"]) for p in parameters]
        # updating an exponential moving average is a step towards the gradient
        move(momenta, gradients, rate=1 - MOMENTUM, decay=1.0, skip=self.found_inf, maximize=True)
        updates = self._orthogonal(parameters, torch._foreach_lerp(gradients, momenta, MOMENTUM))  # Nesterov's
        weights = [local(p) for p in parameters]
        move(weights, updates, rate=group["lr"], decay=group["weight_decay"], skip=self.found_inf)

    def _orthogonal(self, parameters: list[nn.Parameter], rows: list[Tensor]) -> list[Tensor]:
        """This rank's rows of the scaled updates, from its rows of the momenta. Must be called on all ranks."""
        exchange = self._exchange_of(parameters)
        whole = exchange.to_owners(rows)
        alike: dict[tuple, list[int]] = {}  # indices into `whole`
        for k, i in enumerate(exchange.owned):
            alike.setdefault((*parameters[i].shape, self.stacks[parameters[i]]), []).append(k)
        for (height, width, count), places in alike.items():
            matrices = torch.stack([whole[k] for k in places]).view(-1, height // count, width)
            matrices = orthogonal(matrices) * (self.scale * max(matrices.shape[1:]) ** 0.5)
            matrices = matrices.contiguous()  # fused kernels ignore strides
            for k, matrix in zip(places, matrices.view(-1, height, width), strict=True):
                whole[k] = matrix
        return exchange.to_rows(whole, rows[0])

    def _exchange_of(self, parameters: list[nn.Parameter]) -> Exchange:
        key = tuple(map(id, parameters))  # nearly always the same parameters: those with a gradient
        if key not in self.exchanges:
            first, shards = parameters[0], None
            if isinstance(first, DTensor):
                shards = first.device_mesh.get_group(first.device_mesh.ndim - 1)  # replicas hold the same shards
            self.exchanges[key] = Exchange([p.shape for p in parameters], shards)
        return self.exchanges[key]
