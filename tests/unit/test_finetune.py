"""The README's commands from a folder of pictures to a new picture, with the tiny zoo and a tiny model."""

import re
import shlex
import tomllib

import numpy as np
import torch
from PIL import Image

from launch.demo import CONFIG
from tests.forked import Forked
from tests.training import ROOT, environment, records
from tinyflux.model.loader import save_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.tiny.patterns import write_folder
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import flat
from tinyflux.trainer.config import fit_model


def test_from_a_folder_to_a_picture(tmp_path):
    text = (ROOT / "launch" / "README.md").read_text()
    section = text.split("## Fine-tune on a folder of your own\n")[1].split("\n## ")[0]
    (tmp_path / "sources.toml").write_text(re.search(r"```toml\n(.*?)```", section, re.DOTALL)[1])
    blocks = "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    lines = blocks.replace("\\\n", "").replace("AbstractPhil/tinyflux-deep", "published").splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("pip ")]
    build, train, sample, train_lora, sample_lora = commands
    write_folder(tmp_path / "photos", 12)
    (tmp_path / "launch").symlink_to(ROOT / "launch")

    def run(words: list[str], *more: str) -> None:
        words = words[1:] if words[0] == "python" else words[words.index("launch/train.py") :]
        process = Forked([*words, *more], environment() | {"HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said

    run(build, "--zoo", "tiny")
    found = flat(Manifest.load(tmp_path / "data" / "portraits").groups)
    fields = {name: field.at((8, 8)).shape for name, field in found.items()}
    config = fit_model(TinyFluxConfig(**tomllib.loads(CONFIG.read_text())["model"]), set(), fields)
    torch.manual_seed(0)
    published = TinyFluxDeep(config)
    torch.nn.init.normal_(published.final_linear.weight)  # as long as it is zero the blocks have no effect
    save_published(published, tmp_path / "published" / "model.safetensors")
    small = ["--trainer.zoo", "tiny", "--trainer.total-steps", "2", "--trainer.sample-every", "2", "--trainer.dtype"]
    small += ["float32", "--data.global-batch-size", "4", "--data.micro-batch-size", "4"]
    run(train, *small)
    assert len(records(tmp_path / "runs" / "portraits")) == 2
    assert (tmp_path / "runs" / "portraits" / "samples" / "step_2.png").is_file()
    run(sample, "--steps", "2")
    assert Image.open(tmp_path / "sailor.png").size == (64, 64)

    run(train_lora, *small, "--trainer.learning-rate", "1", "--trainer.warmup-steps", "0")
    run([word.replace("step_2000", "step_2") for word in sample_lora], "--zoo", "tiny", "--steps", "2")
    adapted = np.asarray(Image.open(tmp_path / "sailor.png"))
    run(sample, "--checkpoint", "published", "--zoo", "tiny", "--steps", "2")
    assert np.any(adapted != np.asarray(Image.open(tmp_path / "sailor.png")))
    run(sample, "--checkpoint", "runs/sailors", "--steps", "2")  # the adapter is in these weights
    assert np.array_equal(adapted, np.asarray(Image.open(tmp_path / "sailor.png")))
