"""A build with the real models' names, served on loopback with the tiny models' files."""

import hashlib
import shutil
import time

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from sharding import build
from tests.builds import whole
from tests.hub import serve
from tinyflux.model import zoo as zoo_module
from tinyflux.model.zoo import TINY_DIR
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

    assert build.main([*command, "--append"]) == 0  # not main's commit, but the one that the build started with
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


FAULTS = {
    "gated": (403, b"", {"X-Error-Code": "GatedRepo"}),
    "rate-limited": (429, b"", {"Retry-After": "1"}),
    "failing": (500, b"", {}),
    "damaged": (200, b"<html>not what you think</html>", {"X-Repo-Commit": commit("main"), "ETag": '"damaged"'}),
}
SAID = {  # what the error says of each kind of file
    ("gated", "vae/config.json"): "is gated: accept its terms",
    ("gated", "tokenizer.json"): "is gated: accept its terms",
    ("gated", "model.safetensors"): "is gated: accept its terms",
    ("gated", "sd15-flow-sol-unet.safetensors"): "is gated: accept its terms",
    ("damaged", "sd15-flow-sol-unet.safetensors"): "damaged or cut short",
    ("damaged", "tokenizer.json"): "google/flan-t5-base at ",
    ("damaged", "model.safetensors"): "google/flan-t5-base at ",
    ("damaged", "vae/config.json"): "black-forest-labs/FLUX.1-schnell:vae at ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_not_what_they_should_be(hub, tmp_path, monkeypatch, capsys, fault):
    """One line that names the repo or the file, nothing built, and with good answers the same command builds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
    (tmp_path / "sources.toml").write_text('[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = 2\nsize = 64\n')
    command = ["--source", "drawn", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    for file in ("vae/config.json", "tokenizer.json", "model.safetensors", "sd15-flow-sol-unet.safetensors"):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{file.replace('/', '-')}"))
        hub.faults = {file: FAULTS[fault]}
        status, error = build.main(command), capsys.readouterr().err
        line = [line for line in error.splitlines() if line.startswith("error: ")][-1]
        print(fault, file, status, line)
        assert status in (1, 2) and "Traceback" not in error
        assert SAID.get((fault, file), "no answer from the Hub") in line
        assert not list((tmp_path / "data").rglob("*.tar"))
    hub.faults = {}
    for path in (tmp_path / f"cache-{file}").rglob(file):  # what is damaged stays in the cache: delete it, as was told
        path.unlink()
    assert build.main(command) == 0
