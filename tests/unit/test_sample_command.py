"""launch/sample.py on a small run folder and the packaged zoo."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from launch.sample import main
from tinyflux.model.loader import load_model, save_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.sampling import Sampler, to_uint8

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
WIDTHS = {"joint_attention_dim": 128, "pooled_projection_dim": 128, "lune_expert_dim": 128}
SMALL = TinyFluxConfig(
    **SIZES, **WIDTHS, num_double_layers=1, num_single_layers=1, lune_hidden_dim=16, sol_hidden_dim=8
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "mine"
    for name in ("step_5", "step_5_ema"):
        torch.manual_seed(len(name))
        model = TinyFluxDeep(SMALL)
        torch.nn.init.normal_(model.final_linear.weight, std=0.3)
        save_published(model, folder / "checkpoints" / f"{name}.safetensors")
    (folder / "checkpoints" / "training_config.json").write_text(json.dumps({"trainer": {"shift": 2.0}}))
    return folder


def call(run_dir, *options):
    return main(["--checkpoint", str(run_dir), "--zoo", "tiny", "--steps", "2", *map(str, options)])


def test_a_grid_with_its_parameters(run_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n\n  a green star \n")
    out = tmp_path / "grid.png"
    options = ["--solver", "heun", "--guidance-interval", "0.2", "0.9", "--guidance-rescale", "0.7", "--seed", "4"]
    size = ["--height", "32", "--width", "48", "--columns", "1", "--negative-prompt", "blue"]
    assert call(run_dir, "--prompt-file", prompts, "--out", out, *options, *size) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out) and "shift 2 of" in captured.err and "step_5_ema" in captured.err
    picture = Image.open(out)
    assert picture.size == (48, 66)
    text = picture.text["parameters"]
    assert str(run_dir.parent) not in text
    assert json.loads(text) == {
        "prompts": ["a red ring", "a green star"], "checkpoint": "mine", "weights": "step_5_ema.safetensors",
        "negative_prompt": "blue", "seed": 4, "height": 32, "width": 48, "steps": 2, "guidance": 5.0, "shift": 2.0,
        "solver": "heun", "guidance_interval": [0.2, 0.9], "guidance_rescale": 0.7,
    }  # fmt: skip


def test_one_file_each_with_the_pixels_of_the_sampler(run_dir, tmp_path):
    prompts = ["a red ring", "a green star"]
    assert call(run_dir, "--prompt", *prompts, "--out", tmp_path / "a.png", "--no-grid", "--seed", 9, "--no-ema") == 0
    drawn = Sampler(ModelZoo(zoo="tiny"), steps=2, shift=2.0)(load_model(run_dir), prompts, seed=9)
    for k, expected in enumerate(to_uint8(drawn).permute(0, 2, 3, 1).numpy()):
        picture = Image.open(tmp_path / f"a-{k}.png")
        assert np.array_equal(np.asarray(picture), expected)
        assert json.loads(picture.text["parameters"])["prompts"] == [prompts[k]]


def test_a_compiled_network_draws_the_same(run_dir, tmp_path):
    pictures = []
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        assert call(run_dir, "--prompt", "a red ring", "--out", tmp_path / f"{name}.png", *options) == 0
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int))
    assert pictures[0].std() > 1 and abs(pictures[0] - pictures[1]).max() <= 2  # of 255: sums in another order


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "a", "--height", "30"], "multiples of"),
        (["--prompt", "a", "--guidance-interval", "1", "0"], "guidance_interval must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run_dir, options, message, capsys):
    assert call(run_dir, *options) == 1
    assert message in capsys.readouterr().err


def test_prompts_are_asked_for(run_dir, capsys):
    with pytest.raises(SystemExit):
        call(run_dir)
    assert "give --prompt or --prompt-file" in capsys.readouterr().err
