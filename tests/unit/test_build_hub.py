"""A build with the real models' names, served on loopback with the tiny models' files."""

import hashlib
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sharding import build
from tests.hub import serve
from tinyflux.model import zoo as zoo_module
from tinyflux.model.zoo import TINY_DIR
from tinyflux.precache.extract import whole
from tinyflux.shards.manifest import Manifest


def commit(branch: str) -> str:
    return hashlib.sha1(branch.encode()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    sd15, experts = tmp_path / "sd15", tmp_path / "experts"
    shutil.copytree(TINY_DIR / "sd_vae", sd15 / "vae")
    shutil.copytree(TINY_DIR / "lune", sd15 / "unet")
    shutil.copytree(TINY_DIR / "vae", tmp_path / "flux" / "vae")
    experts.mkdir()
    unet = load_file(next((TINY_DIR / "lune").glob("*.safetensors")))
    for name in ("lune", "sol"):  # both of one shape here, as the real ones are
        save_file(unet, experts / f"sd15-flow-{name}-unet.safetensors")
    repos = {"google/flan-t5-base": {"main": TINY_DIR / "t5", "v2": TINY_DIR / "t5"},
             "openai/clip-vit-large-patch14": {"main": TINY_DIR / "clip"},
             "black-forest-labs/FLUX.1-schnell": {"main": tmp_path / "flux"},
             zoo_module.SD15: {"main": sd15}, zoo_module.EXPERTS: {"main": experts}}  # fmt: skip
    with serve(repos, tmp_path / "cache", monkeypatch) as server:
        yield server


def test_revisions_are_resolved_recorded_and_kept(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sources.toml").write_text('[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = 6\nsize = 64\n')
    command = ["--source", "drawn", "--batch-size", "2", "--shard-size", "2", "--threads", "1"]
    assert build.main([*command, "--limit", "2", "--revision", "t5", "v2"]) == 0
    manifest = Manifest.load(tmp_path / "data" / "drawn")
    assert manifest.groups["text"].producer["t5"]["revision"] == commit("v2")
    assert manifest.groups["latents"].producer["vae"]["revision"] == commit("main")
    assert manifest.groups["lune"].fields["lune"].shape[0] == 10 and manifest.count == 2

    assert build.main([*command, "--append"]) == 0  # not main's: the commit that the build was begun with
    grown = Manifest.load(tmp_path / "data" / "drawn")
    assert grown.count == 6 and grown.groups == manifest.groups

    capsys.readouterr()
    assert build.main([*command, "--append", "--revision", "t5", "main"]) == 2
    message = capsys.readouterr().err
    assert commit("v2") in message and commit("main") in message
    assert build.main([*command, "--append", "--revision", "vea", "main"]) == 2
    assert "no such model: vea" in capsys.readouterr().err


def test_a_finished_build_is_not_called_complete_for_other_models(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sources.toml").write_text('[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = 2\nsize = 64\n')
    command = ["--source", "drawn", "--batch-size", "2", "--shard-size", "2", "--threads", "1"]
    assert build.main(command) == 0
    fingerprint = whole(Manifest.load(tmp_path / "data" / "drawn").groups)
    expected = {"repo": zoo_module.SD15, "revision": commit("main"), "subfolder": "unet"}
    assert fingerprint["lune"]["config"] == fingerprint["sol"]["config"] == expected

    for revision in ("main", commit("main")):  # what it was built with, by either name
        assert build.main([*command, "--revision", "t5", revision]) == 0
        assert "complete, 2 samples" in capsys.readouterr().out
    assert build.main([*command, "--revision", "t5", "v2", "vae", "main"]) == 2
    message = capsys.readouterr().err
    assert f"t5.revision: '{commit('main')}' against '{commit('v2')}'" in message and "vae" not in message
    hub.repos[zoo_module.SD15]["new"] = hub.repos[zoo_module.SD15]["main"]
    assert build.main([*command, "--revision", "unet", "new"]) == 2
    assert f"unet.revision: '{commit('main')}' against '{commit('new')}'" in capsys.readouterr().err
    assert build.main([*command, "--out", "pinned", "--revision", "unet", "new"]) == 0
    assert Manifest.load(tmp_path / "pinned").groups["lune"].producer["lune"]["config"]["revision"] == commit("new")
    assert build.main([*command, "--zoo", "tiny", "--out", "local", "--revision", "t5", "v2"]) == 2
    assert "zoo 'tiny' has local files" in capsys.readouterr().err
