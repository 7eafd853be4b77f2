"""The optimizers on sharded parameters: the same steps as unsharded, and runs that resume exactly."""

import json
import sys
import tomllib
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the ranks run this file too

from tests.reads import Reads
from tests.training import FITTED, ROOT, TINY, curve, make_source, run_ranks, train
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep, flops_per_sample
from tinyflux.trainer.config import ParallelConfig, TrainerConfig
from tinyflux.trainer.objective import Objective
from tinyflux.trainer.optim.muon import Muon, orthogonal
from tinyflux.trainer.optim.optimizer import make_optimizer, optimizer_state, take_step
from tinyflux.trainer.optim.registry import OPTIMIZERS
from tinyflux.trainer.parallel import distribute, join_process_group, make_mesh, set_last_micro_batch

STEPS, STOP = 10, 5
WIDE = ("--model.attention-head-dim", 32, "--model.hidden-size", 64, "--model.axes-dims-rope", 8, 12, 12)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def network() -> nn.Module:
    torch.manual_seed(0)  # 33 rows: no two ranks have as many; fewer rows than ranks
    return nn.Sequential(nn.Linear(256, 33), nn.LayerNorm(33), nn.Linear(33, 33), nn.Linear(33, 33), nn.Linear(33, 1))


def groups(model: nn.Module) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def muon(model: nn.Module, *_) -> Muon:
    """What `build` makes of a TinyFluxDeep: the second matrix holds three."""
    matrices, rest = groups(model)
    stacks = dict(zip(matrices["params"], (1, 3, 1, 1), strict=True))
    return Muon(stacks, [rest], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


SHARDED = {"adamw": make_optimizer, "adamw8bit": make_optimizer, "adafactor": make_optimizer, "muon": muon}
WHOLE = {  # the same steps, or nearly
    "adamw": lambda model: torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.9, 0.95)),
    "adamw8bit": lambda model: torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.9, 0.95)),
    "adafactor": lambda model: torch.optim.Adafactor(groups(model), lr=1e-2),
    "muon": muon,
}


def compare() -> None:
    """On every rank: sharded over all ranks, or half of them, against unsharded; the state before the first step."""
    dist.init_process_group("gloo")
    meshes = [make_mesh(torch.device("cpu"), size) for size in (0, dist.get_world_size() // 2)]
    for name, mesh in product(SHARDED, meshes):
        sharded = network()
        fully_shard(sharded, mesh=mesh)
        optimizer = SHARDED[name](sharded, TrainerConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1))
        before = [p.full_tensor().clone() for p in sharded.parameters()]
        state = optimizer_state(sharded, optimizer)
        assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, sharded.parameters(), strict=True))
        assert all(entries.get("step", 0) == 0 for entries in state.values())
        assert ("exp_avg_codes" in state["0.weight"]) == (name == "adamw8bit")
        assert (state["0.weight"].keys() == {"momentum"}) == (name == "muon")
        steps(sharded, optimizer, STEPS)
        assert all(entries.get("step", STEPS) == STEPS for entries in state.values())

        whole = network()
        steps(whole, WHOLE[name](whole), STEPS)
        rough = name == "adamw8bit"
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            difference = (p.full_tensor() - q).abs()
            assert difference.max() < (2e-2 if rough else 2e-6), (name, difference.max())
            assert not rough or q.shape != (33, 256) or difference.max() > 0
    count_gathers()
    dist.barrier()
    dist.destroy_process_group()


def count_gathers() -> None:
    """All blocks except the last are gathered for the forward and again for the backward; the root once. Gradients are
    reduced in the step's last backward."""
    torch.manual_seed(0)
    model = TinyFluxDeep(TinyFluxConfig(**TINY, **FITTED))
    distribute(model, torch.device("cpu"), ParallelConfig())
    inputs = torch.randn(2, 16, 4), torch.randn(2, 5, 24), torch.randn(2, 24), torch.rand(2)
    blocks, found = len(model.double_blocks) + len(model.single_blocks), Reads()
    with found.counted():
        for last in (False, True):
            set_last_micro_batch(model, last, keep_gathered=False)
            model(*inputs).square().mean().backward()
    assert found.operations["_allgather_base_"] == 2 * (2 * blocks + 1), found.operations
    assert found.operations["_reduce_scatter_base_"] == blocks + 1, found.operations


def test_sharded_steps_are_those_of_the_whole(tmp_path):
    assert run_ranks([__file__], 4, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_muon_is_torch_s():
    """For a single matrix; torch's works in bfloat16."""
    ours, theirs = (nn.Parameter(torch.ones(48, 32)) for _ in range(2))
    optimizers = [
        Muon({ours: 1}, [], lr=1e-2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(STEPS):
        gradient = torch.randn(48, 32, generator=torch.Generator().manual_seed(step))
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).abs().max() < 0.03 * (theirs - 1).abs().max()


def few_samples() -> dict:
    """A batch whose draws are the same in every step."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"latents": (4, 4, 4), "t5_embeds": (5, 24), "clip_pooled": (24,), "lune_features": (24,)}
    sizes |= {"sol_stats": (3,), "sol_spatial": (8, 8)}
    batch = {name: torch.randn(4, *size, generator=draw) for name, size in sizes.items()}
    return batch | {"masks": None, "t": torch.tensor([0.2, 0.4, 0.6, 0.8]), "sample_seeds": torch.arange(4)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_few_samples_are_learnt(name):
    torch.manual_seed(0)
    model = TinyFluxDeep(TinyFluxConfig(**TINY, **FITTED))
    nn.init.normal_(model.final_linear.weight, std=0.1)  # zero at the start, which adafactor's steps are relative to
    join_process_group(torch.device("cpu"))
    distribute(model, torch.device("cpu"), ParallelConfig())
    config = TrainerConfig(optimizer=name, learning_rate=3e-2 if name == "adafactor" else 5e-3, use_snr_weighting=False)
    objective, optimizer, losses = Objective(model, config), make_optimizer(model, config), []
    for _ in range(40):
        loss = objective(few_samples(), 0)["main"].mean()
        loss.backward()
        take_step(optimizer, torch.zeros(()))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses


def test_orthogonal():
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT):
        u, s, vh = torch.linalg.svd(orthogonal(matrices), full_matrices=False)
        a, _, bh = torch.linalg.svd(matrices, full_matrices=False)
        assert 0.6 < s.min() and s.max() < 1.3
        torch.testing.assert_close(u @ vh, a @ bh, atol=1e-4, rtol=0)  # the same singular vectors
    assert not orthogonal(torch.zeros(1, 4, 4)).any()


def test_muon_s_share_of_a_step():
    """Products of Muon and of a step on one rank, as the presets for the whole network set it up."""
    with torch.device("meta"):
        model = TinyFluxDeep()
    optimizer = make_optimizer(model, TrainerConfig(optimizer="muon"))
    assert sum(p.numel() for p in optimizer.stacks) > 0.97 * model.num_parameters()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        optimizer._orthogonal(list(optimizer.stacks), [torch.empty_like(p) for p in optimizer.stacks])
    step = 3 * flops_per_sample(model.config, 64 * 64, 128)
    for preset, ranks, shards in (("deep-1gpu", 1, 1), ("deep-8gpu", 8, 8), ("deep-multinode", 256, 8)):
        data = tomllib.loads((ROOT / f"launch/configs/{preset}.toml").read_text())["data"]
        of_rank = data["global_batch_size"] / ranks * step
        # a rank may have one matrix of a shape more than its share
        assert counter.get_total_flops() / shards * 1.2 < 0.01 * of_rank, preset


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return [make_source(tmp_path_factory.mktemp("sources") / "a", 1)]


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "muon"])
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


def test_another_optimizer_or_freeze_than_the_checkpoint_s(sources, tmp_path):
    assert train(tmp_path / "run", sources, "--trainer.total-steps", 2).returncode == 0
    done = train(tmp_path / "run", sources, "--trainer.total-steps", 3, "--trainer.optimizer", "adafactor")
    assert done.returncode == 2 and "trainer.optimizer, trainer.freeze or" in done.stdout, done.stdout
    config = json.loads((tmp_path / "run/checkpoints/training_config.json").read_text())
    assert config["trainer"]["optimizer"] == "adamw"  # the message says to look there


def test_gradient_accumulation_must_agree(sources, tmp_path):
    done = train(tmp_path / "run", sources, "--trainer.gradient-accumulation", 3)
    assert done.returncode == 2 and "= 8 / (1 x 4) = 2" in done.stdout, done.stdout
    done = train(tmp_path / "run", sources, "--trainer.gradient-accumulation", 2, "--trainer.total-steps", 1)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    compare()
