"""LoRA: the effect of adapters, their two file layouts, and what is refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyflux.model.align import AlignHead
from tinyflux.model.lora import Lora, attach, detach, linear_layers, merged, read_lora
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep

CONFIG = TinyFluxConfig(
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=4,
    joint_attention_dim=12,
    pooled_projection_dim=12,
    num_double_layers=1,
    num_single_layers=1,
    lune_expert_dim=12,
    lune_hidden_dim=16,
    sol_hidden_dim=8,
)
TARGETS = ["*_blocks.*.attn.*", "single_blocks.*.mlp.*"]
RANK, ALPHA = 4, 8.0


def draw(model: torch.nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 16, 4), (2, 3, 12), (2, 12))
    with torch.no_grad():
        return model(*(torch.randn(size, generator=g) for size in sizes), torch.tensor([0.2, 0.7]))


@pytest.fixture(scope="module")
def base() -> TinyFluxDeep:
    torch.manual_seed(0)
    model = TinyFluxDeep(CONFIG).eval()
    with torch.no_grad():
        model.final_linear.weight.normal_()
    return model


@pytest.fixture(scope="module")
def trained(base) -> TinyFluxDeep:
    """A network with adapters that do something."""
    model = copy.deepcopy(base)
    attach(model, RANK, ALPHA, TARGETS)
    torch.testing.assert_close(draw(model), draw(base))  # not yet
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 16 and all(".lora_" in name for name in names)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def lora(trained) -> Lora:
    return detach(trained.state_dict(), ALPHA)[1]


def test_merged_weights_compute_the_same(base, trained, lora):
    model = TinyFluxDeep(CONFIG).eval()
    model.load_state_dict(merged(trained.state_dict(), ALPHA))
    assert (draw(trained) - draw(base)).abs().max() > 0.1
    torch.testing.assert_close(draw(model), draw(trained), atol=1e-5, rtol=1e-4)
    model.load_state_dict(detach(trained.state_dict(), ALPHA)[0])
    assert torch.equal(draw(model), draw(base))
    lora.add_to(model)
    torch.testing.assert_close(draw(model), draw(trained), atol=1e-5, rtol=1e-4)
    lora.add_to(model, strength=-1.0)
    torch.testing.assert_close(draw(model), draw(base), atol=1e-5, rtol=1e-4)


def test_a_network_without_memory_gets_the_same_values(base):
    with torch.device("meta"):
        empty, plain = TinyFluxDeep(CONFIG), copy.deepcopy(base)
    state = attach(empty, RANK, ALPHA, TARGETS, seed=3, weights=base.state_dict())
    attach(plain, RANK, ALPHA, TARGETS, seed=3)
    assert all(p.is_meta for p in empty.parameters()) and state.keys() == empty.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert attach(TinyFluxDeep(CONFIG), RANK, ALPHA, TARGETS, weights={}) == {}  # on a rank without them


def test_heads_for_training_only_are_trained_and_get_no_adapters(base):
    model = TinyFluxDeep(CONFIG, {"align": AlignHead(CONFIG.hidden_size, 0, (12, 2, 2))})
    attach(model, RANK, ALPHA, ["*"])
    heads = {name: p.requires_grad for name, p in model.named_parameters() if name.startswith("heads.")}
    assert len(heads) == 6 and all(heads.values()) and not any(".lora_" in name for name in heads)
    detach(model.state_dict(), ALPHA)[1].add_to(copy.deepcopy(base))  # it fits the network without them


def test_both_layouts(trained, lora, base, tmp_path):
    lora.save_peft(tmp_path / "peft")
    lora.save_original(tmp_path / "original.safetensors")
    keys = load_file(tmp_path / "original.safetensors")
    assert keys["single_blocks_0_attn_qkv.lora_A"].shape == (RANK, 32)
    assert keys["single_blocks_0_attn_qkv.lora_B"].shape == (96, RANK)
    for path in ("peft", "peft/adapter_model.safetensors", "original.safetensors"):
        model = copy.deepcopy(base)
        read_lora(tmp_path / path, model).add_to(model)
        torch.testing.assert_close(draw(model), draw(trained), atol=1e-5, rtol=1e-4)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft"))
    torch.testing.assert_close(draw(theirs), draw(trained))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.pop("single_blocks_0_attn_qkv.lora_B"), "missing single_blocks_0_attn_qkv.lora_B"),
        (lambda keys: keys.update(ext_double_0=torch.ones(1)), "unexpected or missing ext_double_0"),
        (lambda keys: keys.update({"x.lora_A": torch.ones(2, 3), "x.lora_B": torch.ones(3, 2)}), "has no layer x"),
        (lambda keys: keys.update({"single_blocks_0_attn_qkv.lora_A": torch.ones(5, 32)}), "do not match"),
        (lambda keys: keys.update({"single_blocks_0_attn_qkv.lora_A": torch.ones(4, 31)}), "is for [96, 31]"),
    ],
)
def test_misfits_are_refused(lora, base, tmp_path, change, message):
    lora.save_original(tmp_path / "lora.safetensors")
    keys = load_file(tmp_path / "lora.safetensors")
    change(keys)
    save_file(keys, tmp_path / "lora.safetensors")
    model = copy.deepcopy(base)
    with pytest.raises(ValueError) as error:
        read_lora(tmp_path / "lora.safetensors", model).add_to(model)
    assert message in str(error.value)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), base.parameters(), strict=True))


def test_other_faults(lora, base, tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA here"):
        read_lora(tmp_path / "none.safetensors", base)
    (tmp_path / "cut.safetensors").write_bytes(b"\x09")
    with pytest.raises(ValueError, match="is damaged"):
        read_lora(tmp_path / "cut.safetensors", base)
    lora.save_peft(tmp_path / "dora")
    config = json.loads((tmp_path / "dora/adapter_config.json").read_text())
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="only a plain LoRA"):
        read_lora(tmp_path / "dora", base)
    with pytest.raises(ValueError, match="matches no linear layer"):
        attach(copy.deepcopy(base), RANK, ALPHA, ["*.attention"])
    assert "single_blocks.0.attn.qkv" in linear_layers(base)
