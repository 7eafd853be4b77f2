"""Building sources with the tiny zoo: real photographs, bad input, changed settings, and other readers."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
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
from tests.builds import content, run, samples, sources, whole
from tinyflux.model.zoo import ModelZoo
from tinyflux.precache.config import BuildConfig
from tinyflux.precache.engine import check_tensors
from tinyflux.precache.images import Rejected
from tinyflux.precache.ledger import LedgerError
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.schema import fields_of, flat
from tinyflux.shards.source import open_source

pytestmark = pytest.mark.usefixtures("alone")
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


def test_a_new_option_is_one_of_the_settings(photos):
    @dataclass
    class More(BuildConfig):
        sharpen: bool = False

    options = {"sources": str(photos / "sources.toml"), "out": str(photos / "out"), "zoo": "tiny", "device": "cpu"}
    more = More("photos", **options, threads=1, batch_size=4, shard_size=8, sharpen=True)
    with pytest.raises(LedgerError, match=r"settings.sharpen: None against True\nUse"):
        build.build(more)


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
        (("--shapes", "0x64"), "it must be square, auto or WIDTHxHEIGHT"),
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


def test_previews_are_the_training_picture(photos):
    file = open_source(photos / "out").open(0)
    picture = Image.open(io.BytesIO(file.read(0, "jpg")))
    with Image.open(photos / "images" / file.meta(0)["origin"]) as image:
        expected = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(picture, float) - np.asarray(expected, float)).mean() < 10
