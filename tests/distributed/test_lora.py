"""LoRA on sharded networks: the base weights do not change, and a run resumes on any number of ranks."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.training import curve, make_source, train
from tinyflux.model.loader import load_model
from tinyflux.model.lora import read_lora
from tinyflux.run.checkpoint import PUBLISHED


def test_resumes_on_another_rank_count(tmp_path):
    source = [make_source(tmp_path / "a", 1)]
    done = train(tmp_path / "base", source, "--trainer.total-steps", 2)
    assert done.returncode == 0, done.stdout
    base = load_model(tmp_path / "base", use_ema=True)

    options = ["--trainer.lora-rank", 3, "--trainer.lora-targets", "*_blocks.*.attn.*", "--trainer.total-steps"]
    options = [*options, 6, "--trainer.init-from", tmp_path / "base", "--trainer.weight-decay", 0.1]
    done = train(tmp_path / "whole", source, *options)
    assert done.returncode == 0, done.stdout
    for steps, ranks in ((3, 2), (6, 1)):
        done = train(tmp_path / "parts", source, *options, "--trainer.total-steps", steps, ranks=ranks)
        assert done.returncode == 0, done.stdout
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]

    done = train(tmp_path / "parts", source, *options, "--trainer.lora-rank", 2)
    assert done.returncode == 2 and "trainer.freeze or trainer.lora_*" in done.stdout, done.stdout
    folder = tmp_path / "parts/checkpoints/step_6_lora"

    def exported() -> dict:
        """Every file's content, of weights the tensors: safetensors writes metadata in any order."""
        weights = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        others = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in weights}
        return others | {(name, key): x.tolist() for name, tensors in weights.items() for key, x in tensors.items()}

    before = exported()
    shutil.rmtree(folder)
    (tmp_path / "parts/checkpoints/step_6" / PUBLISHED).unlink()  # killed after the weights were exported
    done = train(tmp_path / "parts", source, *options)
    assert done.returncode == 0 and "finished already" in done.stdout, done.stdout
    assert len(before) > 10 and exported() == before

    trained = load_model(tmp_path / "parts", use_ema=True)
    changed = {name for name, p in base.named_parameters() if not torch.equal(p, trained.get_parameter(name))}
    ends = ("qkv.weight", "out.weight", "out_proj.weight")
    assert changed == {name for name, _ in base.named_parameters() if "_blocks" in name and name.endswith(ends)}
    lora = read_lora(tmp_path / "parts/checkpoints/step_6_lora", base)
    assert {len(a) for a, _ in lora.pairs.values()} == {3}
    lora.add_to(base)
    for p, q in zip(base.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_weights_to_adapt_must_be_given(tmp_path):
    done = train(tmp_path / "run", [make_source(tmp_path / "a", 1)], "--trainer.lora-rank", 2)
    assert done.returncode == 2 and "give trainer.init_from" in done.stdout, done.stdout
