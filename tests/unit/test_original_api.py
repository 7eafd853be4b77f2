"""Calls and names of the original package keep working; other tests check their results."""

import importlib

import pytest
import torch

from tests.training import TINY
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.schedules import flux_shift, flux_unshift

NAMES = {
    "model.model": "TinyFluxConfig TinyFluxDeep",
    "model.zoo": "ModelZoo SolAttnProcessor",
    "model.loader": "from_pretrained load_model load_checkpoint",
    "trainer.cache_experts": "EncodingCache LuneFeatureCache SolFeatureCache DatasetCache MultiSourceCache",
    "trainer.data": "CachedDataset MultiCachedDataset collate_fn",
    "trainer.trainer": "Trainer TrainerConfig",
    "trainer.losses": "compute_main_loss compute_lune_loss compute_sol_loss huber_loss min_snr_weight",
    "trainer.schedules": "flux_shift flux_unshift sample_timesteps loss_warmup learning_rate",
    "trainer.ema": "EMA",
    "trainer.sampling": "Sampler generate_samples save_samples",
    "util.predictions": "flow_x_t flow_velocity flow_data flow_noise euler_step convert",
}
ZOO = "load_vae load_sd_vae load_clip load_t5 load_lune load_sol load_tinyflux unload unload_all offload onload loaded"
ZOO += " encode_image encode_images encode_t5 encode_clip"
EMA = "update apply_shadow restore average_parameters copy_to save load state_dict load_state_dict"


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    found = importlib.import_module(f"tinyflux.{module}")
    assert all(callable(getattr(found, name)) for name in NAMES[module].split())


def test_methods():
    from tinyflux.trainer.ema import EMA as kind

    assert all(callable(getattr(ModelZoo, name)) for name in ZOO.split())
    assert all(callable(getattr(kind, name)) for name in EMA.split())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TinyFluxConfig(**TINY)
    model = TinyFluxDeep(config).eval()
    torch.nn.init.normal_(model.final_linear.weight)  # zero at the start
    return model


@torch.no_grad()
def test_positional_calls_without_positions(model):
    x, t5, clip = torch.randn(2, 9, 16), torch.randn(2, 7, 768), torch.randn(2, 768)
    expected = model(x, t5, clip, torch.full((2,), 0.3), model.create_img_ids(2, 3, 3))
    assert expected.std() > 0
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((2,), 0.3)):
        assert torch.equal(model(x, t5, clip, t), expected)
    v, info = model(
        hidden_states=x,
        encoder_hidden_states=t5,
        pooled_projections=clip,
        timestep=0.3,
        lune_features=torch.randn(2, 1280),
        sol_stats=torch.rand(2, 3),
        sol_spatial=torch.rand(2, 8, 8),
        return_expert_pred=True,
    )
    assert v.shape == x.shape
    assert torch.equal(info["lune"]["expert_pred"], info["lune_pred"]) and info["lune_pred"].shape == (2, 1280)
    assert torch.equal(info["sol"]["pred_stats"], info["sol_stats_pred"]) and info["sol_stats_pred"].shape == (2, 3)
    assert torch.equal(info["sol"]["pred_spatial"], info["sol_spatial_pred"])
    assert info["sol_spatial_pred"].shape == (2, 8, 8)
    with pytest.raises(ValueError, match="8 image tokens are not a square grid"):
        model(x[:, :8], t5, clip, 0.3)


def test_shift_by_name():
    t = torch.rand(5)
    assert torch.equal(flux_shift(t, shift=3.0), flux_shift(t)) and not torch.equal(flux_shift(t, shift=2.0), t)
    assert torch.allclose(flux_unshift(flux_shift(t, shift=2.0), shift=2.0), t, atol=1e-6)
