"""Building sources: the models' precision, memory, compilation and timesteps, and what depends on them."""

import pytest
import torch

from tests.builds import content, run, samples, sources, whole
from tinyflux.model.zoo import ModelZoo
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import open_source

pytestmark = pytest.mark.usefixtures("alone")


def test_no_previews_bfloat16_noise_and_limit(tmp_path):
    sources(tmp_path)
    args = ("--limit", 6, "--no-preview", "--dtype", "bfloat16", "--teacher-input", "noise")
    assert run(tmp_path, *args, source="drawn") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.count == 6 and manifest.groups["lune"].fields["lune"].dtype == "bfloat16"
    assert manifest.groups["lune"].producer["teacher_input"] == "noise"
    assert "jpg" not in open_source(tmp_path / "out").open(0).samples[0].members


def test_fewer_timesteps(tmp_path, capsys):
    """Recorded in the manifest; equal features at timesteps that both grids have; an overlay uses its base's grid."""
    sources(tmp_path)
    for name, count in (("few", 4), ("all", 10)):
        args = ("--limit", 3, "--timesteps", count, "--no-sol")
        assert run(tmp_path, "--out", tmp_path / name, *args, source="drawn") == 0
    groups = Manifest.load(tmp_path / "few").groups
    assert groups["lune"].timesteps == (0.05, 0.35, 0.65, 0.95) and groups["lune"].fields["lune"].shape[0] == 4
    few, every = samples(tmp_path / "few"), samples(tmp_path / "all")
    for index in few:
        torch.testing.assert_close(few[index]["lune"], every[index]["lune"][::3], atol=2e-3, rtol=2e-3)
    only = ("--only", "sol", "--from", tmp_path / "few", "--out", tmp_path / "sol")
    assert run(tmp_path, *only, "--timesteps", 10, source="drawn") == 2
    assert "--timesteps 10: the teachers of" in capsys.readouterr().err
    assert run(tmp_path, *only, source="drawn") == 0
    assert Manifest.load(tmp_path / "sol").groups["sol"].timesteps == groups["lune"].timesteps


def test_same_sample_whatever_the_batch(tmp_path):
    """Features of a sample depend on its seed and image, not on what else is encoded with it."""
    sources(tmp_path)
    for name, size in (("a", 4), ("b", 3)):
        assert run(tmp_path, "--out", tmp_path / name, "--limit", 8, "--batch-size", size, source="drawn") == 0
    first, second = samples(tmp_path / "a"), samples(tmp_path / "b")
    for index in first:
        for name in ("latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
            a, b = first[index][name].float(), second[index][name].float()
            assert (a - b).abs().max() <= 1e-3 * max(1, a.abs().max())


def test_one_model_at_a_time_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    """--low-memory: never two models in memory, each loaded once per shard, and the same source."""
    sources(tmp_path)
    loads = []

    class Watched(ModelZoo):
        def _keep(self, name, *args):
            loads.append((name, self.loaded()))
            return super()._keep(name, *args)

    monkeypatch.setattr("tinyflux.model.zoo.ModelZoo", Watched)
    args = ("--shard-size", 8, "--limit", 14)
    assert run(tmp_path, "--out", tmp_path / "plain", *args, source="drawn") == 0
    loads.clear()
    assert run(tmp_path, "--out", tmp_path / "low", *args, "--low-memory", source="drawn") == 0
    assert content(tmp_path / "low") == content(tmp_path / "plain")
    assert not any(others for _, others in loads)
    names = [name for name, _ in loads]
    assert {name: names.count(name) for name in ("vae", "t5", "clip", "lune", "sol")} == {
        "vae": 3, "t5": 4, "clip": 4, "lune": 3, "sol": 3,  # for the fingerprint, the empty prompt, each shard
    }  # fmt: skip
    assert run(tmp_path, "--out", tmp_path / "plain", *args, "--low-memory", source="drawn") == 0  # one and the same
    capsys.readouterr()
    assert run(tmp_path, "--estimate", "--low-memory", "--shard-size", 4, source="drawn") == 0
    assert "all 20 inputs" in capsys.readouterr().out


def test_precision_of_single_models(tmp_path, capsys):
    """--model-dtype for Lune: changes only its feature and its part of the fingerprint."""
    sources(tmp_path)
    for name, options in (("plain", ()), ("half", ("--model-dtype", "lune", "bfloat16"))):
        assert run(tmp_path, "--out", tmp_path / name, "--limit", 4, *options, source="drawn") == 0
    plain, half = samples(tmp_path / "plain"), samples(tmp_path / "half")
    for index in plain:
        for name in ("latents", "t5_embeds", "clip_pooled", "sol_stats", "sol_spatial"):
            assert torch.equal(plain[index][name], half[index][name])
        a, b = plain[index]["lune"].float(), half[index]["lune"].float()
        assert not torch.equal(a, b) and (a - b).norm() <= 0.05 * a.norm()
    prints = [whole(Manifest.load(tmp_path / name).groups) for name in ("plain", "half")]
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"lune"}
    assert prints[1]["lune"]["dtype"] == "bfloat16"
    capsys.readouterr()
    assert run(tmp_path, "--out", tmp_path / "half", "--limit", 4, source="drawn") == 2
    assert "settings.model_dtype.lune: 'bfloat16' against None" in capsys.readouterr().err
    assert run(tmp_path, "--out", tmp_path / "x", "--model-dtype", "lena", "bfloat16", source="drawn") == 2
    assert "no such model: lena" in capsys.readouterr().err


def test_compiled_models_agree(tmp_path, monkeypatch, capsys):
    """--compile: features equal to 1e-3, and not mixed with those of an ordinary build.

    The compiler's last stage takes a minute for the UNets, so only the earlier stages run.
    """
    sources(tmp_path)
    graphs = []

    class Watched(ModelZoo):
        def compile(self):
            super().compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr("tinyflux.model.zoo.ModelZoo", Watched)
    args = ("--shard-size", 6, "--limit", 6)  # batches of 4 and 2
    assert run(tmp_path, "--out", tmp_path / "plain", *args, source="drawn") == 0
    assert not graphs
    assert run(tmp_path, "--out", tmp_path / "compiled", *args, "--compile", source="drawn") == 0
    assert len(graphs) > 6  # two encoders, Lune's blocks, Sol's
    plain, compiled = samples(tmp_path / "plain"), samples(tmp_path / "compiled")
    assert len(plain) == len(compiled) == 6
    for index in plain:
        for name in ("latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
            a, b = plain[index][name].float(), compiled[index][name].float()
            assert (a - b).abs().max() <= 1e-3 * max(1, a.abs().max()), name
    capsys.readouterr()
    assert run(tmp_path, "--out", tmp_path / "plain", *args, "--compile", source="drawn") == 2
    assert "settings.compile: False against True" in capsys.readouterr().err
