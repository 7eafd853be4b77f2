"""Held-out samples: the same on any number of ranks, from few shards of a remote source, refused if there are none."""

from pathlib import Path

import pytest
import torch

from tests.store_server import store_server
from tests.training import make_source, records, train
from tinyflux.shards.sources import grids_of
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.trainer import collate, trainer
from tinyflux.trainer.collate import VALIDATION_TIMESTEPS, HeldOut, StreamCollate
from tinyflux.trainer.config import TrainerConfig


def held_out(urls: list[str], samples: int, world: int, micro: int = 2, **options) -> list[list[str]]:
    """The keys that count, of each rank; every batch is gone through twice, as two validations do."""
    config = DataConfig(urls, global_batch_size=8, micro_batch_size=micro, val_fraction=0.4, **options)
    sources, found, numbers = open_sources(config), [], set()
    for rank in range(world):
        nulls = [source.null for source in sources]
        collated = StreamCollate(TrainerConfig(), nulls, grids_of(sources), global_batch_size=8, seed=0)
        with Stream(sources, config, rank, world, collated) as stream:
            batches = HeldOut(stream, collated, samples)
            rounds = []
            for _ in range(2):
                keys, count = [], 0
                for k, batch in enumerate(batches):
                    count += 1
                    if k % VALIDATION_TIMESTEPS == 0:
                        keys += [key for key, valid in zip(batch["keys"], batch["valid"], strict=True) if valid]
                rounds.append(keys)
                numbers.add(count)
            assert rounds[0] == rounds[1]
            found.append(rounds[0])
    assert len(numbers) == 1  # or ranks would wait for each other
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    shapes = ((4, 4), (2, 8))
    return [make_source(root / "a", 1, samples=40), make_source(root / "b", 2, samples=24, shapes=shapes)]


def test_any_number_of_ranks_validates_the_same_samples(folders):
    urls = [str(folder) for folder in folders]
    for samples in (11, 1000):
        (alone,) = held_out(urls, samples, 1, unit=2)
        assert len(alone) == len(set(alone)) and (len(alone) == 11 or 11 < len(alone) < 64)
        for world, micro in ((2, 2), (4, 1)):
            together = held_out(urls, samples, world, micro, unit=2)
            assert sorted(key for keys in together for key in keys) == sorted(alone), (samples, world)


def test_of_a_remote_source_few_shards_are_fetched_once(tmp_path, monkeypatch, capsys):
    """Not all of them, hardly one by two nodes, and none again in the next validation, whatever was evicted."""
    monkeypatch.setattr(collate, "KEPT", 0)
    source, found, requests = make_source(tmp_path / "source", 1, samples=96, shard_size=4), {}, {}
    with store_server(source) as server:
        for world in (1, 4):
            server.bodies.clear()
            found[world] = []
            for rank in range(world):  # each on its own node
                options = {"val_fraction": 0.4, "cache_dir": str(tmp_path / f"node {rank} of {world}")}
                config = DataConfig([server.url], global_batch_size=8, micro_batch_size=2, **options)
                (opened,) = open_sources(config)
                collated = StreamCollate(TrainerConfig(), [opened.null], opened.grids, global_batch_size=8, seed=0)
                with Stream([opened], config, rank, world, collated) as stream:
                    batches = HeldOut(stream, collated, 1000)
                    rounds = []
                    for _ in range(2):
                        rounds.append([k for b in batches for k, v in zip(b["keys"], b["valid"], strict=True) if v])
                        for shard in Path(config.cache_dir).rglob("*.tar"):
                            shard.unlink()
                        opened.layers[0].store.cache.close_unlinked()
                assert rounds[0] == rounds[1]
                found[world] += rounds[0]
            requests[world] = [n for name, n in server.bodies.items() if name.endswith(".tar")]
    assert sorted(found[1]) == sorted(found[4]) and len(set(found[1])) > 6
    assert len(requests[1]) == 6 and set(requests[1]) == {1}  # of 24 shards
    assert len(requests[4]) == 6 and sum(requests[4]) <= 6 + 3
    assert "only a part of each remote source's shards" in capsys.readouterr().out


def test_refused(folders, tmp_path):
    options = ("--data.val-fraction", 1e-6, "--trainer.total-steps", 1)
    done = train(tmp_path / "run", folders[:1], *options)
    assert done.returncode == 2 and "which holds out none of the 40 samples" in done.stdout, done.stdout
    deep = ("--model.hidden-size", 4096, "--model.num-attention-heads", 32, "--model.attention-head-dim", 128)
    deep += ("--model.axes-dims-rope", 16, 56, 56, "--data.global-batch-size", 2**16, "--data.micro-batch-size", 2**16)
    done = train(tmp_path / "run", folders[:1], *deep, "--trainer.total-steps", 1)
    assert done.returncode == 2 and "data.micro_batch_size is 65536: with latents of 4 x 4 it needs" in done.stdout
    assert "GiB on each device" in done.stdout and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_a_good_sample_there_is_no_best_loss(folders, tmp_path, monkeypatch):
    """Where all held-out rows are damaged the loss is none, not 0."""
    validate = trainer.validate

    def damaged(objective, ema, batches, *where):
        return validate(objective, ema, ({**b, "valid": torch.zeros_like(b["valid"])} for b in batches), *where)

    monkeypatch.setattr(trainer, "validate", damaged)
    options = ("--data.val-fraction", 0.4, "--trainer.validate-every", 1, "--trainer.total-steps", 2)
    done = train(tmp_path / "run", folders[:1], *options)
    assert done.returncode == 0 and [r["val_loss"] for r in records(tmp_path / "run")] == [None, None], done.stdout
    assert not (tmp_path / "run/checkpoints/best_ema.safetensors").exists()
