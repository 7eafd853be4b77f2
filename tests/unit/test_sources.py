"""sources.toml and the kinds of sources: what is accepted, and what is refused with which message."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.listed import inputs_of
from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds import KINDS, kind_of
from tinyflux.precache.kinds.base import SourceError
from tinyflux.precache.listing import Counted
from tinyflux.precache.sources import find_source, load_sources, table


def written(folder: Path, text: str) -> Path:
    path = folder / "sources.toml"
    path.write_text(text)
    return path


def source(folder: Path, **keys):
    """The only source of a sources.toml in `folder`."""
    keys = {"kind": "imagefolder", "dataset_id": 7, "location": "images"} | keys
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
    return find_source("photos", written(folder, "[photos]\n" + "\n".join(lines)))


def image(path: Path, colour="red", size=(40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_packaged_file_is_found_and_the_local_one_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_sources()["shapes"].kind == "shapes"
    written(tmp_path, '[mine]\nkind = "shapes"\ndataset_id = 4\ncount = 3')
    assert list(load_sources()) == ["mine"]
    text = table(load_sources())
    assert "mine" in text and "3 rendered images" in text


def test_every_kind_says_what_it_takes():
    for kind in KINDS:
        assert set(kind_of(kind).required()) <= set(kind_of(kind).keys()) and kind_of(kind).__doc__


REFUSED = {
    "unknown kind": (
        '[a]\nkind = "folder"\ndataset_id = 1',
        r"\[a\] kind is 'folder': it must be one of imagefolder, ",
    ),
    "unknown key": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\ncuont = 2',
        r"\[a\]: unknown key 'cuont' of kind 'shapes': did you mean count\?",
    ),
    "key of another kind": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\nlocation = "x"',
        "unknown key 'location'",
    ),
    "missing id": ('[a]\nkind = "shapes"\ncount = 2', r"\[a\]: dataset_id is missing"),
    "missing location": ('[a]\nkind = "imagefolder"\ndataset_id = 1', r"\[a\]: location is missing"),
    "bad crop": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\ncrop = "left"',
        r"\[a\] crop is 'left': it must be one of center, top, random",
    ),
    "bad id": (
        '[a]\nkind = "shapes"\ndataset_id = 10000\ncount = 2',
        r"dataset_id is 10000: it must be in \[0, 9999\]",
    ),
    "true is no number": (
        '[a]\nkind = "shapes"\ndataset_id = true\ncount = 2',
        "dataset_id is True: it must be an integer",
    ),
    "no images": ('[a]\nkind = "shapes"\ndataset_id = 1\ncount = 0', "count is 0: it must be at least 1"),
    "bad weight": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\nweight = nan',
        "weight is nan: it must be more than 0",
    ),
    "odd size": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\nsize = 100',
        "size is 100: it must be a multiple of 64",
    ),
    "bad name": ('["a.b"]\nkind = "shapes"\ndataset_id = 1\ncount = 2', "made of letters, digits, - and _"),
    "no table": ("dataset_id = 1", "'dataset_id' is outside a table"),
    "no TOML": ("[a", "not a TOML file"),
    "one id twice": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\n[b]\nkind = "shapes"\ndataset_id = 1\ncount = 2',
        r"\[b\] dataset_id: 1 is taken by \[a\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_table_and_key(tmp_path, case):
    text, message = REFUSED[case]
    path = written(tmp_path, text)
    with pytest.raises(SourceError, match=message) as caught:
        load_sources(path)
    assert str(path) in str(caught.value)


def test_unknown_source_lists_the_known(tmp_path):
    path = written(tmp_path, '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2')
    with pytest.raises(SourceError, match="unknown source 'b'; known: a"):
        find_source("b", path)
    with pytest.raises(FileNotFoundError, match="no such sources file"):
        find_source("b", tmp_path / "other.toml")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\[photos\] location: .*images: no such folder"):
        inputs_of(source(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "readme.md").write_text("none")
    with pytest.raises(SourceError, match="no images found"):
        Counted(tmp_path / "listing", source(tmp_path), 0, part_size=4).begin()
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="is a file, but kind 'imagefolder' needs a folder"):
        inputs_of(source(tmp_path, location="file"))


def test_inputs_are_ordered_by_path_bytes(tmp_path):
    for name in ("b.png", "a/z.JPG", "a.png", "B.webp", "ä.png", ".hidden.png", "a/.x/y.png", "notes.md"):
        image(tmp_path / "images" / name) if not name.endswith("md") else (tmp_path / "images" / name).write_text("")
    found = sorted(item.origin for item in inputs_of(source(tmp_path)))
    assert found == ["B.webp", "a.png", "a/z.JPG", "b.png", "ä.png"]


def test_shapes_are_as_many_as_asked_for(tmp_path):
    spec = source(tmp_path, kind="shapes", location=None, count=5)
    inputs = inputs_of(spec, seed=3)
    assert len(inputs) == 5 and spec.read_image(inputs[4]).size == (64, 64)
    assert all(" on a" in spec.prompts(item, 0)[0] for item in inputs)
    assert len({spec.read_image(item).tobytes() for item in inputs}) == 5


def test_nothing_leaves_the_folder(tmp_path):
    image(tmp_path / "secret.png")
    image(tmp_path / "images" / "a.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    os.symlink(tmp_path / "images" / "a.png", tmp_path / "images" / "inside.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "inside.png", "a.png"]
    (tmp_path / "images" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names)
    )
    outcomes = {}
    spec = source(tmp_path)
    for item in inputs_of(spec):
        try:
            outcomes[item.origin] = len(spec.read_image(item)) > 0
        except Rejected as reason:
            outcomes[item.origin] = str(reason)
    assert outcomes == {name: f"outside the folder: {name}" for name in names[:3]} | {"inside.png": True, "a.png": True}
    os.symlink(tmp_path, tmp_path / "images" / "up")
    with pytest.raises(SourceError, match="images/up: is a link to a folder"):
        inputs_of(source(tmp_path))
