"""The diffusers pipeline: the Sampler's pixels, diffusers' calls, plain files, the Hub, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.dataset_hub import TOKEN, dataset_hub
from tinyflux.model.loader import CheckpointError, load_model, save_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.pipeline import WEIGHTS, TinyFluxPipeline
from tinyflux.trainer.sampling import Sampler, to_uint8

ROOT = Path(__file__).parents[2]
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


def test_the_same_pixels_three_ways(model, pipe, tmp_path):
    """Sampler, the command as a process of its own, and the pipeline that was saved and loaded."""
    run = tmp_path / "mine"
    save_published(model, run / "checkpoints" / "step_5_ema.safetensors")
    (run / "checkpoints" / "training_config.json").write_text(json.dumps({"trainer": {"shift": 2.0}}))
    command = [sys.executable, ROOT / "launch" / "sample.py", "--checkpoint", run, "--zoo", "tiny", "--no-grid"]
    options = ["--steps", "3", "--seed", "3", "--negative-prompt", "blue", "--prompt", *PROMPTS]
    size = ["--height", "64", "--width", "48", "--out", tmp_path / "a.png"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [*command, *options, *size], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
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
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
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
    assert torch.equal(pipe.zoo.decode_latents(latents) / 2 + 0.5, pt)
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
    again = TinyFluxPipeline.from_pretrained(tmp_path / "half")  # as it was saved
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
    ],
)
def test_bad_input(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a"} | given)


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    draw(pipe, "a red ring " * 60)
    assert "t5 keeps 32 of 242 tokens, up to '..." in caplog.text and "clip keeps 77 of 182 tokens" in caplog.text


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
    with pytest.raises(TypeError, match="unet: no part of this pipeline"):
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
    with pytest.raises(ValueError, match="vae lacks 1 weights of AutoencoderKL, e.g. decoder.conv_in.weight"):
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
    """Whatever modules and classes a folder names, those of the pipeline are taken."""
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


def test_only_plain_files_are_written(pipe, tmp_path):
    for given in ({"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match="plain safetensors"):
            pipe.save_pretrained(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


PUSH_AND_LOAD = """
import sys, torch
from tinyflux.trainer.pipeline import TinyFluxPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red ring", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0].tobytes()

pipe = TinyFluxPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub("user/pipe")
pipe.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/other")
loaded = TinyFluxPipeline.from_pretrained("user/pipe")
assert draw(loaded) == draw(pipe)
assert draw(TinyFluxPipeline.from_pretrained("user/other", vae=pipe.vae)) == draw(pipe)
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
        assert files[f"transformer/{WEIGHTS}"] == (saved / "transformer" / WEIGHTS).read_bytes()
        assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md", ""}
        assert {path for _, path in hub.served} >= {"model_index.json", "tokenizer/tokenizer.json"}
        assert hub.files("user/other").keys() == files.keys()
