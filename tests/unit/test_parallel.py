import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from tests.training import FITTED, TINY
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.trainer import parallel
from tinyflux.trainer.config import ParallelConfig
from tinyflux.trainer.parallel import NCCL_SETTINGS, freeze, join_process_group, prepare_block, process_group

CONFIG = TinyFluxConfig(**TINY, **FITTED)


def gradients(gradient_checkpointing: str = "none", compile_mode: str | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = TinyFluxDeep(CONFIG).eval()
    torch.nn.init.normal_(model.final_linear.weight)
    for block in (*model.double_blocks, *model.single_blocks):
        prepare_block(block, gradient_checkpointing, compile_mode)
    inputs = torch.randn(2, 16, 4), torch.randn(2, 5, 24), torch.randn(2, 24), torch.rand(2)
    model(*inputs).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("gradient_checkpointing", "compile_mode"), [("selective", None), ("full", None), ("selective", "default")]
)
def test_recomputed_and_compiled_blocks_have_the_same_gradients(gradient_checkpointing, compile_mode):
    plain, other = gradients(), gradients(gradient_checkpointing, compile_mode)
    assert plain.keys() == other.keys() and len(plain) > 50
    for name, gradient in plain.items():
        assert torch.allclose(other[name], gradient, atol=1e-5), name


class Wide(nn.Linear):
    """A block that looks at the token grid, as the network's do."""

    def forward(self, x, grid):
        return x + super().forward(x).unflatten(1, grid).sin().flatten(1, 2)


class Narrow(Wide):
    def forward(self, x, grid):
        return super().forward(x, grid).relu()


@pytest.mark.parametrize("limit", [8, parallel.GRAPHS])
def test_checkpointed_blocks_of_two_kinds_stay_compiled(monkeypatch, limit):
    """In training and in sampling, with many shapes. torch's limit of 8 ends the run instead of their compilation."""
    monkeypatch.setattr(parallel, "GRAPHS", limit)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    blocks = [Wide(4, 4), Narrow(4, 4)]
    for block in blocks:
        prepare_block(block, "selective", "default")

    def run() -> None:
        for B, height, width in ((2, 4, 4), (2, 2, 8), (4, 4, 4), (1, 4, 4), (1, 3, 5)):
            for trains in (True, False):
                with torch.set_grad_enabled(trains):
                    x = torch.randn(B, height * width, 4)
                    for block in blocks:
                        x = block(x, (height, width))

    if limit == 8:
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run()
    else:
        run()
        assert 8 < counters["stats"]["unique_graphs"] < limit
    torch._dynamo.reset()


def test_nccl_knows_its_device_records_and_is_aborted(monkeypatch):
    """What torch is asked for: there need be no GPU here."""
    asked, ended = {}, []
    monkeypatch.delenv("RANK", raising=False)
    for variable in NCCL_SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: ended.append("aborted"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    join_process_group(torch.device("cpu"))
    assert (asked["backend"], asked["device_id"]) == ("gloo", None) and not NCCL_SETTINGS.keys() & os.environ
    gpu = torch.device("cuda", 1)
    with pytest.raises(KeyError), process_group(gpu):
        raise KeyError
    assert (asked["backend"], asked["device_id"]) == ("cpu:gloo,cuda:nccl", gpu) and ended == ["aborted"]
    assert all(os.environ.pop(variable) == value for variable, value in NCCL_SETTINGS.items())


def test_freeze():
    model = TinyFluxDeep(CONFIG)
    freeze(model, ["double_blocks", "single_blocks.*.mlp", "txt_in.bias"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "txt_in.bias" in frozen and "txt_in.weight" not in frozen
    assert "single_blocks.1.mlp.fc1.weight" in frozen and "single_blocks.1.norm2.weight" not in frozen
    assert all(name in frozen for name, _ in model.named_parameters() if name.startswith("double_blocks."))
    with pytest.raises(ValueError, match="'double' matches no parameter. The parts are img_in"):
        freeze(model, ["double"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, ["*"])


def test_bad_parallel_config():
    with pytest.raises(ValueError, match="parallel.shard_size is -1"):
        ParallelConfig(shard_size=-1)
