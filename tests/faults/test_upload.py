"""Uploads of weights to a loopback Hub during training, with the real client in separate processes."""

import json
import time
from pathlib import Path

import pytest

from tests.dataset_hub import TOKEN, dataset_hub, yaml_faults
from tests.forked import Forked
from tests.held import holding
from tests.training import ROOT, curve, environment, make_source, options_of_run
from tinyflux.run.checkpoint import PUBLISHED
from tinyflux.run.upload import render
from tinyflux.trainer.config import TrainerConfig

REPO = "user/flux"
OPTIONS = ("--trainer.total-steps", 8, "--trainer.save-every-steps", 2, "--trainer.keep-last-n-steps", 1)
UPLOAD = ("--trainer.hf-repo-id", REPO, "--trainer.hf-run-name", "mine", "--trainer.upload-every-steps", 3)
PLACE = "checkpoint_runs/mine"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return [make_source(tmp_path_factory.mktemp("sources") / "a", 1)]


def of_hub(url: str, home: Path) -> dict[str, str]:
    """The environment of a process whose Hub is there."""
    env = {k: v for k, v in environment().items() if not k.startswith("HF_")}
    return env | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def run(argv: list[object], url: str, home: Path) -> tuple[int, str]:
    """Exit status and output."""
    process = Forked(argv, of_hub(url, home))
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def steps(hub) -> set[int]:
    """The steps whose two files are in the repo."""
    names = [Path(path).name for path in hub.files(REPO) if path.startswith(f"{PLACE}/step_")]
    found = {int(name.split("_")[1].split(".")[0]) for name in names}
    assert sorted(names) == sorted(f"step_{step}{kind}.safetensors" for step in found for kind in ("", "_ema"))
    return found


def test_uploaded_while_training_and_loaded_from_there(sources, tmp_path):
    with dataset_hub() as hub:
        hub.fail_commits = 1  # a 500, which the client itself tries again
        argv = [ROOT / "launch/train.py", *options_of_run(tmp_path / "run", sources, *OPTIONS, *UPLOAD)]
        status, said = run(argv, hub.url, tmp_path / "hf")
        assert status == 0, said
        assert TOKEN not in said and len(curve(tmp_path / "run")) == 8
        assert steps(hub) == {3, 6, 8}  # 3 and 6 are pruned by then
        files = hub.files(REPO)
        rest = {path for path in files if not path.startswith(f"{PLACE}/step_")}
        assert rest == {".gitattributes", "README.md", f"{PLACE}/config.json", f"{PLACE}/training_config.json"}
        assert json.loads(files[f"{PLACE}/training_config.json"])["trainer"]["hf_repo_id"] == REPO
        assert not any(TOKEN.encode() in data for data in files.values())
        card = files["README.md"].decode()
        assert "license: mit" in card and "pipeline_tag: text-to-image" in card and not yaml_faults(card)
        assert card.count("## mine") == 1 and "| steps | 8 of 8 |" in card and f'"{REPO}:{PLACE}"' in card
        assert not list((tmp_path / "run" / "checkpoints" / ".upload").iterdir())

        script = tmp_path / "load.py"
        script.write_text(
            "import sys, torch\nfrom tinyflux.model.loader import from_pretrained, load_model\n"
            "a, b = from_pretrained(sys.argv[1]), load_model(sys.argv[2])\n"
            "assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())\n"
        )
        local = tmp_path / "run" / "checkpoints" / "step_8_ema.safetensors"
        status, said = run([script, f"{REPO}:{PLACE}", local], hub.url, tmp_path / "hf2")
        assert status == 0, said


def test_a_hub_that_is_down_stops_nothing_and_gets_all_later(sources, tmp_path):
    with dataset_hub() as hub:
        nobody = hub.url
    options = (*OPTIONS, *UPLOAD, "--trainer.upload-wait", 2)
    argv = [ROOT / "launch/train.py", *options_of_run(tmp_path / "run", sources, *options)]
    failed, log = tmp_path / "failed", tmp_path / "log"
    env = of_hub(nobody, tmp_path / "hf") | holding({"step 7": failed})
    process, deadline = Forked([ROOT / "tests/held.py", *argv], env, log=log), time.monotonic() + 300
    while f"WARNING: upload to {REPO} failed (1 in a row)" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    failed.touch()
    status, said = process.wait(300), log.read_text()
    assert status == 0 and len(curve(tmp_path / "run")) == 8, said
    assert "WARNING: not uploaded" in said and "run the same command to send them" in said
    for path in (tmp_path / "run/checkpoints/.upload").glob("step_8*"):  # killed between the last save and its upload
        path.unlink()
    (tmp_path / "run/checkpoints/step_8" / PUBLISHED).unlink()
    with dataset_hub() as hub:
        status, said = run(argv, hub.url, tmp_path / "hf")
        assert status == 0 and "finished already: step 8" in said, said
        assert steps(hub) == {3, 6, 8}, said


def test_a_card_keeps_what_others_wrote():
    training = {"trainer": {"total_steps": 9}, "data": {"sources": ["https://me:pw@host/a?key=s"]}}
    first = render("---\nlicense: mit\n---\n\n# Flux\n\nMy words.\n", REPO, "one", ["step_3.safetensors"], training)
    both = render(first, REPO, "two", ["step_3.safetensors"], training)
    again = render(both, REPO, "one", ["step_9.safetensors"], training)
    assert "My words." in again and "license: mit" in again and "pw" not in again and "key=s" not in again
    assert again.count("## one") == again.count("## two") == 1
    assert not yaml_faults(again)
    assert "9 of 9" in again and again.index("## one") < again.index("## two")


@pytest.mark.parametrize("field", [{"hf_repo_id": "flux"}, {"hf_repo_id": "a/b/c"}, {"hf_run_name": "../up"}])
def test_refused_names(field):
    with pytest.raises(ValueError, match=f"trainer.{next(iter(field))} is"):
        TrainerConfig(**field)
