"""The diffusers pipeline: the Sampler's pixels, diffusers' calls, plain files, the Hub, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.dataset_hub import TOKEN, dataset_hub
from tests.forked import Forked
from tests.training import ROOT, environment
from tinyflux.model.loader import CheckpointError, load_model, save_published
from tinyflux.model.lora import Lora, linear_layers
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.pipeline import TinyFluxPipeline
from tinyflux.trainer.pipeline_files import WEIGHTS
from tinyflux.trainer.sampling import Sampler
from tinyflux.util.pixels import to_uint8

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
WIDTHS = {"joint_attention_dim": 128, "pooled_projection_dim": 128, "lune_expert_dim": 128}
SMALL = TinyFluxConfig(
    **SIZES, **WIDTHS, num_double_layers=1, num_single_layers=1, lune_hidden_dim=16, sol_hidden_dim=8
)
PROMPTS = ["a red ring", "a green star"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TinyFluxDeep(SMALL).eval()
    torch.nn.init.normal_(model.final_linear.weight, std=0.3)  # zero at the start: every velocity would be 0
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("saved")
    TinyFluxPipeline.of(model, ModelZoo(zoo="tiny"), shift=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(saved):
    pipe = TinyFluxPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, *args, **given):
    return pipe(*args, **{"num_inference_steps": 2, "generator": seeded(3), "output_type": "pt"} | given).images


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


def test_a_saved_pipeline_is_plain_files(saved, model):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert {"model_index.json", "vae/config.json", f"transformer/{WEIGHTS}", "tokenizer_2/tokenizer.json"} <= files
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "TinyFluxPipeline" and index["shift"] == 2.0
    assert index["image_size"] == 64 and index["t5_length"] == 32
    loaded = load_model(saved / "transformer")  # a checkpoint like any other
    assert loaded.config == SMALL and loaded.img_in.weight.equal(model.img_in.weight)


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


def test_dtypes_and_other_parts(saved, pipe, model, tmp_path):
    assert pipe.dtype == torch.float32 and pipe.device == torch.device("cpu")
    half = TinyFluxPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert {part.dtype for part in half.components.values() if hasattr(part, "dtype")} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    again = TinyFluxPipeline.from_pretrained(tmp_path / "half")  # with the saved dtype
    half.set_progress_bar_config(disable=True)
    again.set_progress_bar_config(disable=True)
    assert again.vae.dtype == again.transformer.dtype == again.text_encoder_2.dtype == torch.bfloat16
    drawn = draw(half, "a red ring")
    assert torch.equal(draw(again, "a red ring"), drawn) and torch.allclose(drawn, draw(pipe, "a red ring"), atol=0.2)
    assert half.to(torch.float32).transformer.img_in.weight.dtype == torch.float32
    other = TinyFluxPipeline.from_pretrained(saved, vae=pipe.vae)
    assert other.vae is pipe.vae
    own = TinyFluxPipeline.of(model, pipe.zoo)
    assert own.transformer.img_in.weight.data_ptr() == model.img_in.weight.data_ptr()


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


def copied(saved: Path, folder: Path) -> Path:
    """A copy of links, of which single files can be replaced."""
    for path in saved.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(saved)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.relative_to(saved))
    return folder


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_damaged_and_foreign_folders(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder, and not of the form user/repo"):
        TinyFluxPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        TinyFluxPipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unknown argument unet; parts"):
        TinyFluxPipeline.from_pretrained(saved, unet=None)
    folder = copied(saved, tmp_path / "cut")
    replace(folder / "transformer" / WEIGHTS, (saved / "transformer" / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        TinyFluxPipeline.from_pretrained(folder)
    folder = copied(saved, tmp_path / "lacking")
    state = load_file(saved / "vae" / WEIGHTS)
    del state["decoder.conv_in.weight"]
    (folder / "vae" / WEIGHTS).unlink()
    save_file(state, folder / "vae" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="vae: 1 weights do not fit .*AutoencoderKL:\n  missing decoder.conv_in"):
        TinyFluxPipeline.from_pretrained(folder)
    folder = copied(saved, tmp_path / "pickled")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TinyFluxPipeline.from_pretrained(folder)
    index = json.loads((saved / "model_index.json").read_text())
    for change, message in [
        ({"_class_name": "FluxPipeline"}, "is of a 'FluxPipeline', not of a TinyFluxPipeline"),
        ({"shift": "__import__('os')"}, "shift is .* must be a positive number"),
    ]:
        replace(folder / "model_index.json", json.dumps(index | change).encode())
        with pytest.raises(ValueError, match=message):
            TinyFluxPipeline.from_pretrained(folder)


def test_no_code_of_a_folder_runs(saved, tmp_path):
    """Modules and classes named in a folder are ignored; the pipeline's are used."""
    folder = copied(saved, tmp_path / "evil")
    index = json.loads((saved / "model_index.json").read_text())
    replace(folder / "model_index.json", json.dumps(index | {"vae": ["evil", "Evil"]}).encode())
    for name in ("text_encoder_2", "tokenizer"):
        path = folder / name / ("config.json" if "encoder" in name else "tokenizer_config.json")
        auto = {"AutoModel": "evil.Evil", "T5EncoderModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        replace(path, json.dumps(json.loads(path.read_text()) | {"auto_map": auto}).encode())
    marker = tmp_path / "ran"
    for place in ("", "vae", "text_encoder_2", "tokenizer"):
        (folder / place / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    pipe = TinyFluxPipeline.from_pretrained(folder)
    assert type(pipe.vae).__name__ == "AutoencoderKL" and not marker.exists()


def test_only_plain_files_are_written_and_read(pipe, saved, tmp_path):
    with pytest.raises(ValueError, match="saved as safetensors"):
        pipe.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="use_safetensors=False"):
        TinyFluxPipeline.from_pretrained(saved, use_safetensors=False)
    assert TinyFluxPipeline.from_pretrained(saved, use_safetensors=True).config.shift == 2.0


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
    with pytest.raises(ValueError, match="no adapter other; loaded adapters: default, again"):
        adapted.set_adapters("other")
    adapted.unload_lora_weights()
    assert torch.equal(draw(adapted, "a red ring"), plain)  # bit for bit
    with pytest.raises(FileNotFoundError, match="no LoRA here"):
        adapted.load_lora_weights(tmp_path / "nothing")


def test_variants_and_devices(saved, pipe, tmp_path):
    half = TinyFluxPipeline.from_pretrained(saved, dtype=torch.bfloat16, device_map="cpu")
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (tmp_path / "half" / "text_encoder" / "model.fp16.safetensors").is_file()
    again = TinyFluxPipeline.from_pretrained(tmp_path / "half", variant="fp16", device_map={"vae": "cpu"})
    again.set_progress_bar_config(disable=True)
    assert again.vae.dtype == again.transformer.dtype == torch.bfloat16
    assert torch.allclose(draw(again, "a red ring"), draw(pipe, "a red ring"), atol=0.2)
    assert TinyFluxPipeline.from_pretrained(saved, device_map="balanced").device.type in ("cpu", "cuda")
    with pytest.raises(OSError, match="vae has no weights: one of diffusion_pytorch_model.safetensors"):
        TinyFluxPipeline.from_pretrained(tmp_path / "half")
    for device_map, message in (({"unet": "cpu"}, "unet is none of vae"), ("cuda:77", "cannot be on cuda:77")):
        with pytest.raises(ValueError, match=message):
            TinyFluxPipeline.from_pretrained(saved, device_map=device_map)


def test_a_card_that_the_hub_takes(model, tmp_path, monkeypatch):
    facts = {"base_model": "user/base", "datasets": "user/portraits, user/more", "license": "apache-2.0"}
    made = TinyFluxPipeline.of(model, ModelZoo(zoo="tiny"), guidance=2.0, **facts)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(tmp_path / "pipe", prompts=["a red ring"])
    card = ModelCard.load(tmp_path / "pipe" / "README.md", ignore_metadata_errors=False)
    with dataset_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        card.validate()
        with pytest.raises(ValueError, match="license: 'Mine!' is not valid"):
            ModelCard(card.content.replace("apache-2.0", "Mine!")).validate()
    data = card.data.to_dict()
    widget = [{"text": "a red ring", "output": {"url": "images/0.png"}}]
    expected = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "widget": widget, "license": "apache-2.0"}
    expected |= {"base_model": ["user/base"], "datasets": ["user/portraits", "user/more"]}
    assert {key: data[key] for key in expected} == expected
    picture = Image.open(tmp_path / "pipe" / "images" / "0.png")
    loaded = TinyFluxPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    drawn = loaded("a red ring", generator=seeded(0)).images[0]
    assert loaded.config.guidance == 2.0 and loaded.config.base_model == "user/base"
    assert np.array_equal(np.asarray(picture), np.asarray(drawn))
    (tmp_path / "pipe" / "README.md").write_text(card.content.replace("# A TinyFlux pipeline", "# Mine"))
    loaded.save_pretrained(tmp_path / "pipe")  # the text of a card that is there stays, and so do its pictures
    again = ModelCard.load(tmp_path / "pipe" / "README.md")
    assert "# Mine" in again.text and again.data.widget == widget


def test_of_a_run(model, tmp_path):
    save_published(model, tmp_path / "mine" / "checkpoints" / "step_5_ema.safetensors")
    trainer = {"shift": 2.0, "guidance_scale": 3.0, "zoo": "tiny", "init_from": "user/base:runs/a"}
    data = {"sources": ["data/portraits", "hf://datasets/user/repo/portraits@v1"]}
    config = json.dumps({"trainer": trainer, "data": data})
    (tmp_path / "mine" / "checkpoints" / "training_config.json").write_text(config)
    config = TinyFluxPipeline.from_checkpoint(tmp_path / "mine").config
    assert (config.shift, config.guidance, config.image_size) == (2.0, 3.0, 64)
    assert (config.base_model, config.datasets) == ("user/base", "user/repo")


LOAD_BY_ITS_OWN_CODE = """
import sys, torch
from diffusers import DiffusionPipeline

sys.modules["tinyflux"] = None  # an import of it fails, as where it is not installed
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(pipe).__module__.startswith("diffusers_modules"), type(pipe)
image = pipe("a red ring", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
image.save(sys.argv[2])
code = sys.argv[1] + "/pipeline.py"
named = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=code, trust_remote_code=True)
assert type(named).__name__ == "TinyFluxPipeline" and type(named).__module__.startswith("diffusers_modules")
"""


def test_with_its_code_it_loads_without_this_package(pipe, tmp_path):
    """With only diffusers, if the folder's code is trusted; and with this package, which runs none of it."""
    pipe.save_pretrained(tmp_path / "pipe", code=True)
    code = (tmp_path / "pipe" / "pipeline.py").read_text()
    assert "from tinyflux" not in code.replace('"from tinyflux.trainer.pipeline import TinyFluxPipeline"', "")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-c", LOAD_BY_ITS_OWN_CODE, tmp_path / "pipe", tmp_path / "ring.png"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert "pip install tinyflux" not in process.stderr
    drawn = pipe("a red ring", num_inference_steps=2, generator=seeded(3)).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "ring.png")), np.asarray(drawn))
    loaded = TinyFluxPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.transformer).__module__ == "tinyflux.trainer.pipeline"


PUSH_AND_LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from tinyflux.trainer.pipeline import TinyFluxPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red ring", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0].tobytes()

pipe = TinyFluxPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub("user/pipe")
pipe.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/other", code=True)
loaded = TinyFluxPipeline.from_pretrained("user/pipe")
assert draw(loaded) == draw(pipe)
assert draw(TinyFluxPipeline.from_pretrained("user/other", vae=pipe.vae)) == draw(pipe)
foreign = DiffusionPipeline.from_pretrained("user/other", trust_remote_code=True)
assert type(foreign).__module__.startswith("diffusers_modules") and draw(foreign) == draw(pipe)
"""


def test_hub(saved, tmp_path):
    """Pushed to and loaded from a hub on this machine by the real client."""
    with dataset_hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD, saved, tmp_path / "out"],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        files = hub.files("user/pipe")
        assert b'from_pretrained("user/pipe")' in files["README.md"]
        assert files[f"transformer/{WEIGHTS}"] == (saved / "transformer" / WEIGHTS).read_bytes()
        assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md", ""}
        assert {path for _, path in hub.served} >= {"model_index.json", "tokenizer/tokenizer.json"}
        code = {"pipeline.py", "transformer/pipeline.py"}
        assert hub.files("user/other").keys() == files.keys() | code
