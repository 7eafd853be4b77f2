"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): torch's fused kernel on each rank's own rows.

DTensor's dispatch of long lists, which torch.optim.AdamW goes through, takes longer than the arithmetic.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from tinyflux.trainer.config import TrainerConfig

EPS = 1e-8


def build(model: nn.Module, config: TrainerConfig) -> "AdamW":
    """AdamW for all trained parameters."""
    groups = decay_groups(model.parameters(), config.weight_decay)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """The trained parameters as optimizer groups: only matrices decay; norms, biases and gates are vectors."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def local(x: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds."""
    return x._local_tensor if isinstance(x, DTensor) else x  # to_local() of all takes as long as the arithmetic


class AdamW(torch.optim.Optimizer):
    """params: sharded by rows or unsharded, or groups of them. The state exists from the start: `step`, `exp_avg` and
    `exp_avg_sq` of each parameter. found_inf: 0-d, 1 skips the step."""

    skips_on_device = True

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self._first_state(p)

    def _first_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=p.device), **moments}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if trained := [p for p in group["params"] if p.grad is not None]:
                self._update(group, trained)

    def _update(self, group: dict, parameters: list[nn.Parameter]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            found_inf=self.found_inf,
        )
