"""Verifying intact sources, and sources with one fault."""

import errno
import hashlib
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sharding import build, verify
from tests.make_source import make_source
from tests.store_server import store_server
from tinyflux.shards.index import Index
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
    """A manifest entry that confuses shard 0 with shard 1."""
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


@pytest.fixture(scope="module")
def layers(tmp_path_factory) -> Path:
    """Source a of three shapes with one to three captions, and overlays: Lune, other captions, a mask on Lune."""
    root = tmp_path_factory.mktemp("layers")
    options = {"counts": [4, 2, 3, 1], "shapes": ((4, 4), (2, 8), (8, 2))}
    base = make_source(root / "a", captions=[1, 3, 2], groups=("latents", "text", "sol"), **options)
    lune = make_source(root / "a-lune", groups=("lune",), base=base, producer={"lune": {"sha256": "ab"}}, **options)
    make_source(root / "a-text", captions=[2, 1], groups=("text",), seed=4, base=base, **options)
    make_source(root / "a-mask", groups=("mask",), base=lune, **options)
    return root


@pytest.fixture
def copied(layers, tmp_path) -> Path:
    return Path(shutil.copytree(layers, tmp_path / "layers"))


OVERLAYS = ("a-lune", "a-text", "a-mask")


@pytest.mark.parametrize("name", ["a", *OVERLAYS])
def test_a_lost_index_is_rebuilt(copied, layers, capsys, name):
    """Fingerprint, captions, shapes and base are restored: the manifest has the same bytes."""
    (copied / name / "index.safetensors").unlink()
    status, lines = faults(capsys, copied / name, "--repair", "--deep")
    assert status == 0 and lines[1:] == [
        "rebuilt: 10 samples in 4 shards",
        f"{copied / name}: 10 samples in 4 shards, no faults",
    ]
    for file in ("manifest.json", "index.safetensors"):
        assert (copied / name / file).read_bytes() == (layers / name / file).read_bytes()
    assert all(faults(capsys, copied / other, "--deep")[0] == 0 for other in OVERLAYS)


def swapped(root: Path) -> None:
    """Two shards of an overlay under each other's names."""
    a, b = (root / "a-lune" / f"a-00000{k}.tar" for k in (1, 2))
    other = b.read_bytes()
    shutil.copy(a, b)
    a.write_bytes(other)


def rebased(root: Path, **change) -> None:
    manifest = Manifest.load(root / "a-lune")
    manifest = Manifest(
        *(manifest.source, manifest.dataset_id, manifest.groups, manifest.shapes, manifest.index),
        base=replace(manifest.base, **change),
    )
    manifest.save(root / "a-lune")


def of_other_images(root: Path) -> None:
    """A base of equal counts and keys, whose hash was written into the overlay by hand."""
    base = Manifest.load(root / "a")
    arrays = base.index.arrays | {"origins": base.index.origins + 1}
    other = Manifest("a", 1, base.groups, base.shapes, Index(arrays), null_sha256=base.null_sha256)
    other.save(root / "a")
    rebased(root, sha256=other.sha256)


def bad_row(root: Path) -> None:
    path = root / "a-lune" / "a-000002.tar"
    offset, size = scan_tar(path)[2].members["lune.safetensors.zst"]
    flip(path, offset + size // 2)


# what is done -> the overlay that is checked, its exit status, its fault, whether --repair sets a shard of it aside
LAYERED = {
    "its shard is cut": (lambda r: os.truncate(r / "a-lune/a-000002.tar", 3000), "a-lune", 1, "a-000002.tar: ", True),
    "its shard is gone": (lambda r: (r / "a-lune/a-000002.tar").unlink(), "a-lune", 1, "a-000002.tar: No such", True),
    "its row is damaged": (bad_row, "a-lune", 1, "a-000002.tar, sample 0001_000000008: lune: ", True),
    "swapped": (swapped, "a-lune", 1, "a-000001.tar: (has none of the samples|is not the shard)", True),
    "its base's is cut": (lambda r: os.truncate(r / "a/a-000002.tar", 9000), "a-mask", 1, "a/a-000002.*base:", False),
    "its base's is gone": (lambda r: (r / "a/a-000002.tar").unlink(), "a-mask", 1, "a/a-000002.*base: No su", False),
    "the middle's is gone": (lambda r: (r / "a-lune/a-000002.tar").unlink(), "a-mask", 1, "e/a-0.*: No such", False),
    "base moved": (lambda r: (r / "a").rename(r / "b"), "a-lune", 2, "there is no folder .*base.location", False),
    "base changed": (lambda r: rebased(r, sha256="0" * 64), "a-lune", 2, "has changed since the overlay", False),
    "base itself": (lambda r: rebased(r, location="."), "a-lune", 2, "its overlays have no base", False),
    "base of other images": (of_other_images, "a-lune", 1, "other origin hashes for it than the base's", True),
    "manifest lost": (lambda r: (r / "a-lune/manifest.json").unlink(), "a-lune", 2, "this is an overlay", False),
}


@pytest.mark.parametrize("name", LAYERED)
def test_overlays_and_their_bases(copied, capsys, name):
    """The fault is named with its file, and a shard of an overlay is not set aside for a fault of its base."""
    spoil, overlay, wanted, pattern, aside = LAYERED[name]
    spoil(copied)
    capsys.readouterr()
    assert verify.main([str(copied / overlay), "--deep", "--repair"]) == wanted
    captured = capsys.readouterr()
    said = captured.out.splitlines() if wanted == 1 else captured.err.splitlines()
    assert re.search(pattern, said[0]), said
    assert ("set aside" in captured.out) == aside
    assert (copied / "a" / "manifest.json").exists() != (name == "base moved") and not (copied / "a" / "bad").exists()
    assert len(list((copied / overlay).rglob("*.tar"))) >= 3


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


def test_an_overlay_behind_a_symbolic_link(copied, capsys, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a-lune").symlink_to(copied / "a-lune")  # the base is beside its target
    assert faults(capsys, tmp_path / "elsewhere" / "a-lune")[0] == 0
    (copied / "a").rename(tmp_path / "elsewhere" / "a")  # beside the link
    assert faults(capsys, tmp_path / "elsewhere" / "a-lune")[0] == 0


def test_a_disk_that_cannot_read_is_one_fault(source, capsys, monkeypatch):
    monkeypatch.setattr(hashlib, "file_digest", broken_digest(hashlib.file_digest, source / "drawn-000001.tar"))
    assert faults(capsys, source, "--deep") == (1, ["drawn-000001.tar: cannot be read: Input/output error"])
    monkeypatch.setattr(hashlib, "file_digest", broken_digest(hashlib.file_digest, source / "index.safetensors"))
    assert verify.main([str(source)]) == 1
    assert "index.safetensors: Input/output error" in capsys.readouterr().err


def broken_digest(digest, path: Path):
    """Hashing with a sector of `path` that the disk cannot read."""

    def read(file, name):
        if file.name == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(file, name)

    return read


def test_nothing_to_verify(tmp_path, capsys):
    assert verify.main([str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert verify.main([str(tmp_path), "--repair"]) == 2
    assert "no manifest can be rebuilt: no intact shard" in capsys.readouterr().err


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
