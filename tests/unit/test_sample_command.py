"""launch/sample.py on a small run folder and the packaged zoo."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import T5Config, T5EncoderModel

from launch.sample import main
from tests.weights import write_run
from tinyflux.model.loader import load_model
from tinyflux.model.zoo import TINY_DIR, ModelZoo
from tinyflux.trainer.sampling import Sampler
from tinyflux.util.pixels import to_uint8

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("private") / "mine", {"step_5": 6, "step_5_ema": 10})


def call(run_dir, *options):
    return main(["--checkpoint", str(run_dir), "--steps", "2", *map(str, options)])


def test_a_grid_with_its_parameters(run_dir, tmp_path, capsys, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n\n  a green star \n", encoding="utf-8-sig")
    out = tmp_path / "grid.png"
    options = ["--solver", "heun", "--guidance-interval", "0.2", "0.9", "--guidance-rescale", "0.7", "--seed", "4"]
    size = ["--height", "32", "--width", "48", "--columns", "1", "--negative-prompt", "blue"]
    assert call(run_dir, "--prompt-file", prompts, "--out", out, *options, *size) == 0
    told = caplog.text
    origin = run_dir / "checkpoints" / "training_config.json"
    assert capsys.readouterr().out.strip() == str(out) and "weights step_5_ema.safetensors (averaged)" in told
    for line in (f"zoo tiny (of {origin})", f"shift 2 (of {origin})", "guidance 3 (of", "size 32x48 (as given)"):
        assert line in told
    assert "no training image was 32x48 (height x width); sizes in training: 64x64, 48x64" in told
    picture = Image.open(out)
    assert picture.size == (48, 66)
    text = picture.text["parameters"]
    assert str(run_dir.parent) not in text
    assert json.loads(text) == {
        "prompts": ["a red ring", "a green star"], "picture": 0, "checkpoint": "mine",
        "weights": "step_5_ema.safetensors", "zoo": "tiny",
        "negative_prompt": "blue", "seed": 4, "height": 32, "width": 48, "steps": 2, "guidance": 3.0,
        "shift": 2.0,
        "solver": "heun", "guidance_interval": [0.2, 0.9], "guidance_rescale": 0.7,
    }  # fmt: skip


def test_one_file_each_with_the_pixels_of_the_sampler(run_dir, tmp_path):
    prompts = ["a red ring", "a green star"]
    assert call(run_dir, "--prompt", *prompts, "--out", tmp_path / "a.png", "--no-grid", "--seed", 9, "--no-ema") == 0
    drawn = Sampler(ModelZoo(zoo="tiny"), steps=2, shift=2.0, guidance=3.0)(load_model(run_dir), prompts, seed=9)
    for k, expected in enumerate(to_uint8(drawn).permute(0, 2, 3, 1).numpy()):
        picture = Image.open(tmp_path / f"a-{k}.png")
        assert np.array_equal(np.asarray(picture), expected)
        assert json.loads(picture.text["parameters"])["prompts"] == [prompts[k]]
    again = ["--prompt", prompts[1], "--first", 1, "--out", tmp_path / "again.png", "--seed", 9, "--no-ema"]
    assert call(run_dir, *again) == 0
    drawn_again = np.asarray(Image.open(tmp_path / "again.png")).astype(int)
    assert abs(drawn_again - expected).max() <= 1  # of 255: sums of another batch size


def test_doubts_and_a_prompt_that_is_cut(run_dir, tmp_path, caplog):
    """One warning per prompt about words that training never saw, and about truncation by the encoders."""
    prompts = ["a red ring", "a Blue hexagon", "a red ring " * 60, "a red ring " * 60]
    assert call(run_dir, "--prompt", *prompts, "--out", tmp_path / "a.png", "--guidance", "2") == 0
    told = caplog.text
    assert "guidance 2 (as given)" in told and "size 64x64 (of" in told and "no training image" not in told
    assert told.count("no training caption has blue, hexagon, in the prompt 'a Blue hexagon'") == 1
    assert told.count("t5 keeps 32 of 182 tokens") == told.count("clip keeps 77 of 182 tokens") == 1


def test_without_a_run_the_published_defaults_hold(run_dir, tmp_path, capsys, caplog):
    copied = tmp_path / "step_5.safetensors"
    copied.write_bytes((run_dir / "checkpoints" / "step_5.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((run_dir / "checkpoints" / "config.json").read_bytes())
    assert call(copied, "--prompt", "a hexagon", "--zoo", "tiny", "--out", tmp_path / "a.png") == 0
    told = caplog.text
    assert "zoo tiny (as given)" in told and "shift 3 (by default: the checkpoint has no training_config" in told
    assert "size 64x64 (the zoo's own)" in told and "no training caption" not in told
    (tmp_path / "training_config.json").write_text("[]")
    assert call(copied, "--prompt", "a hexagon") == 2
    assert "is not the training_config.json of a run" in capsys.readouterr().err


def test_another_zoo_and_a_missing_step(run_dir, tmp_path, capsys):
    zoo = tmp_path / "zoo"
    shutil.copytree(TINY_DIR, zoo, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    words = T5Config.from_pretrained(TINY_DIR / "t5").vocab_size  # its tokenizer stays
    T5EncoderModel(T5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        zoo / "t5"
    )
    assert call(run_dir, "--prompt", "a", "--zoo", zoo) == 2
    assert "T5 and CLIP give 16 and 128 features, this network takes 128 and 128" in capsys.readouterr().err
    assert call(run_dir / "checkpoints" / "step_7", "--prompt", "a") == 2
    assert "no such checkpoint; existing ones are in" in (told := capsys.readouterr().err)
    assert "step_5.safetensors, step_5_ema.safetensors" in told


def test_help_appears_at_once():
    """Nothing heavy is imported before something is drawn."""
    code = "import sys, launch.sample; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.stdout.strip() == "[]", process.stderr


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
        (["--prompt", "a", "--height", "0"], "multiples of"),
        (["--prompt", "a", "--guidance", "nan"], "guidance must be a finite number"),
        (["--prompt", "a", "--guidance-interval", "1", "0"], "guidance_interval must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run_dir, options, message, capsys):
    assert call(run_dir, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give --prompt or --prompt-file"),
        (["--prompt", "a", "--out", "."], "--out . is a folder"),
        (["--prompt", "a", "--lora-scale", "nan"], "--lora-scale is nan"),
        (["--prompt-file", "latin1.txt"], "latin1.txt: not a text file in UTF-8"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(run_dir, tmp_path, monkeypatch, options, message, capsys):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("ein grüner Stern".encode("latin1"))
    with pytest.raises(SystemExit):
        call(run_dir, *options)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
