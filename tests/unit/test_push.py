"""Pushing sources to a loopback hub with the real client, in separate processes, and pulling them again."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard
from huggingface_hub import DatasetCard, HfFileSystem, constants

from sharding import pull, push, verify
from tests.dataset_hub import TOKEN, commit_id, dataset_hub
from tests.make_source import make_source, make_tensors
from tests.store_server import store_server
from tinyflux.precache import card
from tinyflux.precache import push as pushing
from tinyflux.shards import remote
from tinyflux.shards.manifest import Base, Manifest
from tinyflux.shards.source import open_source

ROOT = Path(__file__).parents[2]
REPO = "user/pictures"


@pytest.fixture
def hub():
    with dataset_hub() as hub:
        yield hub


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "portraits")


class Client:
    """The commands with the hub as their endpoint; `token` None is a user who is not logged in."""

    def __init__(self, hub, home: Path, monkeypatch):
        self.monkeypatch = monkeypatch
        self.env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def _run(self, command, args: tuple, token: str | None) -> subprocess.CompletedProcess:
        self.monkeypatch.setenv("HF_TOKEN", token or "")
        HfFileSystem.clear_instance_cache()  # it remembers endpoint and token
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = command.main(list(map(str, args)))
        return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())

    def push(self, source: Path, *args: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
        return self._run(push, (source, "--repo", REPO, *args), token)

    def pull(self, url: str, out: Path, *args: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
        return self._run(pull, (url, out, *args), token)

    def process(self, *args: object) -> subprocess.CompletedProcess:
        """Python in a separate process, as a user starts it."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | self.env | {"HF_TOKEN": TOKEN}
        return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    return Client(hub, tmp_path / "hf", monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_push_again_changed_and_pull(hub, client, source, tmp_path):
    done = client.push(source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"hf://datasets/{REPO}/portraits"
    files = hub.files(REPO)
    expected = {f"portraits/{name}": data for name, data in contents(source).items()}
    assert {name: files[name] for name in expected} == expected
    assert REPO not in hub.private and len(hub.repos[REPO]) == 2, "three shards fit into one commit"

    done = client.push(source)
    assert done.returncode == 0 and "0 of 3 shards sent" in done.stdout
    assert len(hub.repos[REPO]) == 2, "nothing changed, so nothing was committed"

    make_source(source, (5, 3, 2), producer={"vae": {"revision": "new"}})  # the last shard is another one now
    (source / "portraits-000001.tar").unlink()
    kept = Manifest.load(source)
    kept.without({"portraits-000001.tar"}).save(source)
    objects = set(hub.lfs)
    done = client.push(source)
    assert done.returncode == 0 and "1 of 2 shards sent, 1 removed" in done.stdout, done.stderr
    shards = set(hub.lfs) - objects - {hashlib.sha256(hub.files(REPO)["portraits/preview.jpg"]).hexdigest()}
    assert shards == {kept.shards[2].sha256}
    assert "portraits/portraits-000001.tar" not in hub.files(REPO)

    first = f"@{commit_id(REPO, 1)}"
    for revision, counts in (("", [5, 2]), (first, [5, 3, 4]), ("", [5, 2])):  # forth and back in one folder
        done = client.pull(f"hf://datasets/{REPO}{revision}/portraits", tmp_path / "copy")
        assert done.returncode == 0, done.stderr
        assert [shard.count for shard in Manifest.load(tmp_path / "copy").shards] == counts
    assert "1 of them downloaded" in done.stdout
    assert contents(tmp_path / "copy") == contents(source)


def test_the_card_has_one_config_a_source_and_keeps_what_people_wrote(hub, client, source, tmp_path):
    assert client.push(source).returncode == 0
    text = hub.files(REPO)["README.md"].decode()
    written = text.replace("configs:", "license: cc-by-4.0\nconfigs:", 1).replace(
        "# pictures", "# pictures\n\nBy hand."
    )
    hub.repos[REPO].append(hub.files(REPO) | {"README.md": f"{written}\nAlso by hand.\n".encode()})
    other = make_source(tmp_path / "other", (2,), dataset_id=7, groups=("latents", "text"))
    done = client.push(other)
    assert done.returncode == 0, done.stderr
    found = DatasetCard(hub.files(REPO)["README.md"].decode())
    data = found.data.to_dict()
    assert data["license"] == "cc-by-4.0" and "webdataset" in data["tags"]
    assert data["configs"] == [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.tar"}]}
        for name in ("other", "portraits")
    ]
    assert "By hand." in found.text and found.text.rstrip().endswith("Also by hand.")
    assert found.text.count("## portraits") == found.text.count("## other") == 1
    assert "| `lune` | float16 | 10, 6 |" in found.text and '"revision": "abc"' in found.text
    assert "![previews of other](other/preview.jpg)" in found.text
    assert hub.files(REPO)["other/preview.jpg"].startswith(b"\xff\xd8")


def test_datasets_loads_a_config_of_what_the_command_pushed(client, source):
    done = client.process("-m", "sharding.push", source, "--repo", REPO)
    assert done.returncode == 0, done.stderr
    code = f"""
import json, datasets, safetensors.torch
rows = datasets.load_dataset("{REPO}", "portraits", split="train", streaming=True)
for row in rows:
    tensors = safetensors.torch.load(row["text.0.safetensors.zst"])
    print(json.dumps([row["__key__"], row["json"]["prompts"], sorted(tensors)]))
"""
    done = client.process("-c", code)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == [[f"prompt {i}.0"] for i in range(12)]
    assert rows[0][0].endswith("0001_000000000") and rows[0][2][:2] == ["clip_pooled.0", "clip_pooled.1"]


def test_a_stopped_push_goes_on_and_readers_never_see_half_of_it(hub, client, source):
    hub.fail_after = 1
    done = client.push(source)
    assert done.returncode == 1 and "error: " in done.stderr
    assert len(hub.lfs) == 1 and "portraits/manifest.json" not in hub.files(REPO)
    arrived, hub.fail_after = set(hub.lfs), 1 << 30
    done = client.push(source)
    assert done.returncode == 0, done.stderr
    assert arrived < set(hub.lfs) and "portraits/manifest.json" in hub.files(REPO)


def test_new_shards_are_committed_as_they_come_replaced_ones_with_the_manifest(hub, client, source, monkeypatch):
    monkeypatch.setattr(pushing, "COMMIT", 1)
    assert client.push(source).returncode == 0
    sizes = [sum(name.endswith(".tar") for name in files) for files in hub.repos[REPO]]
    assert sizes == [0, 1, 2, 3, 3]
    make_source(source, (5, 4, 3, 1))  # two shards replaced, one new
    assert client.push(source).returncode == 0
    new, last = hub.repos[REPO][-2:]
    before = hub.repos[REPO][-3]
    assert {name for name in new if new[name] != before.get(name)} == {"portraits/portraits-000003.tar"}
    changed = {name for name in last if last[name] != new.get(name)}
    assert {"portraits/portraits-000001.tar", "portraits/portraits-000002.tar", "portraits/manifest.json"} <= changed


def test_private_and_tokens(hub, client, source):
    done = client.push(source, token=None)
    assert done.returncode == 1 and "set HF_TOKEN or run `hf auth login`" in done.stderr
    assert not hub.repos
    done = client.push(source, "--private")
    assert done.returncode == 0 and hub.private == {REPO}
    assert TOKEN not in done.stdout + done.stderr
    done = client.pull(f"hf://datasets/{REPO}/portraits", source.parent / "copy", token=None)
    assert done.returncode == 1 and "error: " in done.stderr
    hub.private.clear()
    done = client.push(source, "--private")
    assert done.returncode == 2 and "is a public repo, but --private was given" in done.stderr


# what is done to a source -> what is said; nothing is sent
SPOILT = {
    "missing": (lambda folder: (folder / "portraits-000001.tar").unlink(), "portraits-000001.tar: missing"),
    "size": (lambda folder: (folder / "portraits-000001.tar").write_bytes(b"x"), "1 bytes, the manifest says"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_damaged_source_is_not_pushed(source, capsys, what):
    spoil, message = SPOILT[what]
    spoil(source)
    assert push.main([str(source), "--repo", REPO]) == 2
    assert message in capsys.readouterr().err


def test_a_flipped_bit_is_found_before_it_is_sent(hub, client, source):
    data = bytearray((source / "portraits-000001.tar").read_bytes())
    data[5000] ^= 1
    (source / "portraits-000001.tar").write_bytes(data)
    done = client.push(source)
    assert done.returncode == 2 and "its content is not what the manifest says" in done.stderr
    assert not hub.lfs


def test_a_source_that_is_built_again_during_a_push_is_not_mixed(hub, client, source, monkeypatch):
    sheet = pushing.contact_sheet
    monkeypatch.setattr(pushing, "contact_sheet", lambda opened: make_source(source, (5, 3, 4, 2)) and sheet(opened))
    done = client.push(source)
    assert done.returncode == 2 and "manifest.json: was replaced during the push; run the same" in done.stderr
    assert "portraits/manifest.json" not in hub.files(REPO)


def test_pull_does_not_mix_sources(hub, client, source, tmp_path):
    assert client.push(source).returncode == 0
    other = make_source(tmp_path / "other", (2,), name="other", dataset_id=7)
    before = contents(other)
    done = client.pull(f"hf://datasets/{REPO}/portraits", other)
    assert done.returncode == 2 and "choose another folder" in done.stderr
    assert contents(other) == before


def test_text_in_a_fingerprint_cannot_leave_its_block(source):
    manifest = Manifest.load(source)
    nasty = {"location": "```\n# gotcha\n<script>alert(1)</script>"}
    manifest.groups = {name: replace(group, producer=nasty) for name, group in manifest.groups.items()}
    lines = card.section(REPO, "portraits", manifest, preview=False).splitlines()
    found = [line for line in lines if "gotcha" in line or "script" in line]
    assert found and all(line.startswith("    ") for line in found)


@pytest.fixture
def layered(tmp_path):
    """A source with two shapes and several captions, an overlay with other captions, and on it one with a mask."""
    options = {"counts": [3, 2], "shapes": ((4, 4), (2, 8))}
    base = make_source(tmp_path / "portraits", captions=[1, 3], **options)
    text = make_source(tmp_path / "portraits-text", base=base, groups=("text",), captions=2, seed=3, **options)
    mask = make_source(tmp_path / "portraits-mask", base=text, groups=("mask",), **options)
    (mask / "rejected.jsonl").write_text('{"index": 7, "origin": "/home/me/secret.png", "reason": "too small"}\n')
    return base, text, mask


def test_overlays_go_beside_their_bases_and_come_back(hub, client, layered, tmp_path):
    base, text, mask = layered
    done = client.push(mask)
    assert done.returncode == 2 and "has no portraits-text/manifest.json" in done.stderr
    assert "push the base first" in done.stderr and hub.files(REPO).keys() == {".gitattributes"}
    for source in layered:
        done = client.push(source)
        assert done.returncode == 0 and f"hf://datasets/{REPO}/{source.name}" in done.stdout, done.stderr
    files = hub.files(REPO)
    assert {f"{source.name}/portraits-000000.tar" for source in layered} <= files.keys()
    assert "portraits-mask/null.safetensors" not in files and "portraits-text/null.safetensors" in files
    assert not any(name.endswith("rejected.jsonl") for name in files)
    card_text = files["README.md"].decode()
    assert "An overlay: it adds `mask` to the samples of its base, `../portraits-text`" in card_text
    assert "Latent shapes h x w: 2 x 8: 2, 4 x 4: 3 samples" in card_text and "Up to 3 captions per sample" in card_text
    code = f"""
from tinyflux.shards.source import open_source
source = open_source("hf://datasets/{REPO}/portraits-mask")
print(source.captions.tolist(), sorted(source.open(1).decode(1)))
"""
    done = client.process("-c", code)
    assert done.returncode == 0 and "[2, 2, 2, 2, 2]" in done.stdout and "'lune', 'mask'" in done.stdout, done.stderr

    url, out = f"hf://datasets/{REPO}/portraits-mask", tmp_path / "copy" / "mask"
    done = client.pull(url, out)  # alone: it says what else is needed
    wanted = f"python -m sharding.pull hf://datasets/{REPO}/portraits-text {tmp_path / 'copy/portraits-text'}"
    assert done.returncode == 0, done.stderr
    assert f"its base is not at {tmp_path / 'copy/portraits-text'}; run: {wanted}" in done.stdout
    done = client.pull(url, out, "--base")
    assert done.returncode == 0 and "0 of them downloaded" in done.stdout, done.stderr
    for source in layered[:2]:
        assert contents(tmp_path / "copy" / source.name) == contents(source)
    assert verify.main([str(out), "--deep"]) == 0
    assert sorted(open_source(out).open(0).decode(0)) == sorted(open_source(mask).open(0).decode(0))
    done = client.pull(f"hf://datasets/{REPO}/portraits", out)
    assert done.returncode == 2 and "holds overlay on 'portraits' with dataset id 1 (mask)" in done.stderr

    make_source(base, [3, 2], shapes=((4, 4), (2, 8)), captions=[1, 3], producer={"vae": {"revision": "new"}})
    done = client.push(base)
    assert done.returncode == 0
    done = client.push(text)
    assert done.returncode == 2 and "has changed since the overlay was made" in done.stderr


def test_what_overlays_a_push_breaks_is_said(hub, client, layered, caplog):
    for source in layered[:2]:
        assert client.push(source).returncode == 0
    make_source(layered[0], [3, 2], shapes=((4, 4), (2, 8)), captions=[1, 3], producer={"vae": {"revision": "new"}})
    hub.repos[REPO].append(hub.files(REPO) | {"theirs/manifest.json": b"<html>", "theirs/index.safetensors": b"?"})
    assert client.push(layered[0]).returncode == 0
    assert f"{REPO}/portraits-text was built for the old portraits and is unreadable" in caplog.text
    assert "theirs is left out of the card" in caplog.text


def test_rejected_is_sent_when_asked_for(hub, client, layered):
    for source in layered:
        assert client.push(source, "--rejected").returncode == 0
    assert b"secret" in hub.files(REPO)["portraits-mask/rejected.jsonl"]


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_card_is_valid_and_its_line_joins_planes(hub, client, tmp_path, dtype):
    source = make_source(tmp_path / "portraits", (2,), dtype=DTYPES[dtype])
    assert client.push(source, "--license", "cc-by-4.0").returncode == 0
    found = DatasetCard(hub.files(REPO)["README.md"].decode())
    found.validate()
    data = found.data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["task_categories"] == ["text-to-image"]
    assert data["size_categories"] == ["n<1K"]
    with tarfile.open(source / "portraits-000000.tar") as tar:
        compressed = tar.extractfile("0001_000000001.latents.safetensors.zst").read()
    lines = [line.strip() for line in found.text.splitlines() if line.startswith("    ")]
    begin = next(i for i, line in enumerate(lines) if line.startswith("x = "))
    names = {"np": np, "safetensors": safetensors, "zstandard": zstandard, "data": compressed}
    exec(lines[begin], names)
    joined = eval(lines[begin + 1], names)  # noqa: S307
    expected = make_tensors(1, DTYPES[dtype])["latents"]
    assert joined.shape == (4, 4, 4) and torch.equal(torch.from_numpy(joined.copy()).to(DTYPES[dtype]), expected)


def test_sizes_of_cards():
    sizes = [card.size_category(n) for n in (0, 999, 1000, 10**6 - 1, 10**9, 10**12)]
    assert sizes == ["n<1K", "n<1K", "1K<n<10K", "100K<n<1M", "1B<n<10B", "n>1T"]


FILES = ["manifest.json", "index.safetensors", "null.safetensors", "portraits-000001.tar"]


@pytest.mark.parametrize("fault", ["page", "short", "no length", "cut"])
def test_damaged_answers_are_not_published(source, tmp_path, monkeypatch, capsys, fault):
    """They are requested once more; if the store sends the page again, the folder has no manifest, and resumes."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    (source / "rejected.jsonl").write_text('{"index": 7, "origin": "a", "reason": "too small"}\n')
    with store_server(tmp_path) as server:
        url, out = f"{server.url}/portraits", tmp_path / "copy"
        for name in ("manifest.json", "null.safetensors") if fault == "page" else ():
            server.faults[name].extend(["page"] * 9)
            assert pull.main([url, str(out)]) == 1
            assert name in capsys.readouterr().err and not (out / "manifest.json").exists()
            server.faults[name].clear()
        for name in [*FILES, "rejected.jsonl"]:
            server.faults[name].append(fault)
        assert pull.main([url, str(out)]) == 0
        assert contents(out) == contents(source) and verify.main([str(out), "--deep"]) == 0
        (out / "rejected.jsonl").unlink()
        server.faults["rejected.jsonl"].extend(["page"] * 9)  # of a server that says 200 to everything
        assert pull.main([url, str(out)]) == 0 and not (out / "rejected.jsonl").exists()


def test_a_pull_that_stopped_before_the_manifest(hub, client, source, tmp_path):
    """The index is of the new content, the manifest still of the old one."""
    out = tmp_path / "copy"
    assert client.push(source).returncode == 0
    assert client.pull(f"hf://datasets/{REPO}/portraits", out).returncode == 0
    make_source(source, (5, 3))
    (source / "portraits-000002.tar").unlink()
    assert client.push(source).returncode == 0
    (out / "index.safetensors").write_bytes((source / "index.safetensors").read_bytes())
    assert client.pull(f"hf://datasets/{REPO}/portraits", out).returncode == 0
    assert contents(out) == contents(source)


@pytest.mark.parametrize("location", ["../../elsewhere", "../a/b", "/etc/base", "base"])
def test_a_base_is_pulled_to_beside_its_overlay_alone(layered, tmp_path, capsys, location):
    text = layered[1]
    manifest = Manifest.load(text)
    options = {"null_sha256": manifest.null_sha256, "base": Base(location, manifest.base.sha256)}
    Manifest(manifest.source, 1, manifest.groups, manifest.shapes, manifest.index, **options).save(text)
    with store_server(tmp_path) as server:
        assert pull.main([f"{server.url}/portraits-text", str(tmp_path / "copy" / "text"), "--base"]) == 2
    message = capsys.readouterr().err
    assert "not a folder beside the overlay" in message or "is not a path inside the same" in message
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "copy" / "text" / "manifest.json").exists()


def test_an_overlay_is_not_pulled_to_the_place_of_its_base(layered, tmp_path, capsys):
    out = tmp_path / "copy" / "portraits"
    with store_server(tmp_path) as server:
        assert pull.main([f"{server.url}/portraits-text", str(out), "--base"]) == 2
    assert f"{out} is the place of the overlay's base, http" in capsys.readouterr().err
    assert not list(out.glob("*.tar"))


def test_a_repo_without_a_user_is_refused_before_anything_is_made(hub, client, source):
    done = client.process("-m", "sharding.push", source, "--repo", "photos")
    assert done.returncode == 2 and "--repo is 'photos': it must be USER/NAME" in done.stderr and not hub.repos
