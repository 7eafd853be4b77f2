"""Trainings of several ranks on sources of a Hub: as from the disk, also after a rank died, on fewer ranks later."""

import os
import signal

import pytest

from tests.dataset_hub import dataset_hub
from tests.training import curve, make_source, records, run_ranks, start_torchrun, train, wait_for, workers

STEPS = 12
OPTIONS = ("--data.weights", 0.5, 0.5, "--trainer.lr-scheduler", "constant")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [make_source(folder / "a", 1, samples=48), make_source(folder / "b", 2, samples=96)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, sources):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(run_dir, sources, *OPTIONS, "--trainer.total-steps", STEPS)
    assert done.returncode == 0, done.stdout
    return curve(run_dir)


@pytest.fixture
def urls(sources, tmp_path, monkeypatch):
    with dataset_hub() as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        files = {f"{s.name}/{path.name}": path.read_bytes() for s in sources for path in s.iterdir()}
        hub.repos["user/repo"] = [files]
        yield [f"hf://datasets/user/repo/{s.name}" for s in sources]


def test_a_killed_rank_of_a_run_on_the_hub(unbroken, urls, tmp_path):
    run_dir = tmp_path / "run"
    options = (*OPTIONS, "--trainer.total-steps", STEPS, "--trainer.save-every-steps", 2)
    options += ("--data.cache-dir", tmp_path / "cache")
    process = start_torchrun(run_dir, urls, *options)
    wait_for(process, run_dir, run_dir / "checkpoints" / "step_4" / "metadata.json")
    os.kill(workers(process)[1], signal.SIGKILL)
    process.wait(300)
    output = (tmp_path / "run.log").read_text()
    assert process.returncode == 1 and "SIGKILL" in output.upper(), output

    done = train(run_dir, urls, *options, ranks=2)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stdout
    resumed = curve(run_dir)
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for a, b in zip(unbroken, resumed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), a["step"]

    data = records(run_dir)[-1]["data"]
    first = int(done.stdout.partition("resuming at step ")[2].split()[0])
    assert {name: source["samples"] for name, source in data["sources"].items()} == {
        "a": 4 * (STEPS - first),
        "b": 4 * (STEPS - first),
    }
    assert [source["passes"] for source in data["sources"].values()] == [1.0, 0.5]
    assert data["cache_hits"] + data["late_shards"] > 0 and data["bad_samples"] == 0
    assert "source a:" in done.stdout and "of 0.5000 requested, 1.00 passes in all" in done.stdout
    assert "0 bad samples" in done.stdout and "shards found in the cache" in done.stdout


def test_four_ranks_then_two_then_one(unbroken, sources, tmp_path):
    for ranks, steps in ((4, 4), (2, 8), (1, STEPS)):
        options = (*OPTIONS, "--data.micro-batch-size", 2, "--trainer.total-steps", steps)
        done = train(tmp_path / "run", sources, *options, ranks=ranks)
        assert done.returncode == 0 and ("resuming" in done.stdout) == (ranks < 4), done.stdout
    broken = curve(tmp_path / "run")
    assert [record["step"] for record in broken] == list(range(1, STEPS + 1))
    for a, b in zip(unbroken, broken, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), a["step"]


FAILING = """
import sys, torch.distributed as dist
from pathlib import Path
from tinyflux.run import sources
from tinyflux.shards.config import DataConfig

dist.init_process_group("gloo")
rank, config = dist.get_rank(), DataConfig([sys.argv[1]])
opened = sources.open_sources

def fail(*_):
    raise ZeroDivisionError("what no store should raise")

for name, who in (("resolve_revisions", 0), ("open_sources", 1), ("nothing", 0)):
    kept = getattr(sources, name, None)
    if rank == who:
        setattr(sources, name, fail)
    try:
        print(f"{name} {rank} {sources.open_run_sources(config, (), Path('none'))[0].name}\\n", end="", flush=True)
    except Exception as error:
        print(f"{name} {rank} {error!r}\\n", end="", flush=True)
    setattr(sources, name, kept)
dist.destroy_process_group()
"""


def test_an_error_of_one_rank_is_one_of_all(sources, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    assert run_ranks([script, sources[0]], 2, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    own = "ZeroDivisionError('what no store should raise')"
    assert sorted((tmp_path / "log").read_text().splitlines()) == [
        "nothing 0 a",
        "nothing 1 a",
        f'open_sources 0 OSError("rank 1: {own}")',
        f"open_sources 1 {own}",
        f"resolve_revisions 0 {own}",
        f'resolve_revisions 1 OSError("rank 0: {own}")',
    ]
