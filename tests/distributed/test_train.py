"""Training on one and on two ranks: the same samples, draws and losses."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.training import curve, make_source, records, train
from tinyflux.model.loader import load_checkpoint, load_model
from tinyflux.run import export
from tinyflux.shards.sources import grids_of
from tinyflux.shards.stream import DataConfig, Stream, open_sources
from tinyflux.trainer.collate import StreamCollate
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util import rng

STEPS = 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [make_source(folder / "a", 1), make_source(folder / "b", 2, samples=40)]


@pytest.fixture(scope="module")
def one_rank_dir(tmp_path_factory, sources):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = train(run_dir, sources, "--trainer.total-steps", STEPS)
    assert done.returncode == 0, done.stdout
    return run_dir


@pytest.fixture(scope="module")
def one_rank(one_rank_dir):
    return curve(one_rank_dir)


def draws(
    sources, rank: int, world: int, micro: int, steps: range = range(STEPS), **options
) -> dict[tuple[int, int], tuple]:
    """(step, slot) -> key, t, noise and dropped text of a rank's samples."""
    config = DataConfig([str(s) for s in sources], global_batch_size=8, micro_batch_size=micro, seed=7)
    opened = open_sources(config)
    trainer = replace(TrainerConfig(text_dropout=0.5), **options)
    collate = StreamCollate(trainer, [s.null for s in opened], grids_of(opened), global_batch_size=8, seed=7)
    found = {}
    with_place = lambda raw: (raw["step"], raw["slots"], collate(raw))  # noqa: E731
    with Stream(opened, config, rank, world, with_place, start_step=steps.start) as stream:
        for _ in range(len(steps) * stream.accumulation):
            step, slots, batch = next(stream)
            noise = rng.normal(batch["sample_seeds"], "noise", batch["latents"].shape[1:])
            dropped = batch["t5_embeds"].abs().sum((1, 2)) == 0
            for i, slot in enumerate(slots.tolist()):
                found[step, slot] = (batch["keys"][i], batch["t"][i], noise[i], dropped[i])
    return found


@pytest.mark.parametrize("stratified", [False, True])
def test_ranks_share_one_plan_and_one_set_of_draws(sources, stratified):
    options = {"stratified_sampling": stratified}
    alone = draws(sources, 0, 1, 4, **options)
    together = {}  # four ranks, then two, then one
    for world, steps in ((4, range(7)), (2, range(7, 13)), (1, range(13, STEPS))):
        for rank in range(world):
            together |= draws(sources, rank, world, 2, steps, **options)
    assert alone.keys() == together.keys() and len(alone) == STEPS * 8
    for place, (key, t, noise, dropped) in alone.items():
        assert together[place][0] == key
        assert together[place][1] == t and together[place][3] == dropped
        assert torch.equal(together[place][2], noise)
    if stratified:
        for step in range(STEPS):  # with shift 3 and logit-normal the median of t is 3/4: half of each batch below
            assert sum(alone[step, slot][1] < 0.75 for slot in range(8)) == 4


def test_two_ranks_have_the_losses_of_one(one_rank, sources, tmp_path):
    done = train(tmp_path / "run", sources, "--trainer.total-steps", STEPS, ranks=2)
    assert done.returncode == 0, done.stdout
    two_ranks = curve(tmp_path / "run")
    assert [r["step"] for r in one_rank] == [r["step"] for r in two_ranks] == list(range(1, STEPS + 1))
    for a, b in zip(one_rank, two_ranks, strict=True):
        for name in ("loss", "main", "lune", "sol", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)
        assert a["loss"] == pytest.approx(sum(a[name] * weight for name, weight in a["weights"].items()), abs=1e-6)
    slowest = [r["slowest"] for r in records(tmp_path / "run")]
    assert {s["rank"] for s in slowest} <= {0, 1} and all(s["late_s"] > 0 for s in slowest)


def test_accumulation_split_does_not_change_the_losses(one_rank, sources, tmp_path):
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 8, "--data.micro-batch-size", 8)
    assert done.returncode == 0, done.stdout
    whole = curve(tmp_path / "run")
    for a, b in zip(one_rank[:8], whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_resume_on_another_rank_count_and_hsdp(one_rank, sources, tmp_path):
    options = ("--trainer.total-steps", STEPS, "--trainer.save-every-steps", 5)
    done = train(tmp_path / "run", sources, *options, "--trainer.max-epochs", 1, ranks=2)
    assert done.returncode == 0 and len(curve(tmp_path / "run")) == 8, done.stdout  # 64 samples, 8 a step
    assert len(list((tmp_path / "run/checkpoints/step_8").glob("*.distcp"))) == 2
    done = train(tmp_path / "run", sources, *options, "--parallel.shard-size", 1, ranks=2)
    assert done.returncode == 0 and "resuming at step 8" in done.stdout, done.stdout
    for a, b in zip(one_rank, curve(tmp_path / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    # of two replicas the first one saves
    assert [path.name for path in (tmp_path / f"run/checkpoints/step_{STEPS}").glob("*.distcp")] == ["__0_0.distcp"]


def test_fine_tuning_starts_from_weights_and_leaves_the_frozen_ones(one_rank_dir, sources, tmp_path):
    options = ("--trainer.init-from", one_rank_dir, "--trainer.freeze", "double_blocks", "img_in")
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 3, *options, ranks=2)
    assert done.returncode == 0 and "starting from the weights of" in done.stdout, done.stdout
    before = load_file(one_rank_dir / "checkpoints" / f"step_{STEPS}_ema.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step_3.safetensors")
    assert [r["step"] for r in curve(tmp_path / "run")] == [1, 2, 3]
    for name, weight in after.items():
        frozen = name.startswith(("double_blocks", "img_in", "rope", "sol_prior.spatial_to_qk"))
        assert torch.equal(weight, before[name]) == frozen, name
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 3, *options)
    assert done.returncode == 0 and "finished" in done.stdout, done.stdout


def test_validation_epochs_and_exports(sources, tmp_path):
    options = ("--data.val-fraction", 0.2, "--trainer.validate-every", 3, "--trainer.total-steps", 16)
    keep = ("--trainer.save-every-epochs", 1, "--trainer.keep-last-n-epochs", 1, "--trainer.save-pt")
    keep += ("--trainer.save-every-minutes", 0)
    done = train(tmp_path / "one", sources, *options, *keep)
    assert done.returncode == 0, done.stdout
    done = train(tmp_path / "two", sources, *options, ranks=2)
    assert done.returncode == 0, done.stdout
    one, two = (curve(tmp_path / name) for name in ("one", "two"))
    assert [r["step"] for r in one if "val_loss" in r] == [3, 6, 9, 12, 15]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "val_loss", "val_lune", "val_sol"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-4)

    root = tmp_path / "one" / "checkpoints"
    best = min((r for r in one if "val_loss" in r), key=lambda r: r["val_loss"])["step"]
    total = int(re.search(r"(\d+) samples in 2 sources", done.stdout)[1])  # that are trained on
    epochs = [step for step in range(1, 17) if step * 8 // total > (step - 1) * 8 // total]
    kept = {int(path.name.removeprefix("step_")) for path in root.glob("step_*") if path.is_dir()}
    assert kept == {best, epochs[-1], 16}
    weights, best_weights = load_file(root / f"step_{best}_ema.safetensors"), load_file(root / "best_ema.safetensors")
    assert all(torch.equal(weights[name], best_weights[name]) for name in weights)

    whole = load_checkpoint(root / "step_16.pt")
    assert whole["step"] == 16 and whole["epoch"] == 2 and whole["trainer_config"]["total_steps"] == 16
    assert torch.equal(whole["model"].img_in.weight, load_file(root / "step_16.safetensors")["img_in.weight"])
    assert whole["optimizer"]["state"]["img_in.weight"]["exp_avg"].shape == whole["model"].img_in.weight.shape
    out = tmp_path / "out" / "weights.safetensors"
    assert export.main([str(tmp_path / "two"), "--out", str(out)]) == 0
    assert load_model(out).config == whole["model"].config
    again = tmp_path / "another" / "step_16.pt"
    assert export.main([str(tmp_path / "one"), "--out", str(again)]) == 0
    assert load_checkpoint(again)["step"] == 16
    assert export.main([str(tmp_path)]) == 2


def test_timesteps_are_those_of_the_sources_that_have_teachers(tmp_path):
    plain = make_source(tmp_path / "plain", 1, groups=("latents", "text"))
    taught = make_source(tmp_path / "taught", 2, timesteps=5)
    done = train(tmp_path / "run", [plain, taught], "--data.allow-missing", "plain", "--trainer.total-steps", 1)
    assert done.returncode == 0, done.stdout


def test_dry_run_starts_nothing(sources, tmp_path):
    done = train(tmp_path / "run", sources, "--dry-run", "--trainer.freeze", "double_blocks")
    assert done.returncode == 0 and not (tmp_path / "run").exists(), done.stdout
    said = {line[:16].strip(): line[16:] for line in done.stdout.splitlines()}
    assert said["devices"] == "1 x cpu" and said["a step"] == "8 samples, 2 micro-batches of 4 on each rank"
    assert len(said["first batch"].split()) == 4 and "samples/s" in said["data"] and "GiB" in said["memory of each"]
    assert said["parameters"].startswith("86,528, ")
