"""Caches for notebooks: built, saved as sources, read lazily, several at once; and legacy caches."""

import gc
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps

from sharding import build, verify
from tests.listed import inputs_of
from tests.make_source import make_old_cache, make_source, make_tensors
from tests.store_server import store_server
from tests.training import train
from tinyflux.model.tiny.shapes import render
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.sources import find_source
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import open_source
from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.util.buckets import interpolate

N = 10
IMAGES, PROMPTS = zip(*(render(i, seed=3) for i in range(N)), strict=True)


@pytest.fixture(scope="module")
def zoo():
    return ModelZoo(zoo="tiny")


def build_cache(zoo, images=IMAGES, prompts=PROMPTS, **options) -> DatasetCache:
    return DatasetCache.build(zoo, images, prompts, "portraits", **{"batch_size": 4, "shard_size": 6} | options)


@pytest.fixture(scope="module")
def cache(zoo):
    return build_cache(zoo, dataset_id=7)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_built_from_the_same_images_as_a_source_it_is_the_same(zoo, tmp_path):
    threads = torch.get_num_threads()
    (tmp_path / "images").mkdir()
    with open(tmp_path / "list.jsonl", "w") as file:
        for i, (image, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
            image.save(tmp_path / "images" / f"{i:02d}.png")
            file.write(json.dumps({"image": f"images/{i:02d}.png", "text": prompt}) + "\n")
    (tmp_path / "s.toml").write_text('[portraits]\nkind = "jsonl"\nlocation = "list.jsonl"\ndataset_id = 7\n')
    order = [int(item.origin[7:9]) for item in inputs_of(find_source("portraits", tmp_path / "s.toml"))]
    cache = build_cache(zoo, [IMAGES[i] for i in order], [PROMPTS[i] for i in order], dataset_id=7)
    args = f"--source portraits --sources {tmp_path}/s.toml --out {tmp_path}/out --zoo tiny --batch-size 4"
    try:
        assert build.main([*args.split(), "--shard-size", "6", "--threads", str(threads)]) == 0
    finally:
        torch.set_num_threads(threads)
    made = DatasetCache.load(tmp_path / "out")
    assert made.rows.source.groups == cache.rows.source.groups
    assert made.fields == cache.fields and len(made) == len(cache) == N
    for view, other in ((made.encodings, cache.encodings), (made.lune, cache.lune), (made.sol, cache.sol)):
        for a, b in zip(view._read(range(N)), other._read(range(N)), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(made.null()[name], value) for name, value in cache.null().items())


def test_saved_it_is_a_source(cache, tmp_path, capsys):
    folder = cache.save(tmp_path / "portraits")
    assert verify.main([str(folder), "--deep"]) == 0
    assert "10 samples in 2 shards, no faults" in capsys.readouterr().out
    before = contents(folder)
    assert set(before) == {
        "manifest.json",
        "index.safetensors",
        "null.safetensors",
        "rejected.jsonl",
        *(f"portraits-00000{k}.tar" for k in (0, 1)),
    }
    cache.save(folder)  # once more is no harm
    assert contents(folder) == before
    loaded = DatasetCache.load(folder)
    assert torch.equal(loaded.get_encodings(9)[0], cache.get_encodings(9)[0])
    assert loaded.save(tmp_path / "copy") == tmp_path / "copy" and contents(tmp_path / "copy") == before
    ran = train(tmp_path / "run", [folder], "--trainer.total-steps", 2)
    assert ran.returncode == 0, ran.stdout
    make_source(tmp_path / "other")
    with pytest.raises(FileExistsError, match="contains another source"):
        cache.save(tmp_path / "other")


def test_what_it_builds_is_repaired_with_its_fingerprint(zoo, tmp_path):
    made = build_cache(zoo, IMAGES[:3], PROMPTS[:3], checkpoint_dir=tmp_path / "made")
    saved = made.save(tmp_path / "saved")
    before = (saved / "manifest.json").read_bytes()
    for name in ("made/manifest.json", "made/index.safetensors", "saved/index.safetensors"):
        (tmp_path / name).unlink()
    for folder in (tmp_path / "made", saved):
        assert verify.main([str(folder), "--repair", "--deep"]) == 0
        assert (folder / "manifest.json").read_bytes() == before


def test_shapes_captions_and_overlays(tmp_path):
    """Each sample has its own shape; a base with its overlays is saved as one source."""
    shapes, counts = ((4, 4), (2, 8), (8, 2)), [3, 2, 1]
    base = make_source(tmp_path / "a", counts, shapes=shapes, captions=[1, 3], groups=("latents", "text", "sol"))
    lune = make_source(tmp_path / "a-lune", counts, shapes=shapes, captions=[1, 3], groups=("lune",), base=base)
    text = make_source(
        tmp_path / "a-text", counts, shapes=shapes, captions=2, groups=("text",), seed=4, base=lune, producer={"t5": {}}
    )
    cache = DatasetCache.load(text)
    assert cache.shapes.tolist() == [[4, 4]] * 3 + [[2, 8]] * 2 + [[8, 2]]
    saved = DatasetCache.load(cache.save(tmp_path / "saved"))
    assert verify.main([str(tmp_path / "saved"), "--deep"]) == 0 and Manifest.load(tmp_path / "saved").base is None
    assert saved.rows.source.groups == cache.rows.source.groups
    assert saved.rows.source.captions.tolist() == [2] * 6
    file = saved.rows.source.open(1)
    assert file.meta(0)["prompts"] == ["prompt 3.0", "prompt 3.1"] and file.preview(0)
    for i in range(6):
        shape = tuple(cache.shapes[i])
        texts = make_tensors(i, shape=shape, captions=2, seed=4)
        wanted = (make_tensors(i, shape=shape)["latents"], texts["t5_embeds"][0], texts["clip_pooled"][0])
        for one in (cache, saved):
            assert all(torch.equal(a, b) for a, b in zip(one.get_encodings(i), wanted, strict=True))
            lune = make_tensors(i, shape=shape, captions=[1, 3][i % 2])["lune"]
            assert torch.equal(one.get_lune([i], 0.05)[0], lune[0].float())
    assert cache.get_lune([0, 3, 5], 0.5).shape == (3, 6), "the teachers' features have one shape"
    with pytest.raises(ValueError, match="latents of the shapes 2x8, 4x4, but a batch must have one"):
        cache.get_encodings_batch([0, 3])
    with pytest.raises(FileExistsError, match="contains another source"):
        cache.save(base)


def test_images_of_any_kind_are_the_same(zoo, cache, tmp_path):
    IMAGES[0].save(tmp_path / "0.png")
    array = np.array(IMAGES[2])
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    images = [tmp_path / "0.png", array, tensor, tensor / 127.5 - 1]
    prompts = [PROMPTS[0], *[PROMPTS[2]] * 3]
    made = build_cache(zoo, images, prompts, build_lune=False, build_sol=False)
    folder = Path(made.rows.source.url)
    assert made.lune is None and made.sol is None and folder.is_dir()
    assert "lune" not in made.rows.source.groups
    latents = made.encodings.get_batch([0, 1, 2, 3])[0]
    assert torch.equal(latents[1], latents[2]) and torch.equal(latents[1], latents[3])
    assert torch.allclose(latents[0].float(), cache.get_encodings(0)[0].float(), atol=1e-2)
    with pytest.raises(ValueError, match="'portraits' has no Lune features: build it with build_lune=True"):
        made.get_lune([0], 0.5)
    with pytest.raises(ValueError, match="'portraits' has no Sol statistics"):
        made.get_sol([0], 0.5)
    del made
    gc.collect()
    assert not folder.exists()  # it was never saved


def test_a_build_goes_on_where_it_stopped(zoo, cache, tmp_path):
    images = [*IMAGES[:8], torch.zeros(4, 4), IMAGES[9]]
    options = {"checkpoint_dir": tmp_path / "work", "dataset_id": 7}
    with pytest.raises(ValueError, match=r"input 8 of 'portraits': Tensor torch.float32 4 4 is not a PIL image"):
        build_cache(zoo, images, **options)
    first = tmp_path / "work" / "portraits-000000.tar"
    stamp = first.stat().st_mtime_ns
    assert [path.name for path in (tmp_path / "work").glob("*.tar")] == [first.name]
    again = build_cache(zoo, **options)
    assert first.stat().st_mtime_ns == stamp
    assert contents(tmp_path / "work") == contents(Path(cache.rows.source.url))
    assert len(build_cache(zoo, **options)) == len(again) == N

    with pytest.raises(ValueError, match=r"the inputs differ from those of its build: 1 \(portraits/0\) changed"):
        build_cache(zoo, prompts=["changed", *PROMPTS[1:]], **options)
    with pytest.raises(ValueError, match=r"the inputs differ from those of its build: 1 \(portraits/1\) changed"):
        build_cache(zoo, [IMAGES[0], ImageOps.invert(IMAGES[1]), *IMAGES[2:]], **options)
    with pytest.raises(ValueError, match=r"(?s)started with other settings.*batch_size: 4 against 2"):
        build_cache(zoo, batch_size=2, **options)
    with pytest.raises(ValueError, match="contains a finished source without the notes of its build"):
        build_cache(zoo, checkpoint_dir=make_source(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": PROMPTS[:3]}, "10 images and 3 prompts"),
        ({"images": [], "prompts": []}, "0 images and 0 prompts"),
        ({"dtype": torch.int8}, "--dtype is 'int8': it must be one of float16"),
        ({"batch_size": 0}, "--batch-size is 0: it must be at least 1"),
    ],
)
def test_bad_arguments(zoo, options, message):
    with pytest.raises(ValueError, match=message):
        build_cache(zoo, **options)


def test_features_at_t(tmp_path):
    cache = DatasetCache.load(make_source(tmp_path, counts=(5, 3, 4)))
    rows, t = torch.tensor([11, 0, 5, 5]), torch.tensor([0.0, 0.31, 0.5, 1.0])
    stored = {name: torch.stack([make_tensors(i)[name] for i in rows.tolist()]) for name in make_tensors(0)}
    assert torch.equal(cache.get_lune(rows, t), interpolate(stored["lune"], t))
    stats, spatial = cache.get_sol(rows, t)
    assert torch.equal(stats, interpolate(stored["sol_stats"], t)) and stats.dtype == torch.float32
    assert torch.equal(spatial, interpolate(stored["sol_spatial"], t))
    assert torch.equal(cache.get_lune(rows, 0.3), interpolate(stored["lune"], torch.full((4,), 0.3)))
    latents, t5, clip = cache.get_encodings(11)
    assert torch.equal(latents, make_tensors(11)["latents"]) and t5.shape == (6, 8) and clip.shape == (8,)
    for bad in (-1, 12):
        with pytest.raises(IndexError, match=f"index {bad} is out of range: cache '{tmp_path.name}' has 12 samples"):
            cache.get_lune([0, bad], 0.5)
    with pytest.raises(ValueError, match=r"t has shape \[3\] for 2 indices"):
        cache.get_lune([0, 1], torch.rand(3))
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301  what a spawned worker of a DataLoader gets
    assert torch.equal(copy.get_lune(rows, t), cache.get_lune(rows, t))


def test_of_a_url_only_what_is_read_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYFLUX_CACHE", str(tmp_path / "cache"))
    local = DatasetCache.load(make_source(tmp_path / "served", counts=(5, 3, 4)))
    with store_server(tmp_path / "served") as server:
        remote = DatasetCache.load(server.url)
        assert len(remote) == 12 and not any(name.endswith(".tar") for name in server.bodies)
        assert torch.equal(remote.get_lune([6], 0.4), local.get_lune([6], 0.4))
        assert [name for name in server.bodies if name.endswith(".tar")] == ["served-000001.tar"]
        copy = pickle.loads(pickle.dumps(remote))  # noqa: S301
        assert torch.equal(copy.get_encodings(11)[0], local.get_encodings(11)[0])
        remote.save(tmp_path / "saved")
    assert verify.main([str(tmp_path / "saved"), "--deep"]) == 0
    assert torch.equal(DatasetCache.load(tmp_path / "saved").get_lune([6], 0.4), local.get_lune([6], 0.4))


def test_several_sources(tmp_path):
    one = DatasetCache.load(make_source(tmp_path / "a", counts=(5,), name="a"))
    two = DatasetCache.load(make_source(tmp_path / "b", counts=(4, 4), name="b", groups=("latents", "text", "sol")))
    multi = MultiSourceCache()
    multi.add(one, dataset_id=0)
    multi.add(two, dataset_id=5)
    rows, ids, t = torch.tensor([4, 7, 0, 4]), torch.tensor([0, 5, 5, 0]), torch.rand(4)
    stats, spatial = multi.get_sol(rows, ids, t)
    for i, (row, cache) in enumerate(zip((4, 7, 0, 4), (one, two, two, one), strict=True)):
        expected = cache.get_sol([row], t[i])
        assert torch.equal(stats[i], expected[0][0]) and torch.equal(spatial[i], expected[1][0])
    assert torch.equal(multi.get_encodings(rows, ids)[0][1], make_tensors(7)["latents"])
    assert len(multi) == 13
    assert multi.get_lune(rows[[0, 3]], ids[[0, 3]], t[[0, 3]]).shape == (2, 6)
    with pytest.raises(ValueError, match="'b' has no Lune features"):
        multi.get_lune(rows, ids, t)
    with pytest.raises(ValueError, match=r"dataset id 3 is unknown: the caches added have \[0, 5\]"):
        multi.get_sol(rows, torch.tensor([0, 5, 3, 0]), t)
    with pytest.raises(IndexError, match="index 8 is out of range: cache 'b' has 8 samples"):
        multi.get_sol(torch.tensor([8]), torch.tensor([5]), t[:1])
    with pytest.raises(ValueError, match="dataset id 5 is taken by 'b'"):
        multi.add(one, dataset_id=5)


def test_old_caches_load_and_become_sources(tmp_path, capsys):
    old = DatasetCache.load(make_old_cache(tmp_path / "old"))
    assert old.name == "portraits" and len(old) == 7
    folder = old.save(tmp_path / "new", dataset_id=4)
    assert verify.main([str(folder), "--deep"]) == 0, capsys.readouterr().out
    new = DatasetCache.load(folder)
    assert "converted from a legacy cache" in new.rows.source.groups["text"].producer["producer"]
    rows, t = [6, 0, 3], torch.rand(3)
    for a, b in zip(
        (*old.get_sol(rows, t), old.get_lune(rows, t)), (*new.get_sol(rows, t), new.get_lune(rows, t)), strict=True
    ):
        assert torch.equal(a, b)
    for cache in (old, new):
        assert torch.equal(cache.get_encodings(6)[1], make_tensors(6)["t5_embeds"])
        assert not cache.null()["t5_embeds"].any()
    assert Manifest.load(folder).dataset_id == 4
    assert open_source(folder).open(0).read(6, "json").startswith(b'{"dataset_id": 4, "index": 6, "origin"')


class Bomb:
    def __reduce__(self):
        return print, ("bang",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lune": {"other": torch.zeros(1)}}, "no lune, which may be called features, lune, lune_features; it has"),
        ({"lune": torch.zeros(6, 10, 6)}, "lune has 6 rows, latents have 7"),
        ({"lune": torch.zeros(7, 9, 6)}, r"has shape \[7, 9, 6\], must be \[N, K, D\] with K = 10"),
        ({"lune": torch.zeros(7, 10, 6, dtype=torch.float64)}, "is torch.float64, must be one of float16"),
        ({"lune": {"features": torch.zeros(7, 10, 6), "t_buckets": torch.arange(10)}}, "its timesteps are"),
        ({"sol": [1, 2]}, "sol.pt: contains a list"),
        ({"sol": {"stats": "no", "spatial": "no"}}, "stats is a str, must be a tensor"),
        ({"lune": Bomb()}, "lune.pt is refused: it contains more than tensors"),
    ],
)  # fmt: skip
def test_bad_old_caches(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        DatasetCache.load(make_old_cache(tmp_path, **changes))


def test_old_caches_that_are_damaged(tmp_path):
    path = make_old_cache(tmp_path / "cut") / "lune.pt"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="lune.pt is damaged or cut short"):
        DatasetCache.load(tmp_path / "cut")
    features = torch.zeros(7, 10, 6)
    features[3] = torch.nan
    with pytest.raises(ValueError, match="input 3 of .portraits.: not finite: lune has NaN"):
        DatasetCache.load(make_old_cache(tmp_path / "nan", lune=features)).save(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        DatasetCache.load(tmp_path / "nothing")


def test_images_and_prompts_that_cannot_be(zoo):
    for images, prompts, message in (
        ([torch.full((3, 64, 64), torch.nan)], ["a"], "input 0 of 'portraits': the tensor has NaN or infinity"),
        ([torch.full((3, 64, 64), 255.0)], ["a"], r"the tensor has values up to 255, must be in \[-1, 1\]"),
        (IMAGES[:2], ["a", None], "prompts must be a list of texts, not NoneType at number 1"),
        (IMAGES[:2], "ab", "prompts must be a list of texts, not one text"),
    ):
        with pytest.raises(ValueError, match=message):
            build_cache(zoo, images, prompts)


def test_indices_and_timesteps_that_cannot_be(tmp_path):
    cache, multi = DatasetCache.load(make_source(tmp_path / "a")), MultiSourceCache()
    multi.add(cache, 3)
    rows, ids = torch.tensor([4, 1]), torch.tensor([3, 3])
    assert torch.equal(multi.get_lune(rows, ids, 0.3), cache.get_lune(rows, 0.3))
    assert torch.equal(multi.get_sol(rows, ids, torch.tensor(0.3))[1], cache.get_sol(rows, 0.3)[1])
    for wrong in (torch.tensor([True, False]), torch.tensor([0.7])):
        with pytest.raises(TypeError, match="indices must be integers, not"):
            cache.get_lune(wrong, 0.5)
    with pytest.raises(ValueError, match="t is NaN"):
        cache.get_lune(rows, torch.nan)
    with pytest.raises(ValueError, match=r"t has shape \[3\] for 2 indices"):
        multi.get_lune(rows, ids, torch.rand(3))
    with pytest.raises(ValueError, match="no indices were given"):
        multi.get_lune(rows[:0], ids[:0], 0.5)
