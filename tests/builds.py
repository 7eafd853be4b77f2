"""`sharding.build` in this process, and what is in a built source, for tests."""

import json
from pathlib import Path

from sharding import build
from tinyflux.shards.format import parse_key
from tinyflux.shards.schema import Group
from tinyflux.shards.source import open_source


def sources(folder: Path, **keys) -> Path:
    """A sources.toml with the image folder `images` as source photos, and 20 shapes."""
    keys = {"kind": "imagefolder", "dataset_id": 7, "location": "images"} | keys
    text = "[photos]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    path = folder / "sources.toml"
    path.write_text(text + '[drawn]\nkind = "shapes"\ndataset_id = 8\ncount = 20\n')
    return path


def run(folder: Path, *args: object, source="photos", zoo="tiny") -> int:
    """The command in this process; returns its exit status. Output goes to folder/out unless args say otherwise."""
    words = ["--source", source, "--sources", folder / "sources.toml", "--out", folder / "out", "--zoo", zoo]
    return build.main([str(word) for word in (*words, "--threads", 1, "--batch-size", 4, "--device", "cpu", *args)])


def whole(groups: dict[str, Group]) -> dict:
    """What the groups of a source were made with, together."""
    return {name: value for group in groups.values() for name, value in group.producer.items()}


def samples(out: Path) -> dict[int, dict]:
    """Index -> all that a sample has, read through the store."""
    source, found = open_source(out), {}
    for k in range(len(source.manifest.shards)):
        file = source.open(k)
        for row in range(file.count):
            meta = file.meta(row)
            found[parse_key(file.key(row))[1]] = file.decode(row) | {"meta": meta}
    return found


def content(out: Path) -> dict[str, bytes]:
    """All files of a source but the notes of its build."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
