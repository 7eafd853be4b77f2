"""Training on several ranks from Hub sources with all features of a source: the same as an uninterrupted run from disk,
also after a rank died, and on fewer ranks later."""

import signal
from collections import Counter

import pytest
import torch
from huggingface_hub import HfFileSystem, constants

from tests.dataset_hub import dataset_hub
from tests.forked import Forked
from tests.training import curve, make_source, records, run_ranks, train, wait_for
from tinyflux.shards.cache import NodeCache
from tinyflux.shards.config import DataConfig
from tinyflux.shards.source import open_source
from tinyflux.shards.sources import grids_of
from tinyflux.shards.stream import Stream
from tinyflux.trainer.collate import StreamCollate
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util import rng

STEPS = 12
OPTIONS = ("--data.weights", 0.5, 0.5, "--data.unit", 2, "--data.micro-batch-size", 2, "--trainer.text-dropout", 0.2)
SHAPES = {"samples": 48, "shapes": ((4, 4), (2, 8), (8, 2))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Source a with three shapes and up to three captions, an overlay with other captions, and on it one with a
    teacher; source b with two shapes and masks, and an overlay with the teacher."""
    root = tmp_path_factory.mktemp("sources")
    groups = ("latents", "text", "sol")
    a = make_source(root / "a", 1, captions=[1, 3], groups=groups, **SHAPES)
    text = make_source(root / "a-text", 1, captions=[2, 1, 3], groups=("text",), base=a, **SHAPES)
    lune = make_source(root / "a-lune", 1, groups=("lune",), base=text, **SHAPES)
    shapes = {"samples": 96, "shapes": ((4, 4), (8, 2))}
    b = make_source(root / "b", 2, captions=2, groups=(*groups, "mask"), **shapes)
    return [a, text, lune, b, make_source(root / "b-lune", 2, groups=("lune",), base=b, **shapes)]


@pytest.fixture(scope="module")
def sources(folders):
    return [folders[2], folders[4]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, sources):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(run_dir, sources, *OPTIONS, "--trainer.total-steps", STEPS)
    assert done.returncode == 0, done.stdout
    return curve(run_dir)


@pytest.fixture
def urls(folders, sources, tmp_path, monkeypatch):
    """The sources on a Hub, for this process and for those that it starts."""
    with dataset_hub() as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        HfFileSystem.clear_instance_cache()
        files = {f"{s.name}/{path.name}": path.read_bytes() for s in folders for path in s.iterdir()}
        hub.repos["user/repo"] = [files]
        yield [f"hf://datasets/user/repo/{s.name}" for s in sources]
        HfFileSystem.clear_instance_cache()


def test_four_ranks_then_two_then_one(unbroken, urls, tmp_path):
    """A rank is killed, the run resumes on two ranks and ends on one: same losses as uninterrupted from disk."""
    run_dir = tmp_path / "run"
    options = (*OPTIONS, "--data.cache-dir", tmp_path / "cache")
    saving = ("--trainer.total-steps", STEPS, "--trainer.save-every-steps", 2)
    killed = tmp_path / "killed"

    def strike(processes: list[Forked]) -> None:
        wait_for(processes[0], run_dir, run_dir / "checkpoints" / "step_2" / "metadata.json")
        processes[1].kill()
        assert processes[1].wait(300) == -signal.SIGKILL
        killed.touch()

    done = train(run_dir, urls, *options, *saving, ranks=4, meanwhile=strike, holds={"step 6": killed})
    assert done.returncode, done.stdout

    done = train(run_dir, urls, *options, "--trainer.total-steps", 8, ranks=2)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stdout
    first = int(done.stdout.partition("resuming at step ")[2].split()[0])
    data = records(run_dir)[-1]["data"]
    assert sum(source["samples"] for source in data["sources"].values()) == 8 * (8 - first)
    assert data["cache_hits"] + data["late_shards"] > 0 and data["bad_samples"] == 0
    assert "source a:" in done.stdout and "of 0.5000 requested" in done.stdout
    assert "0 bad samples" in done.stdout and "shards found in the cache" in done.stdout

    done = train(run_dir, urls, *options, "--trainer.total-steps", STEPS)
    assert done.returncode == 0 and "resuming at step 8" in done.stdout, done.stdout
    broken = curve(run_dir)
    assert [record["step"] for record in broken] == list(range(1, STEPS + 1))
    for a, b in zip(unbroken, broken, strict=True):
        for name in ("loss", "main", "lune", "sol"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)


def drawn(urls, world: int, steps: range, cache: NodeCache | None = None) -> dict:
    """{(step, slot): (key, its tensors as trained on, with the noise)} of all ranks."""
    trainer = TrainerConfig(text_dropout=0.2)
    config = DataConfig([str(u) for u in urls], [0.5, 0.5], global_batch_size=8, micro_batch_size=2, unit=2, seed=7)
    opened, found = [open_source(url, cache=cache) for url in urls], {}
    collate = StreamCollate(trainer, [s.null for s in opened], grids_of(opened), global_batch_size=8, seed=7)
    for rank in range(world):
        with Stream(opened, config, rank, world, start_step=steps.start) as stream:
            for _ in range(len(steps) * stream.accumulation):
                raw = next(stream)
                batch = collate(raw)
                batch["noise"] = rng.normal(batch["sample_seeds"], "noise", batch["latents"].shape[1:])
                tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
                for i, slot in enumerate(raw["slots"].tolist()):
                    found[raw["step"], slot] = batch["keys"][i], {name: v[i].clone() for name, v in tensors.items()}
    return found


def test_samples_captions_timesteps_and_noise_are_those_of_the_disk(sources, urls, tmp_path):
    whole = drawn(sources, 1, range(STEPS))
    cache = NodeCache(tmp_path / "cache", limit=1 << 30)
    parts = {}
    for world, steps in ((4, range(4)), (2, range(4, 8)), (1, range(8, STEPS))):
        parts |= drawn(urls, world, steps, cache)
    assert parts.keys() == whole.keys() and len(whole) == 8 * STEPS
    shapes, captions, masked = Counter(), Counter(), 0
    for place, (key, tensors) in whole.items():
        other, values = parts[place]
        assert key == other and tensors.keys() == values.keys(), place
        for name, value in tensors.items():
            assert torch.equal(value.nan_to_num(9), values[name].nan_to_num(9)), (place, name)
        shapes[tuple(tensors["latents"].shape[1:])] += 1
        captions[key, tuple(tensors["clip_pooled"].flatten()[:2].tolist())] += 1
        masked += bool(tensors["masks"].isfinite().all())
    assert set(shapes) == set(SHAPES["shapes"]) and 30 < masked < 66
    assert len(captions) > len({key for key, _ in captions}), "samples were seen with several of their captions"


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
