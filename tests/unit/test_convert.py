"""Legacy caches converted by sharding.build: kind "cache"."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sharding import build, verify
from tests.make_source import make_old_cache, make_tensors
from tests.training import train
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import open_source


@pytest.fixture
def folder(tmp_path, monkeypatch, alone):
    """The working folder, with an old cache `old`."""
    monkeypatch.chdir(tmp_path)
    make_old_cache(tmp_path / "old")
    return tmp_path


def run(*args: object) -> int:
    return build.main(["--source", "old", "--shard-size", "3", *map(str, args)])


def test_an_old_cache_becomes_a_source(folder, capsys):
    assert run("--kind", "cache", "--dataset-id", 4) == 0
    out = capsys.readouterr().out
    assert "null.safetensors is zeros" in out and "7 samples in 3 shards" in out
    assert verify.main(["data/old", "--deep"]) == 0
    source = open_source("data/old")
    assert source.dataset_id == 4 and "legacy cache" in source.groups["latents"].producer["producer"]
    for name, tensor in source.open(2).decode(0).items():
        assert torch.equal(tensor, make_tensors(6)[name])
    meta = json.loads(source.open(2).read(0, "json"))
    assert meta == {"prompts": ["p6"], "source": "old", "dataset_id": 4, "index": 6, "origin": "old/6"}
    (folder / "data" / "old" / "old-000001.tar").unlink()
    assert run("--kind", "cache", "--dataset-id", 4) == 0  # the same command makes what is missing
    assert verify.main(["data/old", "--deep"]) == 0
    assert run("--kind", "cache", "--dataset-id", 4) == 0
    assert "complete, 7 samples" in capsys.readouterr().out
    ran = train(folder / "run", [Path("data/old")], "--trainer.total-steps", 1)
    assert ran.returncode == 0, ran.stdout


def test_listed_with_the_empty_prompt_of_another_source(folder):
    null = {"t5_embeds": torch.rand(6, 8), "clip_pooled": torch.rand(8)}
    safetensors.torch.save_file(null, folder / "null.safetensors")
    table = '[old]\nkind = "cache"\nlocation = "old"\ndataset_id = 2\nnull = "null.safetensors"\n'
    (folder / "sources.toml").write_text(table)
    assert run("--no-sol", "--limit", 5) == 0
    source = open_source("data/old")
    assert set(source.manifest.groups) == {"latents", "text", "lune"} and source.manifest.count == 5
    assert torch.equal(source.null["t5_embeds"], null["t5_embeds"])
    assert run("--no-sol", "--append") == 0
    assert Manifest.load("data/old").count == 7
    last = open_source("data/old").open(2)
    assert last.key(1) == "0002_000000007" and b'"prompts": ["p6"]' in last.read(1, "json")
    assert verify.main(["data/old", "--deep"]) == 0


def test_a_sample_that_cannot_be_used_is_left_out(folder):
    features = torch.rand(7, 10, 6).half()
    features[3, 2] = torch.nan
    make_old_cache(folder / "old", lune=features)
    assert run("--kind", "cache", "--max-rejected", 0.5) == 0
    rejected = [json.loads(line) for line in (folder / "data/old/rejected.jsonl").read_text().splitlines()]
    assert rejected == [{"index": 3, "origin": "old/3", "reason": "not finite: lune has NaN or infinity"}]
    assert Manifest.load("data/old").count == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--kind", "cache", "--dtype", "bfloat16"), "--dtype does not apply to a legacy cache"),
        (("--kind", "cache", "--estimate"), "--estimate does not apply"),
        (("--kind", "shapes"), "--kind shapes: such a source must be described in a sources.toml; known"),
        (("--kind", "cache", "--dataset-id", -1), "dataset_id is -1: it must be in [0, 9999]"),
        ((), "unknown source 'old'"),
    ],
)  # fmt: skip
def test_bad_options(folder, capsys, args, message):
    assert run(*args) == 2
    assert message in capsys.readouterr().err


def test_bad_keys_and_files(folder, capsys):
    table = '[old]\nkind = "cache"\nlocation = "old"\ndataset_id = 2\n'
    (folder / "sources.toml").write_text(table + 'crop = "top"\n')
    assert run() == 2 and "unknown key 'crop' of kind 'cache': " in capsys.readouterr().err
    (folder / "sources.toml").write_text(table + 'null = "none"\n')
    assert run() == 2 and "none: no such file" in capsys.readouterr().err
    (folder / "sources.toml").write_text(table)
    assert run("--kind", "hf") == 2 and "[old] is of kind 'cache', not 'hf'" in capsys.readouterr().err
    (folder / "old" / "lune.pt").write_bytes(b"\x00" * 50)
    assert run() == 2 and "lune.pt" in capsys.readouterr().err
    (folder / "old" / "encodings.pt").unlink()
    assert run() == 2 and "no encodings.pt here" in capsys.readouterr().err
    assert not (folder / "data").exists()
