"""--only: more groups or other captions for a finished source, as an overlay; the base never changes."""

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sharding import build, verify
from tests.builds import content, run, samples, sources
from tinyflux.model.zoo import TINY_DIR
from tinyflux.precache.extract import EXTRACTORS, Extractor
from tinyflux.shards.manifest import Manifest
from tinyflux.shards.source import open_source
from tinyflux.shards.tar import read_member, scan_tar

pytestmark = pytest.mark.usefixtures("alone")


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
    return run(folder, "--out", folder / out, "--from", folder / old, "--shard-size", 4, *options, zoo=zoo)


@pytest.fixture
def mine(built, tmp_path) -> Path:
    """A copy of the images and sources.toml, with copies of the built sources, that a test may change."""
    shutil.copytree(built / "images", tmp_path / "images")
    shutil.copy(built / "sources.toml", tmp_path)
    for name in ("full", "bare", "no-sol"):
        shutil.copytree(built / name, tmp_path / name)
    return tmp_path


def members(out: Path, extension: str) -> dict[str, bytes]:
    """The bytes of a member of every sample of a folder's own shards, by key."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with open(path, "rb") as file:
            for sample in scan_tar(path):
                if extension in sample.members:
                    found[sample.key] = read_member(file.fileno(), *sample.members[extension])
    return found


MEMBERS = {
    "latents": ["latents.safetensors.zst"],
    "text": ["text.0.safetensors.zst", "json"],
    "lune": ["lune.safetensors.zst"],
    "sol": ["sol.safetensors.zst"],
}


def assert_same(first: Path, second: Path) -> None:
    """The samples of two sources are the same, however many folders they lie in."""
    a, b = samples(first), samples(second)
    assert a.keys() == b.keys()
    for index, sample in a.items():
        assert sample.keys() == b[index].keys() and sample["meta"] == b[index]["meta"]
        assert all(torch.equal(sample[name], b[index][name]) for name in sample if name != "meta")


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
def test_it_gives_the_members_of_a_full_build(built, old, fields, same, capsys):
    before, out = content(built / old), f"{old}-{'-'.join(fields)}"
    assert redo(built, out, old, "--only", *fields) == 0
    assert_same(built / out, built / same)
    groups = {{"prompt": "text"}.get(field, field) for field in fields}
    assert set(Manifest.load(built / out).groups) == groups
    for group, extensions in MEMBERS.items():
        for extension in extensions:
            assert members(built / out, extension) == (members(built / same, extension) if group in groups else {})
    assert content(built / old) == before
    assert "5 samples in" in capsys.readouterr().out
    assert redo(built, out, old, "--only", *fields) == 0
    assert f"{out}: complete, 5 samples in" in capsys.readouterr().out
    assert verify.main([str(built / out), "--deep"]) == 0


def test_low_memory_gives_the_same(built):
    for name, options in (("taught", ()), ("low", ("--low-memory",))):
        assert redo(built, name, "bare", "--only", "lune", *options) == 0
    assert content(built / "low") == content(built / "taught")


def test_recaption_changes_texts_alone(mine):
    for i in (0, 2, 3, 8, 9):
        (mine / "images" / f"{i}.txt").write_text(f"a plain picture, shade {i}")
    assert redo(mine, "new", "full", "--only", "prompt") == 0
    old, new = samples(mine / "full"), samples(mine / "new")
    assert old.keys() == new.keys()
    for index in old:
        number = old[index]["meta"]["origin"][0]
        assert new[index]["meta"] == old[index]["meta"] | {"prompts": [f"a plain picture, shade {number}"]}
        assert not torch.equal(new[index]["t5_embeds"], old[index]["t5_embeds"])
        assert all(torch.equal(new[index][name], old[index][name]) for name in ("latents", "lune", "sol_stats"))
    assert build_to(mine, "again", "--no-lune", "--no-sol") == 0
    for extension in MEMBERS["text"]:
        assert members(mine / "new", extension) == members(mine / "again", extension)


def test_another_teacher(mine):
    """Sol of other weights: its group and its producer change, and nothing else."""
    zoo = Path(shutil.copytree(TINY_DIR, mine / "zoo", ignore=shutil.ignore_patterns("*.py", "__pycache__")))
    path = next((zoo / "sol").glob("*.safetensors"))
    save_file({name: tensor * 0.9 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert redo(mine, "new", "full", "--only", "sol", zoo=zoo) == 0
    old, new = open_source(mine / "full").groups, open_source(mine / "new").groups
    assert {name for name in old if old[name] != new[name]} == {"sol"}
    before, after = samples(mine / "full"), samples(mine / "new")
    assert all(not torch.equal(before[i]["sol_stats"], after[i]["sol_stats"]) for i in before)


def test_models_that_do_not_fit_what_is_kept_are_refused(mine, capsys):
    zoo = Path(shutil.copytree(TINY_DIR, mine / "zoo", ignore=shutil.ignore_patterns("*.py", "__pycache__")))
    path = next((zoo / "clip").glob("*.safetensors"))
    save_file({name: tensor * 0.9 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert redo(mine, "new", "bare", "--only", "lune", zoo=zoo) == 2
    assert "the new groups would not match the base" in (message := capsys.readouterr().err)
    assert "clip.sha256: " in message and not (mine / "new" / "manifest.json").exists()
    assert redo(mine, "both", "bare", "--only", "lune", "prompt", zoo=zoo) == 0  # all that CLIP made is made again


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda folder: (folder / "0.png").unlink(), "unreadable file: No such file"),
        (lambda folder: picture(folder / "2.png", 9), "image has changed: size and crop are"),
        (lambda folder: Image.new("RGB", (73, 80), (250, 250, 0)).save(folder / "3.png"), "unlike the preview"),
    ],
)
def test_images_that_are_gone_or_changed_are_refused(mine, capsys, change, reason):
    """An overlay has every row of its base, so none can be left out."""
    change(mine / "images")
    assert redo(mine, "new", "bare", "--only", "lune") == 2
    message = capsys.readouterr().err
    assert reason in message and "An overlay needs all rows of its base" in message
    assert not (mine / "new" / "manifest.json").exists()


def test_a_changed_image_without_a_preview_is_refused(mine, capsys):
    """The notes of the base's build tell, although size and crop are the same."""
    assert build_to(mine, "plain", "--no-lune", "--no-sol", "--no-preview") == 0
    Image.new("RGB", (73, 80), (250, 250, 0)).save(mine / "images" / "3.png")
    assert redo(mine, "new", "plain", "--only", "lune") == 2
    assert "3.png (sample" in (message := capsys.readouterr().err) and "its bytes have another hash" in message


def test_captions_of_other_rows_are_refused(tmp_path, monkeypatch, capsys):
    """The origin of a dataset's row is its number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = []
    for i in range(3):
        picture(tmp_path / "x.png", i)
        rows.append({"image": (tmp_path / "x.png").read_bytes(), "text": f"number {i}"})
    (tmp_path / "images").mkdir()
    sources(tmp_path, kind="hf")
    datasets.Dataset.from_list(rows[1:]).to_parquet(tmp_path / "images" / "train.parquet")
    assert build_to(tmp_path, "old", "--no-lune", "--no-sol") == 0
    datasets.Dataset.from_list([rows[1], rows[2] | {"text": "new"}]).to_parquet(tmp_path / "images" / "train.parquet")
    assert redo(tmp_path, "new", "old", "--only", "prompt") == 0
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "images" / "train.parquet")
    assert redo(tmp_path, "wrong", "old", "--only", "prompt") == 2
    assert "image has changed: its bytes have another hash" in capsys.readouterr().err


def test_all_captions_of_an_image(tmp_path):
    """Their number may change; what the teachers saw may not, unless they are asked for, too."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", i)
        (tmp_path / "images" / f"{i}.txt").write_text(f"first {i}\nsecond {i}\n")
    (tmp_path / "sources.toml").write_text(
        '[photos]\nkind = "imagefolder"\ndataset_id = 7\nlocation = "images"\ncaptions = "all"\n'
    )
    assert run(tmp_path, "--out", tmp_path / "old", "--shard-size", 4, "--no-lune", "--no-sol") == 0
    assert Manifest.load(tmp_path / "old").index.captions.tolist() == [2, 2, 2]
    (tmp_path / "images" / "1.txt").write_text("new first\nnew second\nand third\n")
    (tmp_path / "images" / "2.txt").write_text("just one\n")
    assert redo(tmp_path, "new", "old", "--only", "prompt") == 0
    prompts = {s["meta"]["origin"]: s["meta"]["prompts"] for s in samples(tmp_path / "new").values()}
    assert prompts == {
        "0.png": ["first 0", "second 0"],
        "1.png": ["new first", "new second", "and third"],
        "2.png": ["just one"],
    }
    assert sorted(Manifest.load(tmp_path / "new").index.captions) == [1, 2, 3]
    assert verify.main([str(tmp_path / "new"), "--deep"]) == 0


def test_of_a_source_without_its_builds_notes(mine):
    shutil.rmtree(mine / "bare" / ".build")
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    assert_same(mine / "new", mine / "no-sol")


def test_it_resumes_where_it_was_stopped(mine, capsys):
    """A shard and the manifest are lost: only this shard is built again."""
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    whole = content(mine / "new")
    last = Manifest.load(mine / "new").shards[-1]
    for name in ("manifest.json", last.name, f".build/{last.name[7:13]}.json"):
        (mine / "new" / name).unlink()
    (mine / "new" / f".{last.name}.tmp").write_bytes(b"half a shard")
    capsys.readouterr()
    assert build_to(mine, "new", "--no-sol") == 2
    assert "this build was started with --only: finish it with the same command" in capsys.readouterr().err
    assert redo(mine, "new", "bare", "--only", "sol") == 2
    assert "only.groups: ['lune'] against ['sol']" in capsys.readouterr().err
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    assert f"this run: {last.count} images" in capsys.readouterr().out
    assert content(mine / "new") == whole


def test_versions_of_an_extractor_do_not_mix(mine, monkeypatch, capsys):
    def mask(run):
        return [{"mask": torch.ones(len(batch.prompts), 8, 8)} for batch in run.batches]

    for version, status in (("1", 0), ("2", 2)):
        monkeypatch.setitem(EXTRACTORS, "mask", Extractor(mask, (), version=version))
        assert redo(mine, "new", "bare", "--only", "mask") == status
        (mine / "new" / "manifest.json").unlink(missing_ok=True)  # as of a build that was stopped
    assert "producers.mask.mask_version: '1' against '2'" in capsys.readouterr().err


def test_it_is_repaired(mine, capsys):
    """A lost manifest is rebuilt by the build's notes, a damaged shard is set aside and made again: the same bytes."""
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    whole, shard = content(mine / "new"), Manifest.load(mine / "new").shards[0].name
    for name in ("manifest.json", "index.safetensors"):
        (mine / "new" / name).unlink()
    assert verify.main([str(mine / "new"), "--repair", "--deep"]) == 0
    assert content(mine / "new") == whole
    data = bytearray((mine / "new" / shard).read_bytes())
    data[700] ^= 1
    (mine / "new" / shard).write_bytes(data)
    assert verify.main([str(mine / "new"), "--repair", "--deep"]) == 1
    assert "1 shards are set aside" in capsys.readouterr().out and not (mine / "new" / shard).exists()
    assert redo(mine, "new", "bare", "--only", "lune") == 0
    shutil.rmtree(mine / "new" / "bad")
    assert content(mine / "new") == whole


@pytest.mark.parametrize(
    "options, message",
    [
        (("--from", "nowhere"), "nowhere: not a finished source"),
        (("--from", "hf://datasets/a/b"), "must be a local folder"),
        (("--from", "bare", "--out", "bare"), "is the base itself"),
        (("--from", "bare", "--out", "full"), "was started with"),
        (("--from", "bare", "--only", "latents"), "--only latents: Accepted here: lune, prompt, sol"),
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
    assert "An overlay needs all rows of its base" in capsys.readouterr().err
    shutil.rmtree(mine / "bare" / ".build")
    assert redo(mine, "new", "bare", "--only", "lune") == 2
    assert "has none of the images of" in capsys.readouterr().err
    (mine / "sources.toml").write_text(text)
    bad = Path(shutil.copytree(mine / "bare", mine / "bad"))
    tar = next(bad.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:3000])
    assert redo(mine, "new", "bad", "--only", "lune") == 2
    assert tar.name in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--only", "lune"), "--only needs --out"),
        (("--out", "x", "--from", "y"), "--from goes with --only"),
        (("--only", "lune", "--out", "x", "--limit", "3"), "leave out --limit"),
        (("--only", "lune", "--out", "x", "--append", "--no-sol"), "leave out --append, --no-sol"),
    ],
)
def test_impossible_arguments(capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        build.main(["--source", "photos", *options])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
