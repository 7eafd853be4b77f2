import pytest
import torch
import torch.nn.functional as F

from tests.training import make_source, train
from tinyflux.trainer import losses, terms

B, N, C = 3, 16, 4


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, N, C, generator=generator), torch.randn(B, N, C, generator=generator)


def test_main_loss_is_mse_without_options(pair):
    assert losses.compute_main_loss(*pair) == pytest.approx(F.mse_loss(*pair).item(), rel=1e-6)
    assert losses.compute_main_loss(*pair, reduction="none").shape == (B,)


def test_huber_is_quadratic_near_and_linear_far():
    error = torch.tensor([0.05, -0.1, 1.0, -3.0])
    zero = torch.zeros(4)
    expected = delta_huber = F.huber_loss(error, zero, reduction="none", delta=0.1)
    assert torch.allclose(losses.huber_loss(error, zero, 0.1), expected)
    assert delta_huber[2] == pytest.approx(0.1 * (1.0 - 0.05))


@pytest.mark.parametrize(("t", "weight"), [(0.5, 1.0), (0.25, 1.0), (0.9, 5 / 81), (0.75, 5 / 9), (1.0, 5e-10)])
def test_min_snr(t, weight):
    assert losses.min_snr_weight(torch.tensor([t])).item() == pytest.approx(weight, rel=1e-4)


def test_min_snr_of_velocity():
    t = torch.tensor([0.5, 0.9])
    assert losses.min_snr_weight(t, 5.0, "velocity").tolist() == pytest.approx([1 / 2, 5 / 82])
    with pytest.raises(ValueError, match="noise, velocity"):
        losses.min_snr_weight(t, form="data")


def test_weights_masks_and_maps(pair):
    each = losses.compute_main_loss(*pair, reduction="none")
    weights = torch.tensor([1.0, 0.5, 0.0])
    assert torch.allclose(losses.compute_main_loss(*pair, snr_weights=weights, reduction="none"), each * weights)
    ones = torch.ones(B, 8, 8)
    assert torch.allclose(losses.compute_main_loss(*pair, ones, reduction="none"), 2 * each)
    assert torch.allclose(losses.compute_main_loss(*pair, 0 * ones, reduction="none"), each / 2)
    assert torch.allclose(losses.compute_main_loss(*pair, torch.nan * ones, reduction="none"), each)
    assert torch.allclose(losses.compute_main_loss(*pair, spatial_weights=3 * ones, reduction="none"), each, rtol=1e-5)
    top = torch.zeros(B, 4, 4)
    top[:, :2] = 1  # the weights' mean is 1/2: the upper half counts double
    upper = ((pair[0] - pair[1])[:, :8] ** 2).mean((1, 2))
    assert torch.allclose(losses.compute_main_loss(*pair, spatial_weights=top, reduction="none"), upper, rtol=1e-4)


def test_grid_that_is_not_square(pair):
    wide = torch.ones(B, 2, 8)
    assert losses.compute_main_loss(*pair, spatial_weights=wide, grid=(2, 8)) > 0
    with pytest.raises(ValueError, match="grid"):
        losses.compute_main_loss(*pair, spatial_weights=wide, grid=(3, 5))


def test_lune_modes():
    pred = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    assert torch.allclose(losses.compute_lune_loss(pred, target, reduction="none"), torch.tensor([1.0, 0.0]), atol=1e-6)
    hard = losses.compute_lune_loss(pred, target, "hard")
    assert hard == pytest.approx((2.5 + 1.0) / 2)
    assert losses.compute_lune_loss(pred, target, "soft") == pytest.approx(hard.item() / 100)
    assert losses.compute_lune_loss(pred, target, "huber", 0.1) == losses.huber_loss(pred, target, 0.1).mean()
    with pytest.raises(ValueError, match="cosine, huber, soft, hard"):
        losses.compute_lune_loss(pred, target, "mild")


def test_sol_weights():
    stats, spatial = torch.ones(2, 3), torch.ones(2, 8, 8)
    assert losses.compute_sol_loss(stats, spatial, 0 * stats, -spatial) == 1 + 4
    assert losses.compute_sol_loss(stats, spatial, 0 * stats, -spatial, 2.0, 0.5) == 2 + 2


def test_bfloat16_is_computed_in_float32(pair):
    low = [x.bfloat16() for x in pair]
    assert losses.compute_main_loss(*low).dtype == torch.float32
    assert losses.compute_main_loss(*low) == losses.compute_main_loss(*[x.float() for x in low])


def test_a_loss_without_its_group_in_any_source_is_refused(tmp_path, monkeypatch):
    source = make_source(tmp_path / "plain", 1, groups=("latents", "text", "sol"))
    done = train(tmp_path / "run", [source], "--data.allow-missing", "plain")
    assert done.returncode == 2 and "'lune' needs the group 'lune', which no source has" in done.stdout, done.stdout
    assert "set trainer.enable_lune = false" in done.stdout
    extra = terms.Term("inside", terms.main, optional=False, group="mask", fields={"inside": "mask"})
    monkeypatch.setattr(terms, "TERMS", (*terms.TERMS, extra))
    done = train(tmp_path / "run", [source], "--trainer.no-enable-lune")
    assert done.returncode == 2 and "'inside' needs the group 'mask', which no source has" in done.stdout, done.stdout
