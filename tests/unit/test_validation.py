"""Held-out samples: the same on any number of ranks, few shards of a remote source, refused where there are none."""

import pytest

from tests.store_server import store_server
from tests.training import make_source, train
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.trainer.collate import VALIDATION_TIMESTEPS, HeldOut, StreamCollate
from tinyflux.trainer.config import TrainerConfig


def held_out(urls: list[str], samples: int, world: int, micro: int = 2, **options) -> list[list[str]]:
    """The keys that count, of each rank; every batch is gone through twice, as two validations do."""
    config = DataConfig(urls, global_batch_size=8, micro_batch_size=micro, val_fraction=0.4, **options)
    sources, found, numbers = open_sources(config), [], set()
    for rank in range(world):
        collate = StreamCollate(TrainerConfig(), [s.null for s in sources], global_batch_size=8, seed=0)
        with Stream(sources, config, rank, world, collate) as stream:
            batches = HeldOut(stream, collate, samples)
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


def test_of_a_remote_source_few_shards_are_fetched(folders, tmp_path):
    with store_server(folders[0]) as server:
        (keys,) = held_out([server.url], 4, 1, cache_dir=str(tmp_path))
    assert len(keys) == 4 and len(list(tmp_path.rglob("*.tar"))) <= 2  # of five


def test_refused(folders, tmp_path):
    options = ("--data.val-fraction", 1e-6, "--trainer.total-steps", 1)
    done = train(tmp_path / "run", folders[:1], *options)
    assert done.returncode == 2 and "which holds out none of the 40 samples" in done.stdout, done.stdout
    deep = ("--model.hidden-size", 4096, "--model.num-attention-heads", 32, "--model.attention-head-dim", 128)
    deep += ("--model.axes-dims-rope", 16, 56, 56, "--data.global-batch-size", 2**16, "--data.micro-batch-size", 2**16)
    done = train(tmp_path / "run", folders[:1], *deep, "--trainer.total-steps", 1)
    assert done.returncode == 2 and "data.micro_batch_size is 65536: with latents of 4 x 4 it needs" in done.stdout
    assert "GiB on each device" in done.stdout and not (tmp_path / "run" / "metrics.jsonl").exists()
