import numpy as np
import pytest
import torch

from tinyflux.trainer import schedules
from tinyflux.util import rng


def test_flux_shift_and_back():
    t = torch.linspace(0, 1, 11)
    shifted = schedules.flux_shift(t, 3.0)
    assert shifted[5] == pytest.approx(0.75) and shifted[0] == 0 and shifted[-1] == 1
    assert torch.allclose(schedules.flux_unshift(shifted, 3.0), t, atol=1e-6)


@pytest.mark.parametrize("logit_normal", [True, False])
def test_timesteps_have_the_distribution(logit_normal):
    seeds = torch.from_numpy(rng.sample_seeds(0, 0, np.arange(20000)))
    t = schedules.keyed_timesteps(seeds, shift=3.0, logit_normal=logit_normal)
    assert t.min() >= 1e-4 and t.max() <= 1 - 1e-4
    back = schedules.flux_unshift(t, 3.0)
    base = torch.logit(back) if logit_normal else back
    mean, std = (0.0, 1.0) if logit_normal else (0.5, 12**-0.5)
    assert base.mean() == pytest.approx(mean, abs=0.02) and base.std() == pytest.approx(std, rel=0.02)


def test_timesteps_are_a_function_of_the_seed():
    seeds = torch.from_numpy(rng.sample_seeds(0, 5, np.arange(8)))
    t = schedules.keyed_timesteps(seeds)
    assert torch.equal(schedules.keyed_timesteps(seeds[3:5]), t[3:5])


def test_stratified_timesteps_cover_every_part():
    seeds = torch.from_numpy(rng.sample_seeds(0, 0, np.arange(64)))
    strata = torch.from_numpy(rng.permutation(64, "strata"))
    t = schedules.keyed_timesteps(seeds, strata, 64, shift=1.0, logit_normal=False)
    assert sorted((t * 64).long().tolist()) == list(range(64))


def test_sample_timesteps_follow_their_generator():
    draws = [schedules.sample_timesteps(16, stratified=True, generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*draws) and draws[0].shape == (16,)


def test_loss_warmup():
    assert [schedules.loss_warmup(step, 4) for step in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert schedules.loss_warmup(0, 0) == 1


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_learning_rate(schedule, middle, end):
    options = {"base": 1.0, "total_steps": 111, "warmup_steps": 10, "min_lr": 0.1, "schedule": schedule}
    assert schedules.learning_rate(0, **options) == pytest.approx(0.1)
    assert schedules.learning_rate(9, **options) == schedules.learning_rate(10, **options) == 1.0
    assert schedules.learning_rate(60, **options) == pytest.approx(middle)
    assert schedules.learning_rate(110, **options) == pytest.approx(end)  # the last step
    assert schedules.learning_rate(4, **options, warmup="cosine") == pytest.approx(0.5)
