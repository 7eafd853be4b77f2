import pytest
import torch

from tests.training import FITTED, TINY
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.trainer.config import ParallelConfig
from tinyflux.trainer.parallel import freeze, prepare_block

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


def test_freeze():
    model = TinyFluxDeep(CONFIG)
    freeze(model, ["double_blocks", "single_blocks.*.mlp", "txt_in.bias"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "txt_in.bias" in frozen and "txt_in.weight" not in frozen
    assert "single_blocks.1.mlp.fc1.weight" in frozen and "single_blocks.1.norm2.weight" not in frozen
    assert all(name in frozen for name, _ in model.named_parameters() if name.startswith("double_blocks."))
    with pytest.raises(ValueError, match="'double' names no parameter. The parts are img_in"):
        freeze(model, ["double"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, ["*"])


def test_bad_parallel_config():
    with pytest.raises(ValueError, match="parallel.shard_size is -1"):
        ParallelConfig(shard_size=-1)
