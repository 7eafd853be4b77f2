"""Building sources with the tiny zoo: real photographs, bad input, changed settings, and other readers."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import skimage
import torch
import webdataset
import zstandard
from PIL import Image

from sharding import build
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.engine import check_tensors
from tinyflux.precache.images import Rejected
from tinyflux.shards.format import parse_key
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import Group, fields_of, flat
from tinyflux.shards.source import open_source

PHOTOS = {
    "astronaut.png": "an astronaut in an orange suit",
    "chelsea.png": "a ginger cat",
    "coffee.png": "a cup of coffee",
    "rocket.jpg": "a rocket at its launch pad",
    "motorcycle_left.png": "a motorcycle in a garage",
    "hubble_deep_field.jpg": "galaxies",
    "retina.jpg": "a retina",
    "camera.png": "a photographer with a camera",
    "coins.png": "ancient coins",
    "moon.png": "the surface of the moon",
    "brick.png": "a brick wall",
    "grass.png": "grass",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No rank of another job, and the same number of threads after a build as before."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with a finished source of a dozen photographs in out/."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    for name, caption in PHOTOS.items():
        (folder / "images" / name).write_bytes((Path(skimage.data_dir) / name).read_bytes())
        (folder / "images" / name).with_suffix(".txt").write_text(caption)
    sources(folder)
    assert run(folder, "--shard-size", 8) == 0
    return folder


def test_photographs_come_back(photos):
    """Stored latents decode to the original pictures, with a mean PSNR above 18 dB."""
    found, zoo, psnr = samples(photos / "out"), ModelZoo(zoo="tiny"), []
    zoo.load_vae()
    assert len(found) == len(PHOTOS)
    for index, sample in found.items():
        name = sample["meta"]["origin"]
        with Image.open(photos / "images" / name) as image:
            image = image.convert("RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        assert sample["meta"] == {
            "prompts": [PHOTOS[name]],
            "source": "photos",
            "dataset_id": 7,
            "index": index,
            "origin": name,
            "size": [width, height],
            "crop": [left, top, left + side, top + side],
        }
        small = image.crop(sample["meta"]["crop"]).resize((64, 64), Image.Resampling.LANCZOS)
        decoded = zoo.decode_latents(sample["latents"].float()[None])[0].clamp(-1, 1)  # [3, 64, 64]
        target = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
        psnr.append(10 * torch.log10(4 / (decoded - target).square().mean()).item())
    print({s["meta"]["origin"]: round(value, 1) for s, value in zip(found.values(), psnr, strict=True)})
    assert np.mean(psnr) > 18 and min(psnr) > 13


def test_what_a_source_holds(photos):
    out = photos / "out"
    assert set(content(out)) == {
        "index.safetensors", "manifest.json", "null.safetensors", "rejected.jsonl",
        "photos-000000.tar", "photos-000001.tar",
    }  # fmt: skip
    assert (out / "rejected.jsonl").read_bytes() == b""
    manifest = Manifest.load(out)
    assert [shard.count for shard in manifest.shards] == [8, 4]
    assert {field.dtype for field in flat(manifest.groups).values()} == {"float16"}
    shapes = {name: field.shape for name, field in flat(manifest.groups).items()}
    assert shapes.pop("lune")[0] == 10
    assert shapes == {
        "latents": (16, "h", "w"),
        "t5_embeds": (32, 128),
        "clip_pooled": (128,),
        "sol_stats": (10, 3),
        "sol_spatial": (10, 8, 8),
    }
    expected = {"resolution": 64, "resize": "lanczos", "crop": "center", "teacher_input": "image", "seed": 0}
    assert expected.items() <= whole(manifest.groups).items()
    for sample in samples(out).values():
        assert sample["sol_spatial"].float().flatten(1).sum(1) == pytest.approx(1, abs=0.01)
        assert (sample["sol_stats"] >= 0).all() and (sample["sol_stats"] <= 1).all()


def test_plain_readers_read_it(photos, tmp_path):
    """webdataset and datasets, which know nothing of this package."""
    out = photos / "out"
    tars = sorted(map(str, out.glob("*.tar")))
    captions = [sample["meta"]["prompts"][0] for sample in samples(out).values()]
    assert sorted(captions) == sorted(PHOTOS.values()) and captions != [PHOTOS[name] for name in sorted(PHOTOS)]

    seen = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil", only=["json", "jpg"]))
    assert [sample["json"]["prompts"] for sample in seen] == [[text] for text in captions]
    assert all(sample["jpg"].size == (64, 64) for sample in seen)
    blob = zstandard.decompress(seen[3]["text.0.safetensors.zst"])
    planes = safetensors.numpy.load(blob)
    low, high = planes["t5_embeds.0"], planes["t5_embeds.1"]
    joined = (high.astype("<u2") << 8 | low).view("<f2")  # the line that the documentation gives
    assert np.array_equal(joined, samples(out)[3]["t5_embeds"].numpy())

    rows = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["json"]["prompts"] for row in rows] == [[text] for text in captions]
    assert rows[3]["text.0.safetensors.zst"] == blob  # datasets decompresses what ends in .zst


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not installed")
def test_tar_and_zstd_read_it(photos, tmp_path):
    subprocess.run(["tar", "-xf", photos / "out" / "photos-000000.tar", "-C", tmp_path], check=True)
    member = next(tmp_path.glob("*_000000003.sol.safetensors.zst"))
    blob = subprocess.run(["zstd", "-dc", member], check=True, capture_output=True).stdout
    assert safetensors.torch.load(blob)["sol_spatial.0"].shape == (10, 8, 8)


def test_complete_source_is_left_alone(photos, capsys):
    before = content(photos / "out")
    assert run(photos, "--shard-size", 8) == 0
    assert "complete, 12 samples in 2 shards" in capsys.readouterr().out
    assert content(photos / "out") == before


@pytest.mark.parametrize(
    "change, message",
    [
        (("--shard-size", 4), "shard_size: 8 against 4"),
        (("--shard-size", 8, "--seed", 5), "seed: 0 against 5"),
        (
            ("--shard-size", 8, "--no-lune", "--dtype", "bfloat16"),
            "dtype: 'float16' against 'bfloat16'\n  settings.lune: True",
        ),
    ],
)
def test_other_settings_are_refused(photos, capsys, change, message):
    before = content(photos / "out")
    assert run(photos, *change) == 2
    assert message in capsys.readouterr().err
    assert content(photos / "out") == before


def damaged(folder: Path) -> None:
    """20 good images, and one of each kind of bad one."""
    images = folder / "images"
    images.mkdir()
    noise = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(noise.integers(0, 256, (70, 80, 3), np.uint8)).save(images / f"good-{i:02d}.png")
        (images / f"good-{i:02d}.txt").write_text(f"noise number {i}")
    whole = (images / "good-00.png").read_bytes()
    files = {
        "a-cut": whole[:9000],
        "b-text": b"hello",
        "c-empty-prompt": whole,
        "d-no-caption": whole,
        "m-cut": whole[:99],
    }
    for name, data in files.items():
        (images / f"{name}.png").write_bytes(data)
        (images / f"{name}.txt").write_text(" " if name == "c-empty-prompt" else "a caption")
    (images / "d-no-caption.txt").unlink()


def test_bad_images_are_listed_and_the_rest_is_built(tmp_path, capsys):
    damaged(tmp_path)
    sources(tmp_path)
    assert run(tmp_path, "--shard-size", 8) == 1  # 5 of 25 is more than the default --max-rejected
    printed = capsys.readouterr()
    assert "error: more than --max-rejected 1.0% of the inputs were rejected" in printed.err
    assert "20 samples in" in printed.out and "5 of 25 inputs rejected" in printed.out
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted((r["origin"], r["reason"].partition(":")[0]) for r in rejected) == [
        ("a-cut.png", "unreadable image"),
        ("b-text.png", "unreadable image"),
        ("c-empty-prompt.png", "empty caption"),
        ("d-no-caption.png", "missing caption"),
        ("m-cut.png", "unreadable image"),
    ]
    found, left_out = samples(tmp_path / "out"), [entry["index"] for entry in rejected]
    assert left_out == sorted(left_out) and sorted([*found, *left_out]) == list(range(25))
    assert sum(shard.count for shard in Manifest.load(tmp_path / "out").shards) == 20
    for sample in found.values():
        number = int(sample["meta"]["origin"].removeprefix("good-").removesuffix(".png"))
        assert sample["meta"]["prompts"] == [f"noise number {number}"]
    assert run(tmp_path, "--shard-size", 8) == 1  # finished: nothing is built again, and the status stays

    assert run(tmp_path, "--out", tmp_path / "lax", "--max-rejected", 0.2, "--no-preview", "--no-sol") == 0
    sources(tmp_path, allow_empty_captions=True)
    assert run(tmp_path, "--out", tmp_path / "allowed", "--max-rejected", 0.2) == 0
    allowed = {sample["meta"]["origin"]: sample["meta"]["prompts"] for sample in samples(tmp_path / "allowed").values()}
    assert allowed["d-no-caption.png"] == allowed["c-empty-prompt.png"] == [""]
    lax = next(iter(samples(tmp_path / "lax").values()))
    assert set(lax) == {"latents", "t5_embeds", "clip_pooled", "lune", "meta"}


def test_nothing_good_at_all(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    sources(tmp_path)
    assert run(tmp_path) == 2
    assert "no sample is left, 1 of 1 inputs rejected" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_previews_bfloat16_noise_and_limit(tmp_path):
    sources(tmp_path)
    args = ("--limit", 6, "--no-preview", "--dtype", "bfloat16", "--teacher-input", "noise")
    assert run(tmp_path, *args, source="drawn") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.count == 6 and manifest.groups["lune"].fields["lune"].dtype == "bfloat16"
    assert manifest.groups["lune"].producer["teacher_input"] == "noise"
    assert "jpg" not in open_source(tmp_path / "out").open(0).samples[0].members


def test_fewer_timesteps(tmp_path, capsys):
    """Recorded in the manifest; equal features at timesteps that both grids have; an overlay uses its base's grid."""
    sources(tmp_path)
    for name, count in (("few", 4), ("all", 10)):
        args = ("--limit", 3, "--timesteps", count, "--no-sol")
        assert run(tmp_path, "--out", tmp_path / name, *args, source="drawn") == 0
    groups = Manifest.load(tmp_path / "few").groups
    assert groups["lune"].timesteps == (0.05, 0.35, 0.65, 0.95) and groups["lune"].fields["lune"].shape[0] == 4
    few, every = samples(tmp_path / "few"), samples(tmp_path / "all")
    for index in few:
        torch.testing.assert_close(few[index]["lune"], every[index]["lune"][::3], atol=2e-3, rtol=2e-3)
    only = ("--only", "sol", "--from", tmp_path / "few", "--out", tmp_path / "sol")
    assert run(tmp_path, *only, "--timesteps", 10, source="drawn") == 2
    assert "--timesteps 10: the teachers of" in capsys.readouterr().err
    assert run(tmp_path, *only, source="drawn") == 0
    assert Manifest.load(tmp_path / "sol").groups["sol"].timesteps == groups["lune"].timesteps


def test_same_sample_whatever_the_batch(tmp_path):
    """Features of a sample depend on its seed and image, not on what else is encoded with it."""
    sources(tmp_path)
    for name, size in (("a", 4), ("b", 3)):
        assert run(tmp_path, "--out", tmp_path / name, "--limit", 8, "--batch-size", size, source="drawn") == 0
    first, second = samples(tmp_path / "a"), samples(tmp_path / "b")
    for index in first:
        for name in ("latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
            a, b = first[index][name].float(), second[index][name].float()
            assert (a - b).abs().max() <= 1e-3 * max(1, a.abs().max())


def test_inputs_that_change_are_noticed(tmp_path, capsys):
    """A build resumes only with the inputs that it began with."""
    damaged(tmp_path)
    sources(tmp_path)
    assert run(tmp_path, "--shard-size", 8) == 1
    (tmp_path / "out" / "manifest.json").unlink()  # as if it had been killed before the end
    (tmp_path / "images" / "zz.png").write_bytes((tmp_path / "images" / "good-00.png").read_bytes())
    (tmp_path / "images" / "good-03.txt").write_text("something else altogether")
    assert run(tmp_path, "--shard-size", 8) == 2
    message = capsys.readouterr().err
    assert "1 (zz.png) new, 1 (good-03.png) changed" in message


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


@pytest.mark.parametrize(
    "args, message",
    [
        (("--source", "nobody"), "error: unknown source 'nobody'; known: drawn, photos"),
        (("--source", "photos"), "images: no such folder"),
        (("--source", "drawn", "--zoo", "/nowhere"), "/nowhere"),
        (("--source", "drawn", "--sources", "none.toml"), "none.toml: no such sources file"),
        (("--source", "drawn", "--out", "sources.toml/x"), "sources.toml"),
    ],
)
def test_one_clear_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    sources(tmp_path)
    default = () if "--zoo" in args else ("--zoo", "tiny")
    assert build.main([*args, *default]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error


@pytest.mark.parametrize(
    "args, message",
    [
        (("--batchsize", "3"), "--batchsize"),
        (("--dtype", "int8"), "invalid choice 'int8'"),
        (("--limit", "x"), "--limit"),
        (("--batch-size", "0"), "--batch-size is 0: it must be at least 1"),
        (("--max-rejected", "5"), "--max-rejected is 5.0: it must be in [0, 1]"),
        (("--compile", "--low-memory"), "use only one"),
        (("--shapes", "auto", "64x64"), "square and auto cannot be combined"),
        (("--shapes", "64"), "it must be square, auto or WIDTHxHEIGHT"),
        (("--zoo", "tiny"), "--source NAME is missing; --list shows the names"),
    ],
)
def test_impossible_arguments(capsys, args, message):
    with pytest.raises(SystemExit) as caught:
        build.main([*args] if "--zoo" in args else [*args, "--source", "drawn"])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_list_and_estimate(tmp_path, capsys):
    sources(tmp_path)
    assert build.main(["--list", "--sources", str(tmp_path / "sources.toml")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["source", "photos", "drawn"]
    assert run(tmp_path, "--estimate", source="drawn") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^drawn: [\d.]+ images/s per rank, measured on 12 images; 0.0% rejected$", printed, re.M)
    for count in ("all 20 inputs", "a million inputs"):
        assert re.search(rf"^  {count}: [\d.]+ CPU-hours, [\d.]+ GB at [\d.]+ kB per sample$", printed, re.M)
    shares = re.findall(r"(vae|sd_vae|clip|t5|lune|sol) ([\d.]+)%", printed)
    assert len({name for name, _ in shares}) == 6 and abs(sum(float(share) for _, share in shares) - 100) < 0.5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("lune", lambda x: x.fill_(float("nan")), "not finite: lune has NaN or infinity"),
        ("t5_embeds", lambda x: x.fill_(float("inf")), "not finite: t5_embeds"),
        ("latents", lambda x: x.fill_(0.25), "constant latents"),
        (
            "latents",
            lambda x: x[:, :4],
            r"wrong shape: latents are \(4, 8\), the shard has \(8, 8\)",
        ),
    ],
)
def test_tensors_that_must_not_be_written(name, change, reason):
    shapes = {"latents": (16, 8, 8), "t5_embeds": (4, 8), "lune": (3, 2)}
    good = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    expected = fields_of(good)
    assert check_tensors(good, expected, (8, 8)) == (8, 8)
    with pytest.raises(Rejected, match=f"^{reason}"):
        check_tensors(good | {name: change(good[name].clone())}, expected, (8, 8))


def test_one_model_at_a_time_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    """--low-memory: never two models in memory, each loaded once per shard, and the same source."""
    sources(tmp_path)
    loads = []

    class Watched(ModelZoo):
        def _keep(self, name, *args):
            loads.append((name, self.loaded()))
            return super()._keep(name, *args)

    monkeypatch.setattr("tinyflux.model.zoo.ModelZoo", Watched)
    args = ("--shard-size", 8, "--limit", 14)
    assert run(tmp_path, "--out", tmp_path / "plain", *args, source="drawn") == 0
    loads.clear()
    assert run(tmp_path, "--out", tmp_path / "low", *args, "--low-memory", source="drawn") == 0
    assert content(tmp_path / "low") == content(tmp_path / "plain")
    assert not any(others for _, others in loads)
    names = [name for name, _ in loads]
    assert {name: names.count(name) for name in ("vae", "t5", "clip", "lune", "sol")} == {
        "vae": 3, "t5": 4, "clip": 4, "lune": 3, "sol": 3,  # for the fingerprint, the empty prompt, each shard
    }  # fmt: skip
    assert run(tmp_path, "--out", tmp_path / "plain", *args, "--low-memory", source="drawn") == 0  # one and the same
    capsys.readouterr()
    assert run(tmp_path, "--estimate", "--low-memory", "--shard-size", 4, source="drawn") == 0
    assert "all 20 inputs" in capsys.readouterr().out


def test_precision_of_single_models(tmp_path, capsys):
    """--model-dtype for Lune: changes only its feature and its part of the fingerprint."""
    sources(tmp_path)
    for name, options in (("plain", ()), ("half", ("--model-dtype", "lune", "bfloat16"))):
        assert run(tmp_path, "--out", tmp_path / name, "--limit", 4, *options, source="drawn") == 0
    plain, half = samples(tmp_path / "plain"), samples(tmp_path / "half")
    for index in plain:
        for name in ("latents", "t5_embeds", "clip_pooled", "sol_stats", "sol_spatial"):
            assert torch.equal(plain[index][name], half[index][name])
        a, b = plain[index]["lune"].float(), half[index]["lune"].float()
        assert not torch.equal(a, b) and (a - b).norm() <= 0.05 * a.norm()
    prints = [whole(Manifest.load(tmp_path / name).groups) for name in ("plain", "half")]
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"lune"}
    assert prints[1]["lune"]["dtype"] == "bfloat16"
    capsys.readouterr()
    assert run(tmp_path, "--out", tmp_path / "half", "--limit", 4, source="drawn") == 2
    assert "settings.model_dtype.lune: 'bfloat16' against None" in capsys.readouterr().err
    assert run(tmp_path, "--out", tmp_path / "x", "--model-dtype", "lena", "bfloat16", source="drawn") == 2
    assert "no such model: lena" in capsys.readouterr().err


def test_compiled_models_agree(tmp_path, monkeypatch, capsys):
    """--compile: features equal to 1e-3, and not mixed with those of an ordinary build.

    The compiler's last stage takes a minute for the UNets, so only the earlier stages run.
    """
    sources(tmp_path)
    graphs = []

    class Watched(ModelZoo):
        def compile(self):
            super().compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr("tinyflux.model.zoo.ModelZoo", Watched)
    args = ("--shard-size", 6, "--limit", 6)  # batches of 4 and 2
    assert run(tmp_path, "--out", tmp_path / "plain", *args, source="drawn") == 0
    assert not graphs
    assert run(tmp_path, "--out", tmp_path / "compiled", *args, "--compile", source="drawn") == 0
    assert len(graphs) > 6  # two encoders, Lune's blocks, Sol's
    plain, compiled = samples(tmp_path / "plain"), samples(tmp_path / "compiled")
    assert len(plain) == len(compiled) == 6
    for index in plain:
        for name in ("latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
            a, b = plain[index][name].float(), compiled[index][name].float()
            assert (a - b).abs().max() <= 1e-3 * max(1, a.abs().max()), name
    capsys.readouterr()
    assert run(tmp_path, "--out", tmp_path / "plain", *args, "--compile", source="drawn") == 2
    assert "settings.compile: None against True" in capsys.readouterr().err


def test_previews_are_the_training_picture(photos):
    file = open_source(photos / "out").open(0)
    picture = Image.open(io.BytesIO(file.read(0, "jpg")))
    with Image.open(photos / "images" / file.meta(0)["origin"]) as image:
        expected = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(picture, float) - np.asarray(expected, float)).mean() < 10
