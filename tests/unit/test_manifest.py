"""A manifest describes a source, round-trips, and is refused with the wrong key."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from tests.make_source import make_source, make_tensors
from tinyflux.shards.format import origin_hash
from tinyflux.shards.manifest import Manifest, ManifestError, diff_fingerprints, shard_name, shard_path
from tinyflux.shards.schema import GROUP_OF, Field
from tinyflux.shards.source import open_source


@pytest.fixture
def folder(tmp_path):
    return make_source(tmp_path / "portraits")


def test_round_trip(folder):
    manifest = Manifest.load(folder)
    assert (manifest.source, manifest.dataset_id, manifest.count) == ("portraits", 1, 12)
    assert [shard.count for shard in manifest.shards] == [5, 3, 4]
    assert manifest.starts.tolist() == [0, 5, 8]
    assert manifest.groups["lune"].fields == {"lune": Field("float16", (10, 6))}
    assert manifest.groups["latents"].fields == {"latents": Field("float16", (4, "h", "w"))}
    assert list(manifest.groups) == ["latents", "text", "lune", "sol"]
    before = {name: (folder / name).read_bytes() for name in ("manifest.json", "index.safetensors")}
    manifest.save(folder)
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert Manifest.load(folder) == manifest
    assert manifest.sha256 == hashlib.sha256(before["manifest.json"]).hexdigest()


def test_is_easy_to_read(folder):
    lines = (folder / "manifest.json").read_text().splitlines()
    assert '  "shapes": [[4, 4]],' in lines and len(lines) < 60
    assert '      "fields": {"lune": {"dtype": "float16", "shape": [10, 6]}},' in lines


def test_any_reader_of_safetensors_reads_the_index(folder):
    arrays, manifest = safetensors.numpy.load_file(folder / "index.safetensors"), Manifest.load(folder)
    assert arrays["samples"].tolist() == [5, 3, 4] and arrays["captions"].tolist() == [1] * 12
    for k, shard in enumerate(manifest.shards):
        assert arrays["sha256"][k].tobytes().hex() == hashlib.sha256((folder / shard.path).read_bytes()).hexdigest()
        assert arrays["bytes"][k] == (folder / shard.path).stat().st_size


def test_positions_are_located(folder):
    manifest = Manifest.load(folder)
    assert [manifest.locate(position) for position in (0, 4, 5, 11)] == [(0, 0), (0, 4), (1, 0), (2, 3)]
    shards, rows = manifest.locate(np.arange(12))
    assert shards.tolist() == [0] * 5 + [1] * 3 + [2] * 4 and rows.tolist() == [*range(5), *range(3), *range(4)]


def test_origins_keep_the_captions_of_an_image_together(folder):
    hashes = Manifest.load(folder).shards[0].origins
    assert hashes.tolist() == [origin_hash(f"image-{i // 2}.png") for i in range(5)]


def test_shards_lie_in_subfolders_where_there_are_many(tmp_path):
    folder = make_source(tmp_path / "many", (1, 2), subfolders=True)
    assert [shard.path for shard in Manifest.load(folder).shards] == ["000/many-000000.tar", "000/many-000001.tar"]
    assert shard_path("many", 30_017, True) == "003/many-030017.tar"
    assert sorted(open_source(folder).open(1).decode(1)) == sorted(make_tensors(2))


def test_shard_names():
    assert shard_name("portraits", 12) == "portraits-000012.tar"
    for name in ("../portraits", "a/b", "a\\b", ".hidden", "", "a b"):
        with pytest.raises(ManifestError, match="not a plain file name"):
            shard_name(name, 0)


def group(name, **change):
    return lambda data: data["groups"][name].update(change)


def field(name, **change):
    return lambda data: data["groups"][GROUP_OF[name]]["fields"][name].update(change)


def nested(levels):
    return json.loads("[" * levels + "]" * levels)


WRONG = {
    "version": (lambda d: d.update(format_version=1), "format_version is 1, this package reads 2"),
    "no version": (lambda d: d.pop("format_version"), "format_version is None"),
    "key missing": (lambda d: d.pop("groups"), r"missing keys \['groups'\]"),
    "key unknown": (lambda d: d.update(colour=1), r"unknown keys \['colour'\]"),
    "source": (lambda d: d.update(source="a/b"), "'a/b' is not a plain file name"),
    "source upwards": (lambda d: d.update(source="a..b"), "'a..b' is not a plain file name"),
    "dataset id": (lambda d: d.update(dataset_id=-1), "dataset_id is -1"),
    "dataset id bool": (lambda d: d.update(dataset_id=True), "dataset_id is True"),
    "count": (lambda d: d.update(count=13), "count is 13, the index has 12"),
    "shards": (lambda d: d.update(shards=4), "shards is 4, the index has 3"),
    "shards a list": (lambda d: d.update(shards=[]), r"shards is \[\], must be int"),
    "groups": (lambda d: d.update(groups=[]), r"groups is \[\], must be dict"),
    "no latents": (lambda d: d["groups"].pop("latents"), "groups lacks latents"),
    "group a list": (lambda d: d["groups"].update(lune=[]), "groups.lune is"),
    "fields a list": (group("lune", fields=[[]]), "groups.lune.fields is"),
    "field unknown": (lambda d: d["groups"]["lune"]["fields"].update(x=1), "groups.lune.fields.x is 1"),
    "half a group": (lambda d: d["groups"]["sol"]["fields"].pop("sol_stats"), "groups.sol.fields has sol_spatial"),
    "dtype": (field("lune", dtype="float64"), "groups.lune.fields.lune.dtype is 'float64'"),
    "dtype a list": (field("lune", dtype=["float16"]), "groups.lune.fields.lune.dtype is"),
    "shape": (field("latents", shape=[4, -1, "w"]), "groups.latents.fields.latents.shape is"),
    "shape of floats": (field("latents", shape=[4.0, "h", "w"]), "groups.latents.fields.latents.shape is"),
    "shape of another axis": (field("latents", shape=[4, "w", "h"]), "latents.shape is .*, must have the axes"),
    "shape nested": (field("latents", shape=nested(200)), "groups.latents.fields.latents.shape is"),
    "shape huge": (field("latents", shape=[10**12, "h", "w"]), "groups.latents.fields.latents.shape is"),
    "sample huge": (field("latents", shape=[10**8, "h", "w"]), "groups.latents: a sample of it has more than"),
    "producer nested": (group("lune", producer={"a": nested(200)}), "groups.lune.producer is nested too deep"),
    "timesteps": (group("lune", timesteps=[0.5, 0.1]), "groups.lune.fields.lune.shape .* 2 timesteps"),
    "timesteps falling": (group("lune", timesteps=[1 - t / 10 for t in range(10)]), "groups.lune.timesteps is"),
    "timesteps uneven": (group("lune", timesteps=[t * t / 100 for t in range(10)]), "groups.lune.timesteps .* even"),
    "timesteps infinite": (group("lune", timesteps=[*range(9), float("inf")]), "groups.lune.timesteps is"),
    "timesteps NaN": (group("lune", timesteps=[float("nan")] * 10), "groups.lune.timesteps is"),
    "no timesteps": (lambda d: d["groups"]["lune"].pop("timesteps"), "groups.lune: must not be repeated and must have"),
    "shapes": (lambda d: d.update(shapes=[[4]]), r"shapes has \[4\], must be"),
    "shapes of text": (lambda d: d.update(shapes=["44"]), r"shapes\[0\] is '44'"),
    "shape negative": (lambda d: d.update(shapes=[[4, -4]]), "shapes has"),
    "no shapes": (lambda d: d.update(shapes=[]), "the index has shape number 0, the manifest has 0"),
    "index": (lambda d: d.update(index=[]), "index is"),
    "index sha256": (lambda d: d["index"].update(sha256="x"), "index.sha256 is 'x'"),
    "another index": (lambda d: d["index"].update(sha256="0" * 64), "is not the index of"),
    "null": (lambda d: d.update(null=None), "null must be present"),
    "base": (lambda d: d.update(base={"location": 1, "sha256": "0" * 64}), "base.location is 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(folder, name):
    change, message = WRONG[name]
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.load(folder)
    assert str(path) in str(caught.value)


WRONG_INDEX = {
    "empty": (lambda a: a.update(samples=np.array([12, 0, 0], "<u4")), "samples of shard 1 is 0"),
    "twice": (lambda a: a.update(number=a["number"] * 0), "a shard is listed twice"),
    "sha256": (lambda a: a.update(sha256=a["sha256"][:, :31]), "sha256 has shape"),
    "origins": (lambda a: a.update(origins=a["origins"][:-1]), "origins has shape"),
    "captions": (lambda a: a.update(captions=a["captions"].astype("<u2")), "damaged"),
    "missing": (lambda a: a.pop("bytes"), r"missing arrays \['bytes'\]"),
    "unknown": (lambda a: a.update(colour=a["bytes"]), "damaged"),
    "names": (lambda a: a.update(names=np.frombuffer(b"../x\na\nb", "u1")), "not a plain file name"),
    "names missing": (lambda a: a.update(names=np.frombuffer(b"x", "u1")), "1 names for 3 shards"),
}


@pytest.mark.parametrize("name", WRONG_INDEX)
def test_refuses_an_index(folder, name):
    change, message = WRONG_INDEX[name]
    path = folder / "index.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    data = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=message):
        Manifest.load(folder)


def test_every_flipped_bit_of_the_index_is_seen(folder):
    path = folder / "index.safetensors"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 97):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ManifestError, match="index.safetensors"):
            Manifest.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="index.safetensors: missing; .*--repair"):
        Manifest.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_refuses_what_is_no_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match="manifest.json: not"):
        Manifest.load(folder)


def test_fingerprints_are_compared_key_by_key():
    a = {"vae": {"revision": "x", "scaling": 0.36}, "seed": 1}
    b = {"vae": {"revision": "y", "scaling": 0.36}, "dtype": "float16"}
    assert diff_fingerprints(a, a) == []
    assert diff_fingerprints(a, b) == [
        "dtype: None against 'float16'",
        "seed: 1 against None",
        "vae.revision: 'x' against 'y'",
    ]
