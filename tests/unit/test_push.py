"""Pushing sources to a loopback hub with the real client, in processes of their own, and pulling them again."""

import hashlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, HfFileSystem, constants

from sharding import pull, push
from tests.dataset_hub import TOKEN, commit_id, dataset_hub
from tests.make_source import make_source
from tinyflux.precache import card
from tinyflux.precache import push as pushing
from tinyflux.shards.manifest import Manifest

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

    def pull(self, url: str, out: Path, token: str | None = TOKEN) -> subprocess.CompletedProcess:
        return self._run(pull, (url, out), token)

    def process(self, *args: object) -> subprocess.CompletedProcess:
        """Python in a process of its own, as a user starts it."""
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
    assert "1 of them fetched" in done.stdout
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
    assert done.returncode == 2 and "is a public repo and --private was asked for" in done.stderr


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


def test_an_overlay_goes_beside_its_base(hub, client, source, tmp_path):
    overlay = make_source(tmp_path / "portraits-sol2", base=source, groups=("mask",))
    done = client.push(overlay)
    assert done.returncode == 2 and "push the base first" in done.stderr
    assert client.push(source).returncode == 0
    done = client.push(overlay)
    assert done.returncode == 0 and f"hf://datasets/{REPO}/portraits-sol2" in done.stdout, done.stderr
    files = hub.files(REPO)
    assert {"portraits/manifest.json", "portraits-sol2/portraits-000000.tar"} <= files.keys()
    assert "portraits-sol2/null.safetensors" not in files
    code = f"""
from tinyflux.shards.source import open_source
source = open_source("hf://datasets/{REPO}/portraits-sol2")
print(sorted(source.open(2).decode(3)))
"""
    done = client.process("-c", code)
    assert done.returncode == 0 and "'lune', 'mask'" in done.stdout, done.stderr


def test_a_repo_without_a_user_is_refused_before_anything_is_made(hub, client, source):
    done = client.process("-m", "sharding.push", source, "--repo", "photos")
    assert done.returncode == 2 and "--repo is 'photos': it must be USER/NAME" in done.stderr and not hub.repos
