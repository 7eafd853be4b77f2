"""Skipped steps: decided on the device, and without effect on weights, moments and averages."""

from statistics import median

import pytest
import torch
from torch import nn

from tests.training import FITTED, TINY
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.trainer.config import ParallelConfig, TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.guard import FEWEST, WINDOW, Guard
from tinyflux.trainer.optim.adamw import AdamW
from tinyflux.trainer.optim.optimizer import make_optimizer, optimizer_state, take_step
from tinyflux.trainer.optim.registry import OPTIMIZERS
from tinyflux.trainer.parallel import distribute, join_process_group

NAN = float("nan")


def guard_of(tmp_path, **options) -> Guard:
    return Guard(TrainerConfig(**options), tmp_path, torch.device("cpu"))


def judged(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def test_a_spike_is_measured_against_the_median_of_the_steps_taken(tmp_path):
    guard, taken = guard_of(tmp_path, max_loss_spike=2.0), []
    losses = torch.rand(3 * WINDOW, generator=torch.Generator().manual_seed(0)).add(0.5).tolist()
    for i, loss in enumerate(losses):
        loss = loss * 10 if i % 7 == 6 else loss
        spike = len(taken) >= FEWEST and loss > 2 * median(taken[-WINDOW:])
        assert judged(guard, loss) == spike, i
        taken += [] if spike else [loss]
    assert guard.losses == pytest.approx(taken[-WINDOW:])
    resumed = guard_of(tmp_path, max_loss_spike=2.0)
    resumed.losses = guard.losses
    assert judged(resumed, 50.0) and not judged(resumed, 1.0)
    assert "more than 2 times the median" in resumed.fault(50.0, 1.0, median(taken[-WINDOW:]))


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (float("inf"), 1.0), (1.0, NAN)])
def test_what_is_not_finite_is_skipped(tmp_path, loss, norm):
    guard = guard_of(tmp_path)
    assert judged(guard, loss, norm) and not judged(guard, 1e9) and guard.losses == [1e9]
    assert guard.fault(loss, norm, NAN) == "loss or gradient not finite"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(name):
    torch.manual_seed(0)
    model = TinyFluxDeep(TinyFluxConfig(**TINY, **FITTED))
    join_process_group(torch.device("cpu"))
    distribute(model, torch.device("cpu"), ParallelConfig())
    optimizer, ema = make_optimizer(model, TrainerConfig(optimizer=name, learning_rate=0.1)), EMA(model, 0.9)

    def step(gradient: float, skip: float) -> list[torch.Tensor]:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        take_step(optimizer, torch.tensor(skip))
        ema.update(torch.tensor(skip))
        state = [x for entries in optimizer_state(model, optimizer).values() for x in entries.values()]
        return [x.clone() for x in (*model.parameters(), *ema.shadow.values(), ema.count, *state)]

    before = step(1.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step(NAN, 1.0), strict=True)) and ema.updates == 1
    after = step(2.0, 0.0)
    moved = 2 * len(ema.shadow) + 1
    assert not any(torch.equal(a, b) for a, b in zip(before[:moved], after[:moved], strict=True)) and ema.updates == 2


def test_a_subclass_of_an_optimizer_that_skips_does_not_promise_it():
    class Reckless(AdamW):
        def _update(self, group, parameters):
            torch._foreach_add_(parameters, 1.0)

    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.full_like(p, NAN)
    optimizer = Reckless([p], lr=0.1)
    take_step(optimizer, torch.ones(()))
    assert not p.any()
    take_step(optimizer, torch.zeros(()))
    assert p.all()
