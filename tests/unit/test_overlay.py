"""--only: fields of a finished source made anew, the rest copied; the old source is never touched."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sharding import build, verify
from tests.unit.test_build import content, run, samples
from tinyflux.model.zoo import TINY_DIR
from tinyflux.precache.extract import whole
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import open_source


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def picture(path: Path, i: int) -> None:
    Image.new("RGB", (70 + i, 80), (20 * i, 255 - 20 * i, 90)).resize((70 + i, 80)).save(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Ten images, of which number 1 has no caption and 4 to 7 are all bad: sources `full`, `bare` and `no-sol`."""
    folder = tmp_path_factory.mktemp("only")
    (folder / "images").mkdir()
    for i in range(10):
        if 4 <= i < 8:
            (folder / "images" / f"{i}.png").write_bytes(b"no image")
        else:
            picture(folder / "images" / f"{i}.png", i)
        if i != 1:
            (folder / "images" / f"{i}.txt").write_text(f"colour number {i}")
    (folder / "sources.toml").write_text('[photos]\nkind = "imagefolder"\ndataset_id = 7\nlocation = "images"\n')
    for name, options in (("full", ()), ("bare", ("--no-lune", "--no-sol")), ("no-sol", ("--no-sol",))):
        assert build_to(folder, name, *options) == 0
    return folder


def build_to(folder: Path, out: str, *options: object, zoo="tiny") -> int:
    return run(folder, "--out", folder / out, "--shard-size", 4, "--max-rejected", 0.6, *options, zoo=zoo)


def redo(folder: Path, out: str | Path, old: str, *options: object, zoo="tiny") -> int:
    """`--only` from a source of the folder."""
    common = ("--out", folder / out, "--from", folder / old, "--max-rejected", 0.6)
    return run(folder, *common, *options, zoo=zoo)


@pytest.fixture
def mine(built, tmp_path) -> Path:
    """A copy of the images and sources.toml, with links to the built sources, that a test may change."""
    shutil.copytree(built / "images", tmp_path / "images")
    shutil.copy(built / "sources.toml", tmp_path)
    for name in ("full", "bare", "no-sol"):
        (tmp_path / name).symlink_to(built / name)
    return tmp_path


def members(out: Path, extension: str) -> dict[str, bytes]:
    """The bytes of a member of every sample, by key."""
    source = open_source(out)
    files = [source.open(k) for k in range(len(source.manifest.shards))]
    return {file.key(row): file.read(row, extension) for file in files for row in range(file.count)}


LATENTS, TEXT, LUNE, SOL = (f"{group}.safetensors.zst" for group in ("latents", "text.0", "lune", "sol"))


@pytest.mark.parametrize(
    "old, fields, same",
    [
        ("bare", ("lune",), "no-sol"),
        ("bare", ("lune", "sol"), "full"),
        ("no-sol", ("sol",), "full"),
        ("full", ("sol",), "full"),
        ("full", ("prompt", "lune", "sol"), "full"),
        ("bare", ("prompt",), "bare"),
    ],
)
def test_it_gives_the_bytes_of_a_full_build(built, old, fields, same, capsys):
    before, out = content(built / old), f"{old}-{'-'.join(fields)}"
    assert redo(built, out, old, "--only", *fields) == 0
    assert content(built / out) == content(built / same)
    assert content(built / old) == before
    assert "5 samples in 2 shards" in capsys.readouterr().out
    assert redo(built, out, old, "--only", *fields) == 0
    assert f"{out}: complete, 5 samples in 2 shards" in capsys.readouterr().out
    assert verify.main([str(built / out), "--deep"]) == 0


def test_what_it_makes_is_a_source_that_grows_like_any(mine, capsys):
    assert redo(mine, "new", "bare", "--only", "lune", "sol") == 0
    assert build_to(mine, "new") == 0  # a full build of the same settings has nothing to do
    assert "complete, 5 samples" in capsys.readouterr().out
    picture(mine / "images" / "z.png", 3)
    (mine / "images" / "z.txt").write_text("one more")
    assert build_to(mine, "new", "--append") == 0
    assert Manifest.load(mine / "new").count == 6 and "lune" in samples(mine / "new")[12]


def test_low_memory_gives_the_same(mine):
    assert redo(mine, "new", "bare", "--only", "lune", "--low-memory") == 0
    assert content(mine / "new") == content(mine / "no-sol")


def test_recaption_changes_texts_alone(mine):
    for i in (0, 2, 3, 8, 9):
        (mine / "images" / f"{i}.txt").write_text(f"a plain picture, shade {i}")
    assert redo(mine, "new", "full", "--only", "prompt") == 0
    for extension in (LUNE, SOL, "jpg"):
        assert members(mine / "new", extension) == members(mine / "full", extension)
    old, new = samples(mine / "full"), samples(mine / "new")
    assert old.keys() == new.keys()
    for index in old:
        assert new[index]["meta"] == old[index]["meta"] | {"prompts": [f"a plain picture, shade {index}"]}
        assert torch.equal(new[index]["latents"], old[index]["latents"])
        assert not torch.equal(new[index]["t5_embeds"], old[index]["t5_embeds"])
        assert not torch.equal(new[index]["clip_pooled"], old[index]["clip_pooled"])
    assert build_to(mine, "anew", "--no-lune", "--no-sol") == 0
    for extension in (LATENTS, TEXT):
        assert members(mine / "new", extension) == members(mine / "anew", extension)
    assert members(mine / "new", "json") == members(mine / "anew", "json")


def test_another_teacher(mine):
    """Sol of other weights: its member and its part of the fingerprint change, and nothing else."""
    zoo = Path(shutil.copytree(TINY_DIR, mine / "zoo", ignore=shutil.ignore_patterns("*.py", "__pycache__")))
    path = next((zoo / "sol").glob("*.safetensors"))
    save_file({name: tensor * 0.9 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert redo(mine, "new", "full", "--only", "sol", zoo=zoo) == 0
    for extension in (LATENTS, TEXT, LUNE, "json", "jpg"):
        assert members(mine / "new", extension) == members(mine / "full", extension)
    assert members(mine / "new", SOL) != members(mine / "full", SOL)
    old, new = (whole(Manifest.load(mine / name).groups) for name in ("full", "new"))
    assert {name for name in old if old[name] != new[name]} == {"sol"}
    assert (mine / "new" / "null.safetensors").read_bytes() == (mine / "full" / "null.safetensors").read_bytes()


def test_models_that_do_not_fit_what_is_kept_are_refused(mine, capsys):
    zoo = Path(shutil.copytree(TINY_DIR, mine / "zoo", ignore=shutil.ignore_patterns("*.py", "__pycache__")))
    path = next((zoo / "clip").glob("*.safetensors"))
    save_file({name: tensor * 0.9 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert redo(mine, "new", "bare", "--only", "lune", zoo=zoo) == 2
    assert "what is made anew would not fit what is kept" in (message := capsys.readouterr().err)
    assert "clip.sha256: " in message and not (mine / "new" / "manifest.json").exists()
    assert redo(mine, "both", "bare", "--only", "lune", "prompt", zoo=zoo) == 0  # all that CLIP made is made anew


def test_images_that_are_gone_or_changed_are_left_out(mine, capsys):
    (mine / "images" / "0.png").unlink()
    (mine / "images" / "0.txt").unlink()
    picture(mine / "images" / "2.png", 9)  # another size
    Image.new("RGB", (73, 80), (250, 250, 0)).save(mine / "images" / "3.png")  # the same size, another picture
    assert redo(mine, "new", "bare", "--only", "lune") == 1  # 8 of 10 inputs
    rejected = [json.loads(line) for line in (mine / "new" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in rejected] == [0, 1, 2, 3, 4, 5, 6, 7]
    reasons = {entry["index"]: entry["reason"] for entry in rejected}
    assert reasons[0].startswith("image is gone") and reasons[1] == "missing caption"
    assert reasons[2].startswith("image has changed: size and crop") and "unlike the sample's preview" in reasons[3]
    assert sorted(samples(mine / "new")) == [8, 9] and "more than --max-rejected" in capsys.readouterr().err


def test_all_captions_of_an_image(tmp_path):
    """Samples of one image keep to their caption, by its place."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", i)
        (tmp_path / "images" / f"{i}.txt").write_text(f"first {i}\nsecond {i}\n")
    (tmp_path / "sources.toml").write_text(
        '[photos]\nkind = "imagefolder"\ndataset_id = 7\nlocation = "images"\ncaptions = "all"\n'
    )
    assert run(tmp_path, "--out", tmp_path / "old", "--shard-size", 4, "--no-lune", "--no-sol") == 0
    (tmp_path / "images" / "1.txt").write_text("new first\nnew second\n")
    (tmp_path / "images" / "2.txt").write_text("just one\n")
    assert redo(tmp_path, "new", "old", "--only", "prompt") == 0
    prompts = {index: sample["meta"]["prompts"][0] for index, sample in samples(tmp_path / "new").items()}
    assert prompts == {0: "first 0", 1: "second 0", 2: "new first", 3: "new second", 4: "just one"}
    assert "its image had caption 2, now there are 1" in (tmp_path / "new" / "rejected.jsonl").read_text()
    pulled = Path(shutil.copytree(tmp_path / "old", tmp_path / "pulled", ignore=shutil.ignore_patterns(".build")))
    assert redo(tmp_path, "other", pulled, "--only", "prompt") == 2
    assert redo(tmp_path, "taught", pulled, "--only", "lune") == 0  # needs no captions


def test_of_a_source_without_its_builds_notes(mine):
    shutil.copytree(mine / "bare", mine / "pulled", ignore=shutil.ignore_patterns(".build"))
    assert redo(mine, "new", "pulled", "--only", "lune", "--shard-size", 4) == 0
    assert content(mine / "new") == content(mine / "no-sol")


def test_it_goes_on_where_it_was_stopped(mine, capsys):
    """A shard of three is lost, with the manifest: it alone is made again; other ranks take their share."""
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    whole = content(mine / "new")
    for name in ("manifest.json", "photos-000002.tar", ".build/000002.json"):
        (mine / "new" / name).unlink()
    (mine / "new" / ".photos-000002.tar.tmp").write_bytes(b"half a shard")
    capsys.readouterr()
    assert build_to(mine, "new", "--no-sol") == 2
    assert "was begun with --only: finish it by the same command" in capsys.readouterr().err
    assert redo(mine, "new", "bare", "--only", "sol") == 2
    assert "only.fields: ['lune'] against ['sol']" in capsys.readouterr().err
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    assert "this run: 2 images" in capsys.readouterr().out
    assert content(mine / "new") == whole


@pytest.mark.parametrize(
    "options, message",
    [
        (("--from", "nowhere"), "nowhere: no finished source is there"),
        (("--from", "hf://datasets/a/b"), "must be a folder here"),
        (("--from", "bare", "--out", "bare"), "is the old source"),
        (("--from", "bare", "--out", "full"), "only.from"),
        (("--from", "bare", "--seed", 3), "seed: 0 against 3"),
        (("--from", "bare", "--dtype", "bfloat16"), "dtype: 'float16' against 'bfloat16'"),
        (("--from", "no-sol", "--only", "sol", "--teacher-input", "noise"), "teacher_input: 'image' against 'noise'"),
    ],
)
def test_what_cannot_be_is_refused(mine, monkeypatch, capsys, options, message):
    monkeypatch.chdir(mine)
    before = content(mine / "bare")
    assert run(mine, "--out", "new", "--only", "lune", *options) == 2
    assert message in capsys.readouterr().err
    assert not (mine / "new" / "manifest.json").exists() and content(mine / "bare") == before


def test_a_source_of_another_place_or_damaged(mine, capsys):
    text = (mine / "sources.toml").read_text()
    (mine / "sources.toml").write_text(text.replace("dataset_id = 7", "dataset_id = 6"))
    assert redo(mine, "new", "bare", "--only", "lune") == 2
    assert "is [photos] with dataset_id 7" in capsys.readouterr().err
    (mine / "sources.toml").write_text(text.replace('location = "images"', 'location = "elsewhere"'))
    (mine / "elsewhere").mkdir()
    picture(mine / "elsewhere" / "x.png", 1)
    assert redo(mine, "new", "bare", "--only", "lune") == 2
    assert "has none of the images of" in capsys.readouterr().err
    (mine / "sources.toml").write_text(text)
    bad = Path(shutil.copytree(mine / "bare", mine / "bad"))
    data = bytearray((bad / "photos-000000.tar").read_bytes())
    data[700] ^= 1
    (bad / "photos-000000.tar").write_bytes(data)
    assert redo(mine, "new", "bad", "--only", "lune") == 2
    assert "its sha256 is not the manifest's, so nothing is copied from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--only", "lune"), "--only needs --out"),
        (("--out", "x", "--from", "y"), "--from goes with --only"),
        (("--only", "lune", "--out", "x", "--limit", "3"), "leave out --limit"),
        (("--only", "lune", "--out", "x", "--append", "--no-sol"), "leave out --append, --no-sol"),
        (("--only", "latents", "--out", "x"), "invalid choice"),
    ],
)
def test_impossible_arguments(capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        build.main(["--source", "photos", *options])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
