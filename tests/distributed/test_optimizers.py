"""The optimizers on sharded parameters: the steps of the unsharded ones, and runs that resume exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))  # torchrun runs this file too

from tests.training import curve, environment, make_source, train
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.optim.registry import make_optimizer, optimizer_state

STEPS, STOP = 10, 5
WIDE = ("--model.attention-head-dim", 32, "--model.hidden-size", 64, "--model.axes-dims-rope", 8, 12, 12)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def network() -> nn.Module:
    torch.manual_seed(0)  # 33 rows: no two ranks have as many
    return nn.Sequential(nn.Linear(256, 33), nn.LayerNorm(33), nn.Linear(33, 1))


def compare() -> None:
    """On every rank: sharded against unsharded, and the state before the first step."""
    dist.init_process_group("gloo")
    for name in ("adamw", "adamw8bit", "adafactor"):
        config = TrainerConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1)
        sharded = network()
        fully_shard(sharded)
        optimizer = make_optimizer(sharded, config)
        before = [p.full_tensor().clone() for p in sharded.parameters()]
        state = optimizer_state(sharded, optimizer)
        assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, sharded.parameters(), strict=True))
        assert all(entries["step"] == 0 for entries in state.values())
        assert ("exp_avg_codes" in state["0.weight"]) == (name == "adamw8bit")
        steps(sharded, optimizer, STEPS)
        assert all(entries["step"] == STEPS for entries in state.values())

        whole = network()
        groups = [
            {"params": [p for p in whole.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in whole.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        if name == "adafactor":
            plain = torch.optim.Adafactor(groups, lr=1e-2)
        else:
            plain = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas)
        steps(whole, plain, STEPS)
        rough = name == "adamw8bit"
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            difference = (p.full_tensor() - q).abs()
            assert difference.max() < (2e-2 if rough else 2e-6), (name, difference.max())
            assert not rough or q.shape != (33, 256) or difference.max() > 0
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_steps_are_those_of_the_whole():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return [make_source(tmp_path_factory.mktemp("sources") / "a", 1)]


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor"])
def test_resumes_on_another_rank_count(sources, tmp_path, name):
    """One rank all the way; two ranks, one, two. (AdamW is in every other test.)"""
    options = (*WIDE, "--trainer.optimizer", name, "--trainer.total-steps", STEPS, "--trainer.lr-scheduler", "constant")
    options += ("--trainer.learning-rate", 3e-2 if name == "adafactor" else 3e-3)
    done = train(tmp_path / "whole", sources, *options)
    assert done.returncode == 0, done.stdout
    for steps, ranks in ((4, 2), (7, 1), (STEPS, 2)):
        done = train(tmp_path / "parts", sources, *options, "--trainer.total-steps", steps, ranks=ranks)
        assert done.returncode == 0, done.stdout
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_another_optimizer_or_freeze_than_the_checkpoint_s(sources, tmp_path):
    assert train(tmp_path / "run", sources, "--trainer.total-steps", 2).returncode == 0
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 3, "--trainer.optimizer", "adafactor")
    assert done.returncode == 1 and "another trainer.optimizer or trainer.freeze" in done.stdout, done.stdout


def test_gradient_accumulation_must_agree(sources, tmp_path):
    done = train(tmp_path / "run", sources, "--trainer.gradient-accumulation", 3)
    assert done.returncode == 1 and "= 8 / (1 x 2) = 4" in done.stdout, done.stdout
    done = train(tmp_path / "run", sources, "--trainer.gradient-accumulation", 4, "--trainer.total-steps", 1)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    compare()
