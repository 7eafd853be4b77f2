"""The trainer with a plain DataLoader in one process, as in a notebook."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.training import FITTED, TINY, curve, make_source, records
from tinyflux.model.loader import save_published
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.trainer.cache_experts import DatasetCache, MultiSourceCache
from tinyflux.trainer.cache_loader import CacheLoader
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.data import CachedDataset, MultiCachedDataset, ShapeBatches, collate_fn
from tinyflux.trainer.parallel import usable_device
from tinyflux.trainer.schedules import keyed_timesteps
from tinyflux.trainer.trainer import Trainer
from tinyflux.util import rng

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"dtype": "float32", "learning_rate": 3e-3, "warmup_steps": 2, "lr_scheduler": "constant", "log_every": 2}
QUICK |= {"save_every_epochs": 0, "lune_warmup_steps": 2, "sol_warmup_steps": 2, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return [DatasetCache.load(make_source(root / f"s{i}", i, samples=n)) for i, n in ((0, 14), (1, 9))]


def loader_of(cache, batch_size=4, **options) -> DataLoader:
    return DataLoader(CachedDataset(cache), batch_size, collate_fn=collate_fn, **{"shuffle": True} | options)


def trainer_of(run_dir, **options) -> Trainer:
    torch.manual_seed(0)
    model = TinyFluxDeep(TinyFluxConfig(**TINY, **FITTED))
    return Trainer(model, TrainerConfig(**QUICK | options), device="cpu", run_dir=run_dir, seed=5)


def run(run_dir, cache, loader=None, **options) -> Trainer:
    trainer = trainer_of(run_dir, **options)
    trainer.setup(loader or loader_of(cache), cache)
    assert trainer.train() == 0
    return trainer


def test_trainers_follow_each_other_and_their_models_stay_usable(caches, tmp_path):
    first = run(tmp_path / "a", caches[0], total_steps=4)
    second = run(tmp_path / "b", caches[0], total_steps=4)
    assert curve(tmp_path / "a") == curve(tmp_path / "b") and len(curve(tmp_path / "a")) == 4
    inputs = torch.randn(1, 16, 4), torch.randn(1, 6, 24), torch.randn(1, 24), 0.5
    with torch.no_grad():
        assert torch.equal(first.model.eval()(*inputs), second.model.eval()(*inputs))
        with first.ema.average_parameters():
            assert not torch.equal(first.model(*inputs), second.model(*inputs))
    save_published(first.model, tmp_path / "mine" / "model.safetensors")
    saved = load_file(tmp_path / "a" / "checkpoints" / "step_4.safetensors")
    assert all(torch.equal(saved[name], x) for name, x in load_file(tmp_path / "mine" / "model.safetensors").items())
    data = records(tmp_path / "a")[-1]["data"]
    assert data["sources"]["s0"]["samples"] == 14 and data["sources"]["s0"]["passes"] == 1


def test_a_resumed_run_goes_on_with_the_same_samples(caches, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"gradient_accumulation": 2, "max_epochs": None}
    run(whole, caches[0], total_steps=7, **options)  # an epoch is 4 batches, the last a smaller one
    run(parts, caches[0], total_steps=3, **options)
    resumed = run(parts, caches[0], loader_of(caches[0], num_workers=2), total_steps=7, **options)
    assert resumed.loader.epoch(7) == 3
    assert curve(parts) == curve(whole)


def test_the_schedule_ends_with_the_run(caches, tmp_path):
    options = {"lr_scheduler": "cosine", "min_lr": 1e-4, "total_steps": 100, "max_epochs": 2}
    trainer = run(tmp_path, caches[0], **options)
    assert trainer.step == len(records(tmp_path)) == 8 and records(tmp_path)[-1]["lr"] == pytest.approx(1e-4)


def test_several_caches(caches, tmp_path):
    dataset = MultiCachedDataset()
    for i, cache in enumerate(caches):
        dataset.add(cache, dataset_id=10 + i)
    loader = DataLoader(dataset, 23, collate_fn=collate_fn)
    board = tmp_path / "board"
    trainer = trainer_of(tmp_path / "run", total_steps=2, tensorboard_dir="unused")
    trainer.setup(loader, dataset.get_multi_source_cache(), tensorboard_dir=board)
    assert trainer.train() == 0
    assert list(board.glob("events.out.*")) and not (tmp_path / "run" / "unused").exists()
    sources = records(tmp_path / "run")[-1]["data"]["sources"]
    assert {name: (s["samples"], round(s["requested"], 3)) for name, s in sources.items()} == {
        "s0": (28, 0.609),
        "s1": (18, 0.391),
    }


def test_several_shapes(tmp_path):
    """Batches have one shape; each sample once per epoch, in an order per epoch; the same in a resumed run."""
    folder = make_source(tmp_path / "s", 0, samples=11, shard_size=3, shapes=((4, 4), (2, 8), (8, 2)))
    cache = DatasetCache.load(folder)
    dataset = CachedDataset(cache)
    loader = DataLoader(dataset, batch_sampler=ShapeBatches(dataset, 2), collate_fn=collate_fn)
    assert len(loader) == 3 + 2 + 2
    batches = CacheLoader(loader, cache, TrainerConfig())
    stream = iter(batches)
    epochs = [[next(stream)["local_indices"].tolist() for _ in range(7)] for _ in range(2)]
    assert [sorted(i for batch in epoch for i in batch) for epoch in epochs] == [list(range(11))] * 2
    assert epochs[0] != epochs[1]
    run(tmp_path / "whole", cache, loader, total_steps=10)
    run(tmp_path / "cut", cache, loader, total_steps=5)
    run(tmp_path / "cut", cache, loader, total_steps=10)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 10
    with pytest.raises(ValueError, match="a batch must have one: pass the DataLoader batch_sampler=ShapeBatches"):
        next(iter(CacheLoader(loader_of(cache, 11), cache, TrainerConfig())))
    ordered = [batch for batch in ShapeBatches(dataset, 3, shuffle=False)]
    assert ordered == [[3, 4, 5], [0, 1, 2], [9, 10], [6, 7, 8]]


def test_draws_are_those_of_the_stream(caches):
    config = TrainerConfig(text_dropout=0.5)
    batches = iter(CacheLoader(loader_of(caches[0], shuffle=False), caches[0], config, seed=3))
    for step in range(3):
        batch = next(batches)
        seeds = torch.from_numpy(rng.sample_seeds(3, step, torch.arange(4).numpy()))
        assert torch.equal(batch["sample_seeds"], seeds)
        assert torch.equal(batch["t"], keyed_timesteps(seeds))
        rows = batch["local_indices"]
        assert rows.tolist() == list(range(4 * step, 4 * step + 4))
        assert torch.equal(batch["lune_features"], caches[0].get_lune(rows, batch["t"]))
        dropped = rng.uniform(seeds, "text_dropout") < 0.5
        _, t5, _ = caches[0].get_encodings_batch(rows)
        assert torch.equal(batch["t5_embeds"], torch.where(dropped[:, None, None], 0, t5.float()))


def test_each_epoch_has_an_order_of_its_own(caches):
    loader = CacheLoader(loader_of(caches[0], 14), caches[0], TrainerConfig())
    batches = iter(loader)
    orders = [next(batches)["local_indices"].tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(14)) for order in orders) and len(set(map(tuple, orders))) == 3
    loader.load_state_dict({"step": 1})
    assert next(iter(loader))["local_indices"].tolist() == orders[1]


def test_without_a_cache(caches, tmp_path):
    off = {"enable_lune": False, "enable_sol": False, "text_dropout": 0.0}
    run(tmp_path, None, loader_of(caches[0]), total_steps=1, **off)
    with pytest.raises(ValueError, match="the cache is missing. It has .* set enable_lune = False"):
        run(tmp_path / "b", None, loader_of(caches[0]))


def test_in_a_thread_signals_are_left_alone(caches, tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path, caches[0]), kwargs={"total_steps": 1})
    thread.start()
    thread.join()
    assert len(records(tmp_path)) == 1


def test_what_is_refused(caches, tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    plain = DataLoader(CachedDataset(caches[0]), 4)
    multi = MultiSourceCache()
    multi.add(caches[0], dataset_id=4)
    for loader, cache, message in (
        (DataLoader(Endless()), caches[0], "needs a length"),
        (loader_of(caches[0], 64, drop_last=True), caches[0], "the DataLoader is empty"),
        (plain, caches[0], "lacks latents, t5_embeds, local_indices, dataset_ids: pass it collate_fn="),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path).setup(loader, cache)
    with pytest.raises(ValueError, match=r"dataset id 0 of a batch is unknown: the caches added have \[4\]"):
        next(iter(CacheLoader(loader_of(caches[0]), multi, TrainerConfig())))
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        trainer_of(tmp_path).load_checkpoint()


ORIGINAL = {
    **{"learning_rate": 1e-4, "weight_decay": 0.01, "betas": (0.9, 0.95), "grad_clip": 1.0, "optimizer": "adamw"},
    **{"warmup_steps": 1000, "total_steps": 100000, "max_epochs": None, "lr_scheduler": "cosine", "min_lr": 0.0},
    **{"warmup_type": "linear", "gradient_accumulation": 1, "gradient_checkpointing": False, "compile_mode": None},
    **{"ema_decay": 0.9999, "shift": 3.0, "use_snr_weighting": True, "snr_gamma": 5.0, "use_huber_loss": False},
    **{"huber_delta": 0.1, "logit_normal_sampling": True, "logit_mean": 0.0, "logit_std": 1.0, "enable_lune": True},
    **{"lune_weight": 0.1, "lune_warmup_steps": 1000, "lune_dropout": 0.1, "lune_mode": "cosine", "enable_sol": True},
    **{"sol_weight": 0.05, "sol_warmup_steps": 2000, "sol_dropout": 0.1, "use_spatial_weighting": False},
    **{"text_dropout": 0.1, "checkpoint_dir": "checkpoints", "save_every_steps": 5000, "keep_last_n_steps": 3},
    **{"save_every_epochs": 1, "keep_last_n_epochs": 3, "log_every": 100, "tensorboard_dir": "logs"},
    **{"sample_every": 2000, "sample_prompts": None, "sample_dir": "samples", "dtype": torch.bfloat16},
    **{"hf_repo_id": "user/model", "hf_run_name": None, "upload_every_steps": 0, "upload_every_epochs": 1},
}


def test_configs_of_the_original_package():
    config = TrainerConfig(**ORIGINAL)
    assert (config.dtype, config.gradient_checkpointing, config.sample_prompts) == ("bfloat16", "none", [])
    plain = TrainerConfig()
    changed = {name for name in ORIGINAL if getattr(config, name) != getattr(plain, name)}
    assert changed == {"hf_repo_id"}
    for name, value in (("dtype", torch.float16), ("optimizer", "sgd"), ("lune_mode", "l2"), ("compile_mode", "fast")):
        with pytest.raises(ValueError, match=f"trainer.{name} is .*: it must be one of"):
            TrainerConfig(**{name: value})


def test_devices_by_name(monkeypatch):
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device gpu9 cannot be used here"):
        usable_device("gpu9")
    monkeypatch.setattr("tinyflux.trainer.parallel.check_place", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert usable_device("cuda") == torch.device("cuda:1")  # torch.cuda.set_device refuses one without a number
