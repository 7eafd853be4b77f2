"""A manifest says what a source holds, reads back the same, and is refused with the key that is wrong."""

import json

import numpy as np
import pytest

from tests.make_source import make_source
from tinyflux.shards.format import Field
from tinyflux.shards.manifest import Manifest, ManifestError, diff_fingerprints, shard_name
from tinyflux.shards.writer import origin_hash


@pytest.fixture
def folder(tmp_path):
    return make_source(tmp_path / "portraits")


def test_round_trip(folder):
    manifest = Manifest.load(folder)
    assert (manifest.source, manifest.dataset_id, manifest.count) == ("portraits", 1, 12)
    assert [shard.count for shard in manifest.shards] == [5, 3, 4]
    assert manifest.starts.tolist() == [0, 5, 8]
    assert manifest.fields["lune"] == Field("float16", (10, 6))
    assert list(manifest.groups) == ["encodings", "lune", "sol"]
    before = (folder / "manifest.json").read_bytes()
    manifest.save(folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert Manifest.load(folder / "manifest.json") == manifest


def test_is_easy_to_read(folder):
    lines = (folder / "manifest.json").read_text().splitlines()
    assert sum('"name": "portraits-' in line for line in lines) == 3  # one shard a line


def test_origins_keep_the_captions_of_an_image_together(folder):
    hashes = Manifest.load(folder).shards[0].origin_hashes
    assert hashes.dtype == np.uint16
    assert hashes.tolist() == [origin_hash(f"image-{i // 2}.png") for i in range(5)]


def test_shard_names():
    assert shard_name("portraits", 12) == "portraits-000012.tar"
    for name in ("../portraits", "a/b", "a\\b", ".hidden", "", "a b"):
        with pytest.raises(ManifestError, match="not a plain file name"):
            shard_name(name, 0)


def shard(**change):
    return lambda data: data["shards"][1].update(change)


WRONG = {
    "version": (lambda d: d.update(format_version=2), "format_version is 2, this package reads 1"),
    "no version": (lambda d: d.pop("format_version"), "format_version is None"),
    "key missing": (lambda d: d.pop("fingerprint"), r"missing keys \['fingerprint'\]"),
    "key unknown": (lambda d: d.update(colour=1), r"unknown keys \['colour'\]"),
    "source": (lambda d: d.update(source="a/b"), "'a/b' is not a plain file name"),
    "dataset id": (lambda d: d.update(dataset_id=-1), "dataset_id is -1"),
    "dataset id bool": (lambda d: d.update(dataset_id=True), "dataset_id is True"),
    "count": (lambda d: d.update(count=13), "count is 13, the shards have 12"),
    "buckets": (lambda d: d.update(buckets=[0.5, 0.1]), "buckets is"),
    "fields": (lambda d: d.update(fields=[]), r"fields is \[\], must be dict"),
    "field unknown": (lambda d: d["fields"].update(x=d["fields"]["lune"]), "fields.x is unknown"),
    "field missing": (lambda d: d["fields"].pop("latents"), "fields lacks latents"),
    "half a group": (lambda d: d["fields"].pop("sol_stats"), "fields lacks sol_stats"),
    "dtype": (lambda d: d["fields"]["lune"].update(dtype="float64"), "fields.lune.dtype is 'float64'"),
    "shape": (lambda d: d["fields"]["latents"].update(shape=[4, -1]), "fields.latents.shape is"),
    "shape of floats": (lambda d: d["fields"]["latents"].update(shape=[4.0]), "fields.latents.shape is"),
    "buckets of lune": (lambda d: d["fields"]["lune"].update(shape=[9, 6]), "fields.lune.shape .* 10 buckets"),
    "shards": (lambda d: d.update(shards={}), "shards is {}, must be list"),
    "shard of text": (lambda d: d["shards"].append("x.tar"), r"shards\[3\] must have name"),
    "shard name with a separator": (shard(name="sub/x.tar"), "'sub/x.tar' is not a plain file name"),
    "shard name upwards": (shard(name="..tar"), "'..tar' is not a plain file name"),
    "shard name absolute": (shard(name="/etc/passwd"), "not a plain file name"),
    "shard name hidden": (shard(name=".x.tar"), "not a plain file name"),
    "shard twice": (shard(name="portraits-000000.tar"), r"shards\[1\].name 'portraits-000000.tar' occurs twice"),
    "shard count": (shard(count="3"), r"shards\[1\].count is '3', must be int"),
    "empty shard": (shard(count=0), r"shards\[1\] has count 0"),
    "sha256": (shard(sha256="abc"), r"shards\[1\].sha256"),
    "origins": (shard(origins="!"), r"shards\[1\].origins is not base64"),
    "origins of other samples": (shard(origins="AAAA"), r"shards\[1\].origins has 3 bytes for 3 samples"),
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
