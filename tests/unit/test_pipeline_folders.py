"""The diffusers pipeline in folders and on the Hub: plain files, variants, cards, code, and what is refused."""

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
from tests.pipelines import SMALL, draw, load, save, seeded, small_model
from tests.training import ROOT
from tinyflux.model.loader import CheckpointError, load_model, save_published
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.pipeline import TinyFluxPipeline
from tinyflux.trainer.pipeline_files import WEIGHTS


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def pipe(saved):
    return load(saved)


def test_a_saved_pipeline_is_plain_files(saved, model):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert {"model_index.json", "vae/config.json", f"transformer/{WEIGHTS}", "tokenizer_2/tokenizer.json"} <= files
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "TinyFluxPipeline" and index["shift"] == 2.0
    assert index["image_size"] == 64 and index["t5_length"] == 32
    loaded = load_model(saved / "transformer")  # a checkpoint like any other
    assert loaded.config == SMALL and loaded.img_in.weight.equal(model.img_in.weight)


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
