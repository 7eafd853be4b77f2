import json
import math

import pytest
import torch
from PIL import Image

from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer import sampling
from tinyflux.trainer.schedules import flux_shift
from tinyflux.trainer.solvers import SOLVERS

SMALL = TinyFluxConfig(
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    joint_attention_dim=128,
    pooled_projection_dim=128,
    num_double_layers=1,
    num_single_layers=1,
    lune_expert_dim=128,
    lune_hidden_dim=16,
    sol_hidden_dim=8,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TinyFluxDeep(SMALL)
    torch.nn.init.normal_(model.final_linear.weight, std=0.3)  # zero at the start: every velocity would be 0
    return model


@pytest.fixture(scope="module")
def zoo():
    return ModelZoo(zoo="tiny")


def test_schedule():
    schedule = sampling.timestep_schedule(4, 3.0)
    assert schedule[0] == 0 and schedule[-1] == 1 and schedule[2] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least 1"):
        sampling.timestep_schedule(0)


def settings(**given):
    return sampling.Settings(**{"steps": 3, "shift": 2.0} | given)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"solver": "rk4"},
        {"shift": 0.0},
        {"shift": float("inf")},
        {"guidance": float("nan")},
        {"guidance_interval": (0.8, 0.2)},
        {"guidance_rescale": 2.0},
        {"timesteps": (0.5, 0.2)},
        {"timesteps": (0.0,)},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sampling.Settings(**wrong)
    with pytest.raises(TypeError, match="stepps"):
        sampling.Settings(stepps=3)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("ab2", 2)])
def test_solvers_converge_with_their_order(solver, order):
    """dx/dt = x (1 + t), whose solution is known."""

    def error(steps):
        x, schedule = torch.ones(1, dtype=torch.float64), sampling.timestep_schedule(steps, 1.5)
        x = SOLVERS[solver](lambda x, t: x * (1 + t), x, schedule, lambda x, t: x)
        return abs(x.item() - math.exp(1.5))

    assert error(32) / error(64) == pytest.approx(2**order, rel=0.15)


def draw(model, **given):
    torch.manual_seed(1)
    inputs = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 128), torch.randn(2, 128)
    return sampling.denoise(model, *inputs, torch.randn(2, 5, 128), torch.randn(2, 128), settings(**given))


def test_solvers_agree_in_the_limit(model):
    exact = draw(model, steps=64, solver="heun", guidance=1.5)
    far = {s: (draw(model, steps=16, solver=s, guidance=1.5) - exact).abs().max() for s in SOLVERS}
    assert max(far["heun"], far["midpoint"], far["ab2"]) < far["euler"]


def test_guidance_applies_in_its_interval_alone(model):
    full, none = draw(model), draw(model, guidance=1.0)
    assert torch.equal(draw(model, guidance_interval=(0.0, 1.0)), full)
    torch.testing.assert_close(draw(model, guidance_interval=(0.9, 0.95)), none)  # no timestep of the schedule
    part = draw(model, guidance_interval=(0.3, 0.7))
    assert not torch.allclose(part, full, atol=1e-3) and not torch.allclose(part, none, atol=1e-3)


def test_outside_the_interval_the_negative_prompt_is_not_run(model):
    rows = []
    hook = model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    draw(model, steps=4, shift=1.0, guidance_interval=(0.25, 0.5))
    hook.remove()
    assert rows == [2, 4, 4, 2]


def test_rescaled_guidance_has_the_deviation_of_the_text_prediction(model):
    null, text = torch.randn(2, 24, 16), torch.randn(2, 24, 16)
    whole = sampling.guide(null, text, 6.0, 1.0)
    torch.testing.assert_close(whole.std((1, 2)), text.std((1, 2)))
    plain = sampling.guide(null, text, 6.0)
    torch.testing.assert_close(sampling.guide(null, text, 6.0, 0.7), 0.7 * whole + 0.3 * plain)
    assert not torch.allclose(draw(model, guidance_rescale=0.7), draw(model), atol=1e-3)


def test_given_timesteps_and_a_stop(model):
    assert torch.equal(draw(model, timesteps=tuple(sampling.timestep_schedule(3, 2.0)), steps=9), draw(model))
    torch.manual_seed(1)
    inputs = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 128), torch.randn(2, 128)
    inputs = *inputs, torch.randn(2, 5, 128), torch.randn(2, 128)
    seen = []

    def stop(step, t, latents):
        seen.append((step, t, latents))
        return latents if step == 0 else None

    stopped = sampling.denoise(model, *inputs, settings(), stop)
    assert [step for step, _, _ in seen] == [0, 1] and torch.equal(stopped, seen[1][2])


def test_tokens_round_trip():
    latents = torch.randn(2, 3, 4, 5)
    tokens = sampling.to_tokens(latents)
    assert tokens.shape == (2, 20, 3) and torch.equal(tokens[0, 7], latents[0, :, 1, 2])
    assert torch.equal(sampling.to_latents(tokens, 4, 5), latents)


def test_guidance_is_two_calls_in_one_batch(model):
    noise, t5, clip = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 128), torch.randn(2, 128)
    null_t5, null_clip = torch.randn(2, 5, 128), torch.randn(2, 128)
    drawn = sampling.denoise(model, noise, t5, clip, null_t5, null_clip, settings(guidance=4.0))
    model.eval()
    ids = model.create_img_ids(1, 4, 6, "cpu")[0]
    x, schedule = sampling.to_tokens(noise), flux_shift(torch.linspace(0, 1, 4), 2.0)
    with torch.no_grad():
        for now, after in zip(schedule, schedule[1:], strict=False):
            text, null = (model(x, a, b, now, ids) for a, b in ((t5, clip), (null_t5, null_clip)))
            x = x + (null + 4.0 * (text - null)) * (after - now)
    assert torch.allclose(sampling.to_tokens(drawn), x, atol=1e-5)
    alone = sampling.denoise(model, noise, t5, clip, null_t5, null_clip, settings(guidance=1.0))
    assert not torch.allclose(alone, drawn, atol=1e-2)


def test_noise_does_not_depend_on_the_batch(model, zoo):
    prompts = ["a red circle on a blue background", "a green star on a white background", "a ring"]
    pictures = sampling.Sampler(zoo, steps=2, batch_size=3)(model, prompts, seed=5)
    assert pictures.shape == (3, 3, 64, 64) and pictures.abs().max() <= 1
    assert torch.allclose(sampling.Sampler(zoo, steps=2, batch_size=1)(model, prompts, seed=5), pictures, atol=1e-4)
    again = sampling.generate_samples(model, zoo, prompts[:2], steps=2, seed=5)
    assert torch.allclose(again, pictures[:2], atol=1e-4)
    assert not torch.allclose(sampling.generate_samples(model, zoo, prompts[:1], steps=2, seed=6), pictures[:1])


def test_negative_prompt_changes_the_picture(model, zoo):
    plain = sampling.generate_samples(model, zoo, ["a star"], steps=2)
    assert not torch.equal(sampling.generate_samples(model, zoo, ["a star"], negative_prompt="red", steps=2), plain)


def test_model_keeps_its_mode(model):
    model.train()
    with sampling.evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()


def test_grid(tmp_path):
    images = torch.stack([torch.full((3, 8, 6), value) for value in (-1.0, 0.0, 1.0)])
    path = sampling.save_samples(images, tmp_path / "a" / "grid.png", columns=2)
    grid = Image.open(path)
    assert grid.size == (2 * 6 + 2, 2 * 8 + 2)
    assert grid.getpixel((0, 0)) == (0, 0, 0) and grid.getpixel((8, 0)) == (128, 128, 128)
    assert grid.getpixel((0, 10)) == grid.getpixel((13, 17)) == (255, 255, 255)


def test_parameters_are_kept_in_the_picture(tmp_path):
    given = {"prompts": ["a red ring", "ein grüner Stern"], "seed": 3}
    path = sampling.save_samples(torch.zeros(1, 3, 4, 4), tmp_path / "one.png", parameters=given)
    assert json.loads(Image.open(path).text["parameters"]) == given
