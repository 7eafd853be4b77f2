"""Which sources a stream reads together, and what each may lack."""

import json
import os

import numpy as np
import pytest
import torch

from tests.make_source import make_source, make_tensors
from tests.streams import config_of, stream_of, take
from tinyflux.shards.format import parse_key
from tinyflux.shards.sources import grids_of
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.trainer.cache_experts import DatasetCache
from tinyflux.trainer.collate import StreamCollate
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util.buckets import interpolate


def test_sources_that_do_not_go_together_are_refused(tmp_path):
    a, b = (str(make_source(tmp_path / name, name=name, dataset_id=i)) for i, name in enumerate("ab"))

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            open_sources(DataConfig([a, b], **options))

    open_sources(DataConfig([a, b]))
    refused("both have dataset id 4", dataset_ids=[4, 4])
    refused("data.allow_missing names .*'c'", allow_missing=["c"])
    with pytest.raises(ValueError, match="both have dataset id 0"):
        open_sources(DataConfig([a, a]))
    with pytest.raises(ValueError, match="data.sources is empty"):
        open_sources(DataConfig([]))

    made = {"vae": {"revision": "abc"}}
    make_source(b, dataset_id=1, producer=made | {"crop": "top", "resize": 2, "shapes": ["auto"], "seed": 3})
    open_sources(DataConfig([a, b]))  # how a source crops and which shapes it has is its own business
    make_source(b, dataset_id=1, producer={"vae": {"revision": "xyz"}, "dtype": "bfloat16"})
    refused("dtype: None against 'bfloat16'; vae.revision: 'abc' against 'xyz'")
    open_sources(DataConfig([a, b], allow_different=["b"]))

    make_source(b, dataset_id=1, dtype=torch.bfloat16)
    refused("latents: .*float16.* against .*bfloat16", dataset_ids=[0, 1])
    make_source(b, dataset_id=1, groups=("latents", "text", "sol"))
    refused("has no lune: turn that loss off, or put 'b' into data.allow_missing")
    for source in open_sources(DataConfig([a, b]), groups=("sol",)):
        assert list(source.groups) == ["latents", "text", "sol"]


def test_a_source_without_lune_carries_a_mask(tmp_path):
    folders = [
        str(make_source(tmp_path / "a", dataset_id=1)),
        str(make_source(tmp_path / "b", dataset_id=2, groups=("latents", "text", "sol"))),
    ]
    config = config_of(folders, allow_missing=["b"], micro_batch_size=8)
    with stream_of(config) as stream:
        for batch in take(stream, 6):
            assert torch.equal(batch["lune_mask"], batch["source_index"] == 0)
            assert "sol_mask" not in batch
            for i, key in enumerate(batch["keys"]):
                lune = make_tensors(parse_key(key)[1])["lune"]
                assert torch.equal(batch["lune"][i], lune if batch["lune_mask"][i] else torch.zeros_like(lune))
    config = config_of(folders[1:], allow_missing=["b"], micro_batch_size=8)
    with stream_of(config) as stream:
        batch = next(stream)
        assert "lune" not in batch and "lune_mask" not in batch and "sol_stats" in batch


def test_every_teacher_has_its_own_timesteps(tmp_path):
    """Also where the first source has no teachers."""
    grid = [0.1 * k**1.5 for k in range(10)]
    plain = make_source(tmp_path / "plain", (4,), groups=("latents", "text"))
    taught = make_source(tmp_path / "taught", (4,), dataset_id=2)
    manifest = json.loads((taught / "manifest.json").read_text())
    manifest["groups"]["sol"]["timesteps"] = grid
    (taught / "manifest.json").write_text(json.dumps(manifest))
    config = config_of([str(plain), str(taught)], weights=[0.0, 1.0], allow_missing=["plain"])
    sources = open_sources(config, ("latents", "text", "lune", "sol"))
    collate = StreamCollate(TrainerConfig(), [s.null for s in sources], grids_of(sources), global_batch_size=8, seed=0)
    with Stream(sources, config) as stream:
        raw, t = next(stream), torch.tensor([0.3, 0.55])
    found = collate.at(raw, t)
    assert torch.equal(found["lune_features"], interpolate(raw["lune"], t))
    assert torch.equal(found["sol_spatial"], interpolate(raw["sol_spatial"], t, tuple(grid)))
    with pytest.raises(ValueError, match="differ in the timesteps of sol"):
        open_sources(config_of([str(taught), str(make_source(tmp_path / "other", (4,), dataset_id=3))]))
    cache = DatasetCache.load(taught)
    stored = cache.rows.read("sol", np.array([0]))["sol_spatial"]
    assert torch.equal(cache.get_sol([0], 0.3)[1], interpolate(stored, t[:1], tuple(grid)))


def test_null_embeddings_are_checked(tmp_path):
    folder = make_source(tmp_path / "a")
    source = open_sources(DataConfig([str(folder)]))[0]
    assert {name: tuple(t.shape) for name, t in source.null.items()} == {"t5_embeds": (6, 8), "clip_pooled": (8,)}
    data = bytearray((folder / "null.safetensors").read_bytes())
    for bit in (0, 8 * len(data) // 2, 8 * len(data) - 1):  # in the header, in the tensors, at the end
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        (folder / "null.safetensors").write_bytes(changed)
        with pytest.raises(ValueError, match="null.safetensors: its sha256 is not the manifest's"):
            open_sources(DataConfig([str(folder)]))
    os.remove(folder / "null.safetensors")
    with pytest.raises(FileNotFoundError, match="null.safetensors"):
        open_sources(DataConfig([str(folder)]))
