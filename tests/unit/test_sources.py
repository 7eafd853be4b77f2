"""sources.toml and the kinds of sources: what is understood, and what is refused with which message."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tinyflux.precache.images import Rejected
from tinyflux.precache.inputs import caption
from tinyflux.precache.readers import READERS, list_inputs
from tinyflux.precache.sources import KINDS, SourceError, find_source, load_sources, table


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


def origins(spec) -> list[str]:
    return [item.origin for item in list_inputs(spec, 64, 0)]


def captions(spec, seed=0) -> dict[str, str]:
    """Origin -> caption, or the reason why not."""
    found = {}
    for item in list_inputs(spec, 64, 0):
        try:
            found[item.origin] = caption(spec, item, seed)
        except Rejected as reason:
            found[item.origin] = f"rejected: {reason}"
    return found


def test_packaged_file_is_found_and_the_local_one_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_sources()["shapes"].kind == "shapes"
    written(tmp_path, '[mine]\nkind = "shapes"\ndataset_id = 4\ncount = 3')
    assert list(load_sources()) == ["mine"]
    text = table(load_sources())
    assert "mine" in text and "3 rendered images" in text


def test_every_kind_has_a_reader():
    assert set(KINDS) == {*READERS, "cache"}  # an old cache has no images


REFUSED = {
    "unknown kind": (
        '[a]\nkind = "folder"\ndataset_id = 1',
        r"\[a\] kind: must be one of .*imagefolder.*; it is 'folder'",
    ),
    "unknown key": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\ncuont = 2',
        r"\[a\]: unknown key 'cuont'; kind 'shapes' takes .*count",
    ),
    "key of another kind": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\nlocation = "x"',
        "unknown key 'location'",
    ),
    "missing id": ('[a]\nkind = "shapes"\ncount = 2', r"\[a\]: dataset_id is missing; it must be a whole number"),
    "missing location": ('[a]\nkind = "imagefolder"\ndataset_id = 1', r"\[a\]: location is missing"),
    "bad crop": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\ncrop = "left"',
        r"\[a\] crop: must be one of center, top, random; it is 'left'",
    ),
    "bad id": (
        '[a]\nkind = "shapes"\ndataset_id = 10000\ncount = 2',
        "dataset_id: must be a whole number from 0 to 9999",
    ),
    "true is no number": ('[a]\nkind = "shapes"\ndataset_id = true\ncount = 2', "dataset_id: must be a whole number"),
    "no images": ('[a]\nkind = "shapes"\ndataset_id = 1\ncount = 0', "count: must be a whole number >= 1; it is 0"),
    "bad weight": ('[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\nweight = nan', "weight: must be a number > 0"),
    "odd size": (
        '[a]\nkind = "shapes"\ndataset_id = 1\ncount = 2\nsize = 100',
        "size: must be a multiple of 64; it is 100",
    ),
    "bad name": ('["a.b"]\nkind = "shapes"\ndataset_id = 1\ncount = 2', "made of letters, digits, - and _"),
    "no table": ("dataset_id = 1", "'dataset_id' stands outside a table"),
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
        list_inputs(source(tmp_path), 64, 0)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "readme.md").write_text("none")
    with pytest.raises(SourceError, match="no images found"):
        list_inputs(source(tmp_path), 64, 0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SourceError, match="is a file, kind 'imagefolder' wants a folder"):
        list_inputs(source(tmp_path, location="file"), 64, 0)


def test_inputs_are_ordered_by_path_bytes(tmp_path):
    for name in ("b.png", "a/z.JPG", "a.png", "B.webp", "ä.png", ".hidden.png", "a/.x/y.png", "notes.md"):
        image(tmp_path / "images" / name) if not name.endswith("md") else (tmp_path / "images" / name).write_text("")
    assert origins(source(tmp_path)) == ["B.webp", "a.png", "a/z.JPG", "b.png", "ä.png"]


def test_shapes_are_as_many_as_asked_for(tmp_path):
    spec = source(tmp_path, kind="shapes", location=None, count=5)
    inputs = list_inputs(spec, 64, 3)
    assert len(inputs) == 5 and inputs[4].image().size == (64, 64)
    assert all(" on a" in caption(spec, item, 0) for item in inputs)
    assert len({item.image().tobytes() for item in inputs}) == 5


def test_captions_beside_the_images(tmp_path):
    for name in "abcde":
        image(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "a.txt").write_text("  a red\nsquare ")
    (tmp_path / "images" / "b.txt").write_text(" \n")
    (tmp_path / "images" / "c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "images" / "e.txt").write_bytes("\ufeffein rötliches Quadrat".encode())
    expected = {
        "a.png": "a red square",
        "b.png": "rejected: empty caption",
        "c.png": "rejected: caption is not UTF-8: invalid start byte",
        "d.png": "rejected: missing caption",
        "e.png": "ein rötliches Quadrat",
    }
    assert captions(source(tmp_path)) == expected
    allowed = expected | {"b.png": "", "d.png": ""}
    assert captions(source(tmp_path, allow_empty_captions=True)) == allowed


def test_captions_in_prompts_txt(tmp_path):
    for name in ("a.png", "sub/b c.png", "c.png"):
        image(tmp_path / "images" / name)
    prompts = tmp_path / "images" / "prompts.txt"
    prompts.write_text("a.png\ta cat: sleeping\n\nsub/b c.png: a dog\nghost.png: nobody\n")
    found = captions(source(tmp_path))
    assert found["a.png"] == "a cat: sleeping" and found["sub/b c.png"] == "a dog"
    assert found["c.png"] == "rejected: missing caption"
    ghost = next(item for item in list_inputs(source(tmp_path), 64, 0) if item.origin == "ghost.png")
    with pytest.raises(Rejected, match="unreadable file: No such file"):
        ghost.image()
    prompts.write_text("a.png a cat\n")
    with pytest.raises(SourceError, match=r"prompts.txt, line 1: must be an image's path, a tab or a colon"):
        list_inputs(source(tmp_path), 64, 0)


def test_captions_in_metadata_jsonl(tmp_path):
    for name in "abcdef":
        image(tmp_path / "images" / f"{name}.png")
    rows = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "b.png", "text": ["first", "the second"]},
        {"file_name": "c.png", "text": None},
        {"file_name": "d.png", "text": 5},
        {"file_name": "./e.png", "text": "\ud800"},
        {"file_name": "f.png"},
    ]
    metadata = tmp_path / "images" / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)))
    found = captions(source(tmp_path))
    assert found["a.png"] == "one" and found["b.png"] == "first"
    assert found["c.png"] == found["f.png"] == "rejected: missing caption"
    assert found["d.png"] == "rejected: caption is not a text: metadata.jsonl is [5]"
    assert found["e.png"].startswith("rejected: caption is not UTF-8")
    with pytest.raises(SourceError, match="no record has the field 'caption'; the first has file_name, text"):
        list_inputs(source(tmp_path, caption="caption"), 64, 0)
    (tmp_path / "images" / "prompts.txt").write_text("a.png: x")
    with pytest.raises(SourceError, match=r"has metadata.jsonl and prompts.txt"):
        list_inputs(source(tmp_path), 64, 0)
    (tmp_path / "images" / "prompts.txt").unlink()
    for line, message in (("{", "line 1: not JSON"), ("[1]", "must be an object with a text under 'file_name'")):
        metadata.write_text(line)
        with pytest.raises(SourceError, match=message):
            list_inputs(source(tmp_path), 64, 0)


@pytest.mark.parametrize("rule", ["first", "longest", "random", "all"])
def test_several_captions(tmp_path, rule):
    image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("one\n\nthe longest of all\nthree\n")
    spec = source(tmp_path, captions=rule)
    inputs = list_inputs(spec, 64, 0)
    found = [caption(spec, item, seed=5) for item in inputs]
    assert {item.origin for item in inputs} == {"a.png"}
    if rule == "first":
        assert found == ["one"]
    elif rule == "longest":
        assert found == ["the longest of all"]
    elif rule == "all":
        assert found == ["one", "the longest of all", "three"]
    else:
        drawn = {caption(spec, inputs[0], seed) for seed in range(50)}
        assert drawn == {"one", "the longest of all", "three"} and found == [caption(spec, inputs[0], seed=5)]


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
    for item in list_inputs(source(tmp_path), 64, 0):
        try:
            outcomes[item.origin] = len(item.image()) > 0
        except Rejected as reason:
            outcomes[item.origin] = str(reason)
    assert outcomes == {name: f"outside the folder: {name}" for name in names[:3]} | {"inside.png": True, "a.png": True}
    os.symlink(tmp_path, tmp_path / "images" / "up")
    with pytest.raises(SourceError, match="images/up: is a link to a folder"):
        list_inputs(source(tmp_path), 64, 0)
