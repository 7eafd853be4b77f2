"""The diffusers pipeline: the Sampler's pixels, diffusers' calls, plain files, the Hub, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.forked import Forked
from tests.pipelines import PROMPTS, draw, load, save, seeded, small_model
from tests.training import ROOT, environment
from tinyflux.model.loader import load_model, save_published
from tinyflux.model.lora import Lora, linear_layers
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.pipeline import TinyFluxPipeline
from tinyflux.trainer.sampling import Sampler
from tinyflux.util.pixels import to_uint8


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def pipe(saved):
    return load(saved)


def test_the_same_pixels_three_ways(model, pipe, tmp_path, one_thread):
    """The Sampler, the command in a separate process, and the saved and loaded pipeline."""
    run = tmp_path / "mine"
    save_published(model, run / "checkpoints" / "step_5_ema.safetensors")
    (run / "checkpoints" / "training_config.json").write_text(json.dumps({"trainer": {"shift": 2.0}}))
    command = [ROOT / "launch/sample.py", "--checkpoint", run, "--zoo", "tiny", "--no-grid", "--steps", 3, "--seed", 3]
    command += ["--negative-prompt", "blue", "--prompt", *PROMPTS]
    process = Forked([*command, "--height", 64, "--width", 48, "--out", tmp_path / "a.png"], environment())
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    zoo = ModelZoo(zoo="tiny")
    sampler = Sampler(zoo, steps=3, shift=2.0, latent_shape=zoo.latent_shape_of(64, 48))
    sampled = to_uint8(sampler(load_model(run), PROMPTS, negative="blue", seed=3)).permute(0, 2, 3, 1).numpy()
    images = pipe(
        PROMPTS, negative_prompt="blue", height=64, width=48, num_inference_steps=3, generator=seeded(3)
    ).images
    assert len(images) == 2 and images[0].size == (48, 64) and sampled[0].std() > 1
    for k, image in enumerate(images):
        assert np.array_equal(np.asarray(image), sampled[k])
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"a-{k}.png")), sampled[k])


def test_outputs(pipe):
    pt = draw(pipe, "a red ring")
    assert pt.shape == (1, 3, 64, 64) and pt.min() >= 0 and pt.max() <= 1
    array = draw(pipe, "a red ring", output_type="np")
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    latents = draw(pipe, "a red ring", output_type="latent")
    assert torch.allclose(pipe.zoo.decode_latents(latents) / 2 + 0.5, pt, atol=1e-6)
    assert torch.equal(pipe("a red ring", num_inference_steps=2, generator=seeded(3), output_type="pt",
                            return_dict=False)[0], pt)  # fmt: skip


def test_seeds_and_several_pictures(pipe):
    drawn = draw(pipe, PROMPTS, num_images_per_prompt=2)
    assert torch.allclose(draw(pipe, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2), drawn, atol=1e-5)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)
    generator = seeded(3)
    assert torch.equal(draw(pipe, "a", generator=generator), draw(pipe, "a", generator=generator))
    each = draw(pipe, ["a", "b"], generator=[seeded(5), seeded(6)])
    assert torch.allclose(each[1:], draw(pipe, "b", generator=seeded(6)), atol=1e-5)
    torch.manual_seed(1)
    one = draw(pipe, "a", generator=None)
    assert not torch.equal(draw(pipe, "a", generator=None), one)
    torch.manual_seed(1)
    assert torch.equal(draw(pipe, "a", generator=None), one)
    assert torch.allclose(draw(pipe, PROMPTS, batch_size=1), draw(pipe, PROMPTS), atol=1e-4)


def test_negative_prompts_guidance_and_given_noise(pipe):
    plain = draw(pipe, PROMPTS)
    each = draw(pipe, PROMPTS, negative_prompt=["blue", ""])
    assert torch.allclose(each[1], plain[1], atol=1e-5) and not torch.allclose(each[0], plain[0], atol=1e-3)
    assert torch.allclose(each[0], draw(pipe, PROMPTS, negative_prompt="blue")[0], atol=1e-5)
    assert not torch.allclose(draw(pipe, PROMPTS, guidance_scale=1.0), plain, atol=1e-3)
    assert not torch.allclose(draw(pipe, PROMPTS, solver="heun", shift=1.0), plain, atol=1e-3)
    noise = torch.randn(2, 16, 8, 8)
    assert torch.equal(draw(pipe, PROMPTS, latents=noise, generator=None), draw(pipe, PROMPTS, latents=noise))
    assert not torch.allclose(draw(pipe, PROMPTS, latents=noise), plain, atol=1e-2)


def test_callback_and_progress(pipe, capsys):
    calls = []

    def record(which, step, t, given):
        calls.append((which is pipe, step, round(t, 3), tuple(given["latents"].shape)))
        return {}

    plain = draw(pipe, PROMPTS)
    assert torch.equal(draw(pipe, PROMPTS, callback_on_step_end=record), plain)
    assert calls == [(True, 0, 0.667, (2, 16, 8, 8)), (True, 1, 1.0, (2, 16, 8, 8))]
    zeroed = draw(pipe, PROMPTS, callback_on_step_end=lambda *a: {"latents": torch.zeros_like(a[3]["latents"])})
    assert torch.equal(zeroed[0], zeroed[1])
    pipe.set_progress_bar_config(desc="drawing")
    draw(pipe, PROMPTS, batch_size=1)
    assert "drawing: 100%" in (shown := capsys.readouterr().err) and "4/4" in shown
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, PROMPTS)
    assert "drawing" not in capsys.readouterr().err


def embeds(t5: torch.Tensor, clip: torch.Tensor, kind: str = "") -> dict:
    return {f"{kind}prompt_embeds": t5, f"{kind}pooled_prompt_embeds": clip}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"height": 30}, "multiples of 8"),
        ({"num_inference_steps": 0}, "steps: sampling takes at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must be \[1, 16, 8, 8\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise is none of latents"),
        ({"solver": "rk4"}, "solver must be one of"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"negative_prompt": [3]}, "negative_prompt must be a text"),
        ({"height": 0}, "multiples of 8"),
        ({"guidance_scale": float("nan")}, "guidance must be a finite number"),
        ({"prompt": None} | embeds(torch.zeros(32, 128), torch.zeros(32, 128)), r"must be \[B, L, D\]"),
        ({"prompt": None} | embeds(torch.zeros(1, 5, 128), torch.zeros(1, 128)), "differ only in B"),
        (embeds(torch.zeros(1, 32, 128), torch.zeros(3, 128), "negative_"), "negative_pooled_prompt_embeds 3, for 1"),
        ({"prompt_embeds": torch.zeros(1, 32, 128)}, "give both prompt_embeds and pooled_prompt_embeds"),
        ({"timesteps": [0.5, 1.0], "sigmas": [1.0]}, "either timesteps or sigmas"),
        ({"timesteps": [0.5, 0.2]}, "timesteps must be two or more ascending"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 0.0}, "strength must be in"),
        ({"image": [Image.new("RGB", (64, 64))] * 2}, "2 images for 1 prompts"),
    ],
)
def test_bad_input(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a"} | given)


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    draw(pipe, "a red ring " * 60)
    assert "t5 keeps 32 of 182 tokens, up to '..." in caplog.text and "clip keeps 77 of 182 tokens" in caplog.text


def test_unknown_arguments_are_refused_by_name(pipe, saved):
    with pytest.raises(TypeError, match="num_inference_stepps"):
        pipe("a", num_inference_stepps=3)
    with pytest.raises(TypeError, match="unknown argument safety_checker; parts that can be given: vae"):
        TinyFluxPipeline.from_pretrained(saved, safety_checker=None)


def test_embeds_instead_of_prompts(pipe):
    plain = draw(pipe, PROMPTS, negative_prompt="blue", num_images_per_prompt=2)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = dict(zip(names, pipe.encode_prompt(PROMPTS, "blue"), strict=True))
    assert [list(x.shape) for x in encoded.values()] == [[2, 32, 128]] * 2 + [[2, 128]] * 2
    assert torch.allclose(draw(pipe, **encoded, num_images_per_prompt=2), plain, atol=1e-5)
    del encoded["negative_prompt_embeds"], encoded["negative_pooled_prompt_embeds"]
    assert torch.allclose(draw(pipe, **encoded, negative_prompt="blue", num_images_per_prompt=2), plain, atol=1e-5)
    assert torch.allclose(draw(pipe, **encoded), draw(pipe, PROMPTS), atol=1e-5)


def test_an_image_to_draw_over(pipe):
    picture = Image.new("RGB", (48, 64), "red")
    given = {"image": picture, "num_inference_steps": 4, "guidance_scale": 1.0}
    near, far, whole = (draw(pipe, "a red ring", strength=s, **given) for s in (0.25, 0.75, 1.0))
    assert near.shape == (1, 3, 64, 48)
    original = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    assert (near - original).abs().mean() < (far - original).abs().mean()
    assert torch.allclose(whole, draw(pipe, "a red ring", height=64, width=48, **given | {"image": None}), atol=1e-5)
    steps = []
    draw(pipe, "a", strength=0.5, callback_on_step_end=lambda p, i, t, given: steps.append(i) or {}, **given)
    assert steps == [0, 1]
    two = draw(pipe, PROMPTS, num_images_per_prompt=2, strength=0.5, **given | {"image": [picture, picture]})
    assert len(two) == 4
    for mode in ("RGBA", "L", "P"):
        same = given | {"image": picture.convert(mode), "strength": 0.25}
        assert draw(pipe, "a red ring", **same).shape == near.shape


def test_given_timesteps_and_sigmas(pipe):
    plain = draw(pipe, "a red ring", shift=1.0, num_inference_steps=4)
    assert torch.allclose(draw(pipe, "a red ring", timesteps=[0, 0.25, 0.5, 0.75, 1]), plain, atol=1e-5)
    assert torch.allclose(draw(pipe, "a red ring", sigmas=[1.0, 0.75, 0.5, 0.25]), plain, atol=1e-5)


def test_interrupted_by_a_callback(pipe):
    seen = []

    def stop(which, step, t, given):
        seen.append(given["latents"])
        which._interrupt = step == 1
        return {}

    drawn = draw(pipe, PROMPTS, num_inference_steps=6, output_type="latent", callback_on_step_end=stop)
    assert len(seen) == 2 and torch.equal(drawn, seen[1]) and pipe.interrupt
    draw(pipe, "a", callback_on_step_end=lambda *a: seen.append(None) or {})
    assert len(seen) == 4 and not pipe.interrupt


def test_less_memory_for_the_decoder(pipe):
    plain = draw(pipe, PROMPTS)
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing and torch.allclose(draw(pipe, PROMPTS), plain, atol=1e-5)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling and draw(pipe, PROMPTS, height=128, width=128).shape == (2, 3, 128, 128)
    pipe.disable_vae_tiling()
    assert torch.equal(draw(pipe, PROMPTS), plain)


def test_parts_wait_on_the_cpu_until_they_are_called(saved, pipe):
    """The CPU stands for the accelerator: the hooks and their order are the real ones."""
    pytest.importorskip("accelerate")
    offloaded = TinyFluxPipeline.from_pretrained(saved)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_model_cpu_offload(device="cpu")
    assert len(offloaded._all_hooks) == 4
    assert torch.equal(draw(offloaded, PROMPTS), draw(pipe, PROMPTS))
    assert draw(offloaded, "a", image=Image.new("RGB", (64, 64))).shape == (1, 3, 64, 64)


def test_adapters(saved, pipe, model, tmp_path):
    torch.manual_seed(3)
    layers = ("double_blocks.0.attn.img_qkv", "single_blocks.0.mlp.fc1")
    widths = {path: linear_layers(model)[path].weight.shape for path in layers}
    pairs = {path: (torch.randn(2, n), torch.randn(m, 2)) for path, (m, n) in widths.items()}
    Lora(pairs, dict.fromkeys(pairs, 0.5)).save_original(tmp_path / "lora.safetensors")
    adapted = TinyFluxPipeline.from_pretrained(saved)
    adapted.set_progress_bar_config(disable=True)
    plain = draw(adapted, "a red ring")
    adapted.load_lora_weights(tmp_path / "lora.safetensors")
    whole = draw(adapted, "a red ring")
    assert not torch.allclose(whole, plain, atol=1e-3)
    adapted.load_lora_weights(tmp_path / "lora.safetensors", "again", scale=0.5)
    adapted.set_adapters("again", 1.0)  # the other one does not count
    assert torch.allclose(draw(adapted, "a red ring"), whole, atol=1e-5)
    adapted.set_adapters(["default", "again"], [0.25, 0.75])
    assert torch.allclose(draw(adapted, "a red ring"), whole, atol=1e-4)
    with pytest.raises(ValueError, match="1 adapter_weights for 2 adapters"):
        adapted.set_adapters(["default", "again"], [1.0])
    Lora({layers[0]: (torch.randn(2, 3), torch.randn(5, 2))}, {layers[0]: 1.0}).save_original(tmp_path / "other")
    with pytest.raises(ValueError, match="the LoRA does not fit this network"):
        adapted.load_lora_weights(tmp_path / "other")  # of the same name: the one that was there stays
    assert torch.allclose(draw(adapted, "a red ring"), whole, atol=1e-4)
    with pytest.raises(ValueError, match="no adapter other; loaded adapters: default, again"):
        adapted.set_adapters("other")
    adapted.unload_lora_weights()
    assert torch.equal(draw(adapted, "a red ring"), plain)  # bit for bit
    with pytest.raises(FileNotFoundError, match="no LoRA here"):
        adapted.load_lora_weights(tmp_path / "nothing")
