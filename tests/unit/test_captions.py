"""Captions in every common folder layout, and the captions that each image gets."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.listed import captions_of, inputs_of
from tests.unit.test_sources import source
from tinyflux.precache.images import Rejected
from tinyflux.precache.kinds.base import SourceError


def lines(*records: object) -> str:
    return "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records)


MISSING = (
    "rejected: missing caption: no b.txt, .caption, .tags or .json and no list has it; nothing of its name beside it"
)

# name -> (files beside a.png and b.png, keys of the source, captions of each image that is listed)
LAYOUTS = {
    "a text file": ({"a.txt": "  a red\nsquare "}, {}, {"a.png": ["a red square"], "b.png": MISSING}),
    "upper case": ({"a.TXT": "one", "b.Caption": "two"}, {}, {"a.png": ["one"], "b.png": ["two"]}),
    "after the whole name": ({"a.png.txt": "one", "b.png.caption": "two"}, {}, {"a.png": ["one"], "b.png": ["two"]}),
    "a caption and tags": (
        {"a.caption": "one", "a.tags": "x, y", "b.tags": "x, y"},
        {},
        {"a.png": ["one"], "b.png": ["x, y"]},
    ),
    "a json": (
        {"a.json": '{"caption": "one"}', "b.json": '{"prompt": "two"}'},
        {},
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "fields of a json": (
        {"a.json": '{"short": "one", "long": "two"}', "b.json": '{"long": "three"}'},
        {"caption": ["short", "long"]},
        {"a.png": ["one", "two"], "b.png": ["three"]},
    ),
    "a damaged json": (
        {"a.json": "{", "b.txt": "two"},
        {},
        {"a.png": "rejected: caption's .json is damaged", "b.png": ["two"]},
    ),
    "a byte order mark": (
        {"a.txt": "\ufeffein rötliches Quadrat", "b.txt": "two"},
        {},
        {"a.png": ["ein rötliches Quadrat"], "b.png": ["two"]},
    ),
    "no UTF-8": (
        {"a.txt": b"\xff\xfe\xff", "b.txt": "two"},
        {},
        {"a.png": "rejected: caption is not UTF-8: invalid start byte", "b.png": ["two"]},
    ),
    "UTF-16 without a mark": (
        {"a.txt": "a cat".encode("utf-16-le"), "b.txt": "two"},
        {},
        {"a.png": "rejected: caption has null bytes: is it in UTF-16?", "b.png": ["two"]},
    ),
    "more captions than a sample can have": (
        {"a.txt": "one\n" * 256, "b.txt": "two\n" * 255},
        {"captions": "all"},
        {"a.png": "rejected: too many captions: 256, at most 255 can be kept", "b.png": ["two"] * 255},
    ),
    "an empty file": ({"a.txt": " \n", "b.txt": "two"}, {}, {"a.png": "rejected: empty caption", "b.png": ["two"]}),
    "empty ones allowed": ({"a.txt": " \n"}, {"allow_empty_captions": True}, {"a.png": [""], "b.png": [""]}),
    "lines of a text file": (
        {"a.txt": "one\n\nthe longest\nthree\n", "b.txt": "two"},
        {"captions": "all"},
        {"a.png": ["one", "the longest", "three"], "b.png": ["two"]},
    ),
    "the first line": (
        {"a.txt": "one\n\nthe longest\n", "b.txt": "two"},
        {"captions": "first"},
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "the longest line": (
        {"a.txt": "one\nthe longest\n", "b.txt": "two"},
        {"captions": "longest"},
        {"a.png": ["the longest"], "b.png": ["two"]},
    ),
    "metadata.jsonl": (
        {
            "metadata.jsonl": lines(
                {"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "./b.png", "text": "three"}
            )
        },
        {},
        {"a.png": ["one", "two"], "b.png": ["three"]},
    ),
    "metadata.jsonl without some": (
        {
            "metadata.jsonl": lines({"file_name": "a.png", "text": None}, {"file_name": "c.png", "text": "ghost"}),
            "b.txt": "two",
        },
        {},
        {"a.png": "rejected: missing caption: the list has none for it", "b.png": ["two"], "c.png": ["ghost"]},
    ),
    "metadata.jsonl with odd values": (
        {"metadata.jsonl": lines({"file_name": "a.png", "text": 5}, {"file_name": "b.png", "text": "\ud800"})},
        {},
        {"a.png": "rejected: caption is not a text: the list is [5]", "b.png": "rejected: caption is not UTF-8"},
    ),
    "a row for each caption": (
        {
            "metadata.jsonl": lines({"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"}),
            "b.txt": "three",
        },
        {},
        {"a.png": ["one", "two"], "b.png": ["three"]},
    ),
    "metadata.csv": (
        {"metadata.csv": 'file_name,text\na.png,"one, with a comma"\nb.png,two\n'},
        {},
        {"a.png": ["one, with a comma"], "b.png": ["two"]},
    ),
    "prompts.txt with tabs": (
        {"prompts.txt": "a.png\ta cat: asleep\n\nb.png\ttwo\n"},
        {},
        {"a.png": ["a cat: asleep"], "b.png": ["two"]},
    ),
    "prompts.txt beside a folder called .png": (
        {"prompts.txt": "one\ntwo\n", "c.png/notes.md": ""},
        {},
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "prompts.txt with colons": ({"prompts.txt": "b.png: two\na.png: one\n"}, {}, {"a.png": ["one"], "b.png": ["two"]}),
    "prompts.txt in order": (
        {"prompts.txt": "one: with a colon\ntwo\n"},
        {},
        {"a.png": ["one: with a colon"], "b.png": ["two"]},
    ),
    "a raw file beside its picture": (
        {"a.txt": "one", "a.cr2": b"raw", "b.txt": "two"},
        {},
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "a captioned raw file": (
        {"a.txt": "one", "b.txt": "two", "c.nef": b"raw", "c.txt": "three"},
        {},
        {"a.png": ["one"], "b.png": ["two"], "c.nef": ["three"]},
    ),
    "subfolders": (
        {
            "x/metadata.jsonl": lines({"file_name": "c.png", "text": "in x"}),
            "x/c.png": b"",
            "y/c.png": b"",
            "y/c.txt": "in y",
            "a.txt": "one",
            "b.txt": "two",
        },
        {},
        {"a.png": ["one"], "b.png": ["two"], "x/c.png": ["in x"], "y/c.png": ["in y"]},
    ),
}


def folder(root: Path, files: dict[str, str | bytes]) -> None:
    for name in ("a.png", "b.png"):
        (root / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(root / "images" / name)
    for name, content in files.items():
        path = root / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    files, keys, expected = LAYOUTS[layout]
    folder(tmp_path, files)
    found = captions_of(source(tmp_path, **keys))
    assert found.keys() == expected.keys()
    for name, captions in expected.items():
        if isinstance(captions, str):  # a reason; its detail may follow
            assert isinstance(found[name], str) and found[name].startswith(captions)
        else:
            assert found[name] == captions


def test_one_of_several_at_random(tmp_path):
    folder(tmp_path, {"a.txt": "one\ntwo\nthree", "b.txt": "x"})
    spec = source(tmp_path, captions="random")
    item = next(item for item in inputs_of(spec) if item.origin == "a.png")
    assert {spec.prompts(item, seed)[0] for seed in range(50)} == {"one", "two", "three"}
    assert spec.prompts(item, 5) == spec.prompts(item, 5)


@pytest.mark.parametrize(
    "files, keys, message",
    [
        ({"metadata.jsonl": "{"}, {}, "line 1: not JSON"),
        ({"metadata.jsonl": "[1]"}, {}, "must be an object with a text under 'file_name'"),
        ({"metadata.jsonl": '{"file_name": "a.png", "x": "y"}'}, {}, "the field 'text' or 'caption' or 'prompt'; the"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "y"}'}, {"caption": "x"}, "no record has the field 'x'"),
        ({"metadata.csv": "name,text\na.png,x\n"}, {}, "each row must have a file_name; one has name, text"),
        ({"metadata.csv": "file_name,text\na.png,red, and round\n"}, {}, "line 2: more cells than columns; .*quoted"),
        ({"metadata.csv": "file_name,text,text\na.png,x,y\n"}, {}, "two columns are called 'text'"),
        ({"prompts.txt": "one\n"}, {}, "line 1: must be an image's path, a tab or a colon.*it has 1 for 2"),
        ({"prompts.txt": "a.png: x", "metadata.jsonl": ""}, {}, "has metadata.jsonl and prompts.txt"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(tmp_path, files, keys, message):
    folder(tmp_path, files)
    with pytest.raises(SourceError, match=message):
        inputs_of(source(tmp_path, **keys))


def test_what_is_passed_over_is_counted(tmp_path):
    files = {"clip.mov": b"", "Thumbs.db": b"", "c.heic": b"", "d.nef": b"", "README": b""}
    folder(tmp_path, files | {"a.txt": "one", "z.txt": "of no image"})
    spec = source(tmp_path)
    assert sorted(item.origin for item in inputs_of(spec)) == ["a.png", "b.png", "c.heic"]
    assert spec.ignored == {".mov": 1, ".db": 1, ".nef": 1, "without one": 1, ".txt without an image": 1}


def test_a_folder_without_captions_is_listed_once_to_say_so(tmp_path, monkeypatch):
    folder(tmp_path, {f"{i}.png": b"" for i in range(20)} | {"3.md": "", "3.csv": "", "30.text": "", "3.rtf": ""})
    spec, listed, listdir = source(tmp_path), [], os.listdir
    items = {item.origin: item for item in inputs_of(spec)}
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    found = {name: spec.sought(item).partition("; ")[2] for name, item in items.items()}
    assert found["4.png"] == "nothing of its name beside it" and found["3.png"] == "beside it: 3.csv, 3.md, 3.rtf"
    assert len(found) == 22 and listed == [tmp_path / "images"]


def test_stamps_see_what_has_changed(tmp_path):
    """Same size, another time; the target of a link."""
    folder(tmp_path, {"a.txt": "one", "b.txt": "two"})
    other = tmp_path / "images" / "b.png"
    other.rename(tmp_path / "images" / "real.png")
    os.symlink("real.png", other)
    before = {item.origin: item.stamp for item in inputs_of(source(tmp_path))}
    os.utime(tmp_path / "images" / "a.txt", ns=(1, 1))
    os.utime(tmp_path / "images" / "real.png", ns=(1, 1))
    after = {item.origin: item.stamp for item in inputs_of(source(tmp_path))}
    assert {name for name in before if before[name] != after[name]} == {"a.png", "b.png", "real.png"}


def test_the_raw_file_is_rejected_with_its_name(tmp_path):
    folder(tmp_path, {"c.nef": b"raw", "c.txt": "three"})
    spec = source(tmp_path)
    item = next(item for item in inputs_of(spec) if item.origin == "c.nef")
    assert spec.read_image(item) == b"raw"
    with pytest.raises(Rejected, match="unreadable file: No such file"):
        spec.read_image(item._replace(place=["ghost.png", None]))
