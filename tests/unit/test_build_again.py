"""Building a source again: after inputs, settings or files have changed, and with new inputs."""

import errno
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.builds import content, run, samples, sources
from tinyflux.precache.engine import Engine
from tinyflux.precache.from_images import FromImages
from tinyflux.shards.manifest import Manifest

pytestmark = pytest.mark.usefixtures("alone")


def few(folder: Path) -> None:
    """Three good images, as source photos."""
    (folder / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (50 * i, 9, 9)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"number {i}")
    sources(folder)


def tar_of(folder: Path) -> None:
    """The images as a tar among them."""
    with tarfile.open(folder / "images" / "photos-000000.tar", "w") as tar:
        for path in sorted((folder / "images").glob("?.*")):
            tar.add(path, path.name)


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_rejected_file_that_is_touched_has_not_changed(tmp_path, capsys):
    few(tmp_path)
    (tmp_path / "images" / "bad.png").write_bytes(b"x")
    (tmp_path / "images" / "bad.txt").write_text("a caption")
    assert run(tmp_path) == 1
    os.utime(tmp_path / "images" / "bad.png", (1, 1))
    capsys.readouterr()
    assert run(tmp_path) == 1 and "changed" not in capsys.readouterr().out
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    assert run(tmp_path) == 1 and "changed since: 1 (bad.png) changed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_a_build_that_has_not_begun_takes_other_settings(tmp_path, monkeypatch, kind):
    few(tmp_path)
    if kind == "webdataset":
        tar_of(tmp_path)
        sources(tmp_path, kind=kind)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", full)
        assert run(tmp_path) == 1
    assert run(tmp_path, "--seed", 3) == 0 and Manifest.load(tmp_path / "out").count == 3


def test_an_image_of_another_shape_than_when_it_was_sorted_is_rejected(tmp_path, monkeypatch):
    """Not cropped to the shape of its shard."""
    few(tmp_path)
    args = ("--shapes", "64x64", "64x128")

    with monkeypatch.context() as patch:
        patch.setattr(FromImages, "encode", full)
        assert run(tmp_path, *args) == 1
    Image.new("RGB", (64, 128), "red").save(tmp_path / "images" / "1.png")
    assert run(tmp_path, *args) == 1
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected["origin"] == "1.png" and rejected["reason"].startswith("changed shape: ")


@pytest.mark.parametrize("lost", ["null.safetensors", "rejected.jsonl"])
def test_a_lost_file_is_written_again(tmp_path, lost):
    few(tmp_path)
    assert run(tmp_path) == 0
    before = content(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    assert run(tmp_path) == 0 and content(tmp_path / "out") == before


def test_another_name_is_another_source(tmp_path, capsys):
    few(tmp_path)
    assert run(tmp_path) == 0
    table = (tmp_path / "sources.toml").read_text()
    (tmp_path / "sources.toml").write_text(table.replace("[photos]", "[faces]"))
    assert run(tmp_path, source="faces") == 2
    assert "settings.source.name: 'photos' against 'faces'" in capsys.readouterr().err


def test_tars_of_others_are_not_overwritten(tmp_path, capsys):
    few(tmp_path)
    tar_of(tmp_path)
    path = tmp_path / "images" / "photos-000000.tar"
    before = path.read_bytes()
    assert run(tmp_path, "--out", tmp_path / "images") == 2
    assert "contains photos-000000.tar, not from this build; choose another --out" in capsys.readouterr().err
    sources(tmp_path, kind="webdataset")
    assert run(tmp_path, "--out", tmp_path / "images" / "new") == 2
    assert "images/new: is inside" in capsys.readouterr().err
    assert path.read_bytes() == before and not (tmp_path / "images" / "new").exists()


def test_append(tmp_path, capsys):
    """New images go last, in new shards; finished ones keep their bytes; other settings are not mixed in."""
    (tmp_path / "images").mkdir()
    for name in "bdefgh":
        Image.new("RGB", (70, 80), (ord(name), 2 * ord(name), 9)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"colour {name}")
    sources(tmp_path)
    assert run(tmp_path, "--shard-size", 4) == 0
    before = content(tmp_path / "out")
    assert run(tmp_path, "--shard-size", 4, "--append") == 0 and content(tmp_path / "out") == before  # nothing is new
    for name in "ac":
        Image.new("RGB", (70, 80), (ord(name), 2 * ord(name), 9)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"colour {name}")
    capsys.readouterr()
    assert run(tmp_path, "--shard-size", 4) == 0 and content(tmp_path / "out") == before  # already complete
    assert "changed since: 2 (a.png, c.png) new. --append adds the new ones" in capsys.readouterr().out
    assert run(tmp_path, "--shard-size", 4, "--append", "--seed", 3) == 2
    assert "settings.seed: 0 against 3" in capsys.readouterr().err

    assert run(tmp_path, "--shard-size", 4, "--append") == 0
    after = content(tmp_path / "out")
    assert [shard.count for shard in Manifest.load(tmp_path / "out").shards] == [4, 2, 2]
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))
    assert "8 samples in 3 shards" in capsys.readouterr().out
    found = samples(tmp_path / "out")
    assert list(found) == [0, 1, 2, 3, 4, 5, 8, 9]
    order = "".join(sample["meta"]["origin"][0] for sample in found.values())
    assert set(order[:6]) == set("bdefgh") and set(order[6:]) == set("ac")

    # as if it had been killed before the manifest was replaced: the same command resumes, with or without --append
    (tmp_path / "out" / "manifest.json").write_bytes(before["manifest.json"])
    assert run(tmp_path, "--shard-size", 4) == 0
    assert content(tmp_path / "out") == after
