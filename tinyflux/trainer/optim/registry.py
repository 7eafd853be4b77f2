"""The optimizers of sharded parameters, and their state under the parameters' names."""

import torch
from torch import Tensor, nn

from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.optim.adafactor import Adafactor

STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}  # of a trained parameter; rows, columns, scales not counted


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    """The optimizer `config.optimizer` of what is trained; weight decay on matrices only: norms, biases and gates are
    vectors. Raises ValueError where it needs a package that is not installed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=config.learning_rate)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    try:
        from tinyflux.trainer.optim.adam8bit import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"trainer.optimizer is adamw8bit, which needs torchao ({error}): pip install 'tinyflux-deep[8bit]'"
        ) from error
    return AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: compiled, so a number would be compiled in
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the first step would make, as it is before that step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    lr = float(optimizer.param_groups[0]["lr"])
    for p in parameters:
        p.grad = torch.zeros_like(p)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    set_learning_rate(optimizer, lr)
    for p in parameters:
        optimizer.state[p]["step"].zero_()  # that was no step


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> entry -> tensor, sharded as the parameter is. They are the optimizer's own memory: what is
    loaded into them is loaded."""
    if not optimizer.state:
        _begin(optimizer)
    state_of = getattr(optimizer, "plain_state", optimizer.state.__getitem__)
    return {name: state_of(p) for name, p in model.named_parameters() if p in optimizer.state}
