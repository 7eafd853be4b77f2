"""The optimizer of a run: build it by name, take a step, get its state."""

import importlib

import torch
from torch import Tensor, nn

from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.optim.registry import OPTIMIZERS


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    """The optimizer `config.optimizer` for the trained, sharded parameters; adamw and muon also accept unsharded ones.

    Raises ValueError if it needs a package that is not installed.
    """
    entry = OPTIMIZERS[config.optimizer]
    try:
        module = importlib.import_module(f"{__package__}.{entry.module}")
    except ImportError as error:
        if entry.extra is None:
            raise
        raise ValueError(
            f"trainer.optimizer = {config.optimizer}: {error}. Install it: pip install 'tinyflux-deep[{entry.extra}]'"
        ) from error
    return module.build(model, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], float):  # torchao's is compiled and keeps the rate in a tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def take_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Take the optimizer's step unless `skip` (0-d) is 1. If its kernel reads `skip`, the host does not wait."""
    if vars(type(optimizer)).get("skips_on_device"):  # not inherited: the subclass may have another kernel
        optimizer.found_inf = skip
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> entry -> tensor, sharded like the parameter. Tensors are live: loading into them updates the
    optimizer."""
    state_of = getattr(optimizer, "plain_state", optimizer.state.__getitem__)
    return {name: state_of(p) for name, p in model.named_parameters() if p in optimizer.state}
