"""Verifying sources that are whole, and sources with one thing wrong."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sharding import build, verify
from tests.store_server import store_server
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import flat
from tinyflux.shards.tar import scan_tar


def built(folder: Path) -> int:
    """The command that builds `folder`/drawn: three shards of four shapes."""
    args = ["--source", "drawn", "--sources", str(folder / "sources.toml"), "--out", str(folder / "drawn")]
    return build.main([*args, "--zoo", "tiny", "--shard-size", "4", "--batch-size", "4", "--device", "cpu"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "sources.toml").write_text('[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = 12\n')
    assert built(folder) == 0
    return folder


@pytest.fixture
def source(whole, tmp_path) -> Path:
    """A copy of the whole source, to be spoilt."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy" / "drawn"


def faults(capsys, *args: object) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = verify.main([str(arg) for arg in args])
    return status, capsys.readouterr().out.splitlines()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_source_has_no_faults(source, capsys):
    for depth in ((), ("--deep",), ("--deep", "--repair")):
        assert faults(capsys, source, *depth) == (0, [f"{source}: 12 samples in 3 shards, no faults"])


def cut(folder: Path) -> None:
    path = folder / "drawn-000001.tar"
    path.write_bytes(path.read_bytes()[:-2000])


def missing(folder: Path) -> None:
    (folder / "drawn-000001.tar").unlink()


def tensor_bit(folder: Path) -> None:
    path = folder / "drawn-000001.tar"
    offset, size = scan_tar(path)[2].members["lune.safetensors.zst"]
    flip(path, offset + size // 2)


def preview_bit(folder: Path) -> None:
    path = folder / "drawn-000001.tar"
    flip(path, scan_tar(path)[2].members["jpg"][0] + 100)


def other_shard(folder: Path) -> None:
    """A manifest entry that takes shard 0 for shard 1."""
    manifest = Manifest.load(folder)
    shutil.copy(folder / "drawn-000000.tar", folder / "drawn-000001.tar")
    first, last = manifest.shards[0], manifest.shards[2]
    shards = [first, replace(first, name="drawn-000001.tar"), last]
    Manifest.of("drawn", 8, manifest.groups, shards, null_sha256=manifest.null_sha256).save(folder)


def stray(folder: Path) -> None:
    shutil.copy(folder / "drawn-000000.tar", folder / "drawn-000007.tar")


def null(folder: Path) -> None:
    (folder / "null.safetensors").write_bytes(b"x")


# what is done to the source -> what is printed, whether only --deep sees it
SPOILT = {
    cut: ("drawn-000001.tar: .*(cut short|is not the shard)", False),
    missing: ("drawn-000001.tar: .*No such file", False),
    other_shard: ("drawn-000001.tar, sample 0008_000000000: is also in drawn-000000.tar", False),
    stray: ("drawn-000007.tar: not in the manifest", False),
    null: ("null.safetensors: .*its sha256 is not the manifest's", False),
    tensor_bit: ("drawn-000001.tar, sample 0008_000000006: lune: ", True),
    preview_bit: ("drawn-000001.tar: its sha256 is not the manifest's", True),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_one_line_a_fault(source, capsys, spoil):
    pattern, deep_only = SPOILT[spoil]
    spoil(source)
    status, lines = faults(capsys, source)
    assert status == (0 if deep_only else 1)
    status, lines = faults(capsys, source, "--deep")
    assert status == 1
    assert sum(bool(re.search(pattern, line)) for line in lines) >= 1, lines


def test_bad_shards_are_set_aside_and_made_anew(source, whole, capsys):
    """--repair leaves a source that reads; the build's own command brings back the same bytes."""
    tensor_bit(source)
    status, lines = faults(capsys, source, "--deep", "--repair")
    assert status == 1 and "1 shards are set aside" in lines[-1]
    assert (source / "bad" / "drawn-000001.tar").exists() and not (source / "drawn-000001.tar").exists()
    assert [shard.name for shard in Manifest.load(source).shards] == ["drawn-000000.tar", "drawn-000002.tar"]
    assert faults(capsys, source, "--deep")[0] == 0
    assert built(source.parent) == 0
    for name in ("drawn-000001.tar", "manifest.json"):
        assert (source / name).read_bytes() == (whole / "drawn" / name).read_bytes()


@pytest.mark.parametrize("notes", [True, False])
def test_a_lost_manifest_is_rebuilt(source, whole, capsys, notes):
    (source / "manifest.json").unlink()
    if not notes:
        shutil.rmtree(source / ".build")
    assert faults(capsys, source) == (1, [f"{source / 'manifest.json'}: missing"])
    status, lines = faults(capsys, source, "--repair", "--deep")
    assert status == 0 and lines[1] == "rebuilt: 12 samples in 3 shards"
    found, expected = Manifest.load(source), Manifest.load(whole / "drawn")
    if notes:
        assert found == expected
    else:
        assert found.index.digest == expected.index.digest and found.dataset_id == 8
        assert flat(found.groups) == flat(expected.groups)
        assert "unknown" in found.groups["lune"].producer["producer"]


def test_nothing_to_verify(tmp_path, capsys):
    assert verify.main([str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert verify.main([str(tmp_path), "--repair"]) == 2
    assert "no manifest can be rebuilt: no whole shard" in capsys.readouterr().err


def test_a_source_behind_a_url(source, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with store_server(source.parent) as server:
        url = f"{server.url}/drawn"
        assert faults(capsys, url, "--deep") == (0, [f"{url}: 12 samples in 3 shards, no faults"])
        assert verify.main([url, "--repair"]) == 2
        assert "pull the source" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    tensor_bit(source)
    with store_server(source.parent) as server:
        status, lines = faults(capsys, f"{server.url}/drawn")
    assert status == 1 and len(lines) == 1 and "drawn-000001.tar" in lines[0]
