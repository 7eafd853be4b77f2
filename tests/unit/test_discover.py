"""A folder with our members, written by plain webdataset, is a source: read completely once, then remembered."""

import os

import pytest
import torch
import webdataset

from tests.make_source import make_samples, make_source, make_tensors
from tinyflux.shards.discover import adopt
from tinyflux.shards.format import SUFFIX, ShardError
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import flat
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.shards.writer import write_null, write_shard
from tinyflux.util.buckets import grid


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYFLUX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "manifests"


@pytest.fixture
def folder(tmp_path):
    """The same samples as a source of ours, in shards and with names of webdataset's own writer."""
    ours = make_source(tmp_path / "ours")
    folder = tmp_path / "plain"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "plain-%04d.tar"), maxcount=5, verbose=0, encoder=False) as writer:
        for sample in make_samples(range(12)):
            writer.write(sample)
    os.link(ours / "null.safetensors", folder / "null.safetensors")
    return folder


def test_is_read_once(folder, cache):
    manifest = adopt(folder)
    assert (manifest.source, manifest.dataset_id, [shard.count for shard in manifest.shards]) == ("plain", 1, [5, 5, 2])
    ours = Manifest.load(folder.parent / "ours")
    assert flat(manifest.groups) == flat(ours.groups)
    assert manifest.index.origins.tolist() == ours.index.origins.tolist()  # so that the same images are held out

    (cached,) = cache.iterdir()
    before = cached.stat().st_ino
    assert adopt(folder) == manifest and cached.stat().st_ino == before

    os.remove(folder / "plain-0002.tar")  # a changed folder is read again
    assert [shard.count for shard in adopt(folder).shards] == [5, 5]
    (folder / "plain-0001.tar").rename(folder / "two words.tar")
    with pytest.raises(ValueError, match="'two words.tar' is not a plain file name"):
        adopt(folder)


def test_fewer_timesteps(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    write_shard(folder / "plain-000000.tar", make_samples(range(4), timesteps=5))
    write_null(folder, {name: make_tensors(0)[name] for name in ("t5_embeds", "clip_pooled")})
    assert {group.timesteps for group in adopt(folder).groups.values()} == {None, grid(5)}


def test_streams_the_same_samples(folder):
    config = DataConfig([str(folder)], global_batch_size=4, micro_batch_size=4)
    with Stream(open_sources(config), config) as stream:
        seen = {}
        for _ in range(3):
            batch = next(stream)
            seen |= dict(zip(batch["local_indices"].tolist(), batch["latents"], strict=True))
    assert sorted(seen) == list(range(12))
    assert all(torch.equal(latents, make_tensors(i)["latents"]) for i, latents in seen.items())


def test_keys_of_others_need_an_id(folder):
    path = folder / "plain-0000.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i, sample in enumerate(make_samples(range(3))):
            writer.write(sample | {"__key__": f"cat-{i}"})
    with pytest.raises(ValueError, match="'cat-0' is not a sample key.* data.dataset_ids"):
        adopt(folder)
    source = open_sources(DataConfig([str(folder)], dataset_ids=[7]))[0]
    assert (source.dataset_id, source.manifest.count) == (7, 10)


def test_refuses_what_it_cannot_read(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither manifest.json nor"):
        adopt(tmp_path)
    data = (folder / "plain-0001.tar").read_bytes()
    (folder / "plain-0001.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match="plain-0001.tar.* cut short"):
        adopt(folder)
    with webdataset.TarWriter(str(folder / "plain-0000.tar"), encoder=False) as writer:
        writer.write({"__key__": "0001_000000000", "latents" + SUFFIX: b"junk"})
    with pytest.raises(ShardError, match="plain-0000.tar, sample 0001_000000000: latents"):
        adopt(folder)
