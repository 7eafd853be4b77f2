"""The network against the plain reference, in values and gradients, and in every way it is used."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from tests.reference_model import ReferenceTinyFlux
from tinyflux.model.loader import from_published, published_shapes
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep, flops_per_sample
from tinyflux.trainer.parallel import process_group

TINY = TinyFluxConfig(
    hidden_size=64,
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=4,
    joint_attention_dim=48,
    pooled_projection_dim=40,
    num_double_layers=2,
    num_single_layers=2,
    axes_dims_rope=(8, 12, 12),
    lune_expert_dim=56,
    lune_hidden_dim=24,
    sol_hidden_dim=16,
)
B, L, H, W = 3, 7, 6, 6


def tiny(**changes) -> TinyFluxConfig:
    return dataclasses.replace(TINY, **changes)


def pair(config: TinyFluxConfig, seed: int = 0) -> tuple[TinyFluxDeep, ReferenceTinyFlux]:
    """Our network and the reference with the same weights, none of them zero, in eval mode."""
    torch.manual_seed(seed)
    reference = ReferenceTinyFlux(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
            width = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.normal_(centre, width)
    model = TinyFluxDeep(config).eval()
    model.load_state_dict(from_published(reference.state_dict(), config))
    return model, reference


def inputs(config: TinyFluxConfig, h: int = H, w: int = W, teacher: bool = True) -> dict:
    torch.manual_seed(1)
    batch = {
        "hidden_states": torch.randn(B, h * w, config.in_channels),
        "encoder_hidden_states": 2 * torch.randn(B, L, config.joint_attention_dim),
        "pooled_projections": torch.randn(B, config.pooled_projection_dim),
        "timestep": torch.tensor([0.05, 0.5, 0.98]),
        "img_ids": TinyFluxDeep.create_img_ids(1, h, w)[0],
    }
    if teacher:
        batch["lune_features"] = torch.randn(B, config.lune_expert_dim)
        batch["sol_stats"] = torch.rand(B, 3)
        batch["sol_spatial"] = torch.rand(B, config.sol_spatial_size, config.sol_spatial_size)
    return batch


CASES = {
    "teacher": ({}, {}),
    "no teacher": ({}, {"teacher": False}),
    "non-square": ({}, {"h": 5, "w": 9}),
    "grid smaller than the map": ({}, {"h": 3, "w": 11}),
    "no lune": ({"use_lune_expert": False}, {}),
    "no sol": ({"use_sol_prior": False}, {}),
    "no t5 vector": ({"use_t5_vec": False}, {}),
    "no heads": ({"use_lune_expert": False, "use_sol_prior": False, "use_t5_vec": False}, {}),
    "one head, other sizes": (
        {"num_attention_heads": 1, "attention_head_dim": 64, "axes_dims_rope": (4, 24, 36), "sol_spatial_size": 5},
        {},
    ),
    "no double blocks": ({"num_double_layers": 0}, {}),
    "no single blocks": ({"num_single_layers": 0}, {}),
}


@pytest.mark.parametrize(("changes", "shape"), CASES.values(), ids=CASES)
def test_equals_the_reference(changes, shape):
    config = tiny(**changes)
    model, reference = pair(config)
    batch = inputs(config, **shape)
    ours, info = model(**batch, return_expert_pred=True)
    theirs, expected = reference(**batch)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (info["lune"] is None) == (not config.use_lune_expert) and (info["sol"] is None) == (
        not config.use_sol_prior
    )
    assert set(info) == {"lune", "sol", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(info[name], value, atol=1e-5, rtol=1e-5)
    if info["sol"]:
        assert info["sol"] == {"pred_stats": info["sol_stats_pred"], "pred_spatial": info["sol_spatial_pred"]}
        assert info["lune"] is None or info["lune"] == {"expert_pred": info["lune_pred"]}


@pytest.mark.parametrize("training", [False, True])
def test_teachers_chosen_per_sample(training):
    model, reference = pair(TINY)
    model.train(training)
    batch = inputs(TINY) | {
        "lune_teacher": torch.tensor([True, False, True]),
        "sol_teacher": torch.tensor([False, True, True]),
        "lune_dropout_mask": torch.bernoulli(torch.full((B, TINY.lune_hidden_dim), 0.9)) / 0.9,
    }
    ours, theirs = model(**batch), reference(**batch)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    all_teacher = model(**batch | {"lune_teacher": None, "sol_teacher": torch.ones(B, dtype=torch.bool)})
    torch.testing.assert_close(all_teacher[2], ours[2], atol=1e-6, rtol=1e-5)
    assert (all_teacher - ours)[:2].abs().amax(dim=(1, 2)).min() > 1e-4


def test_gradients_equal_the_reference():
    model, reference = pair(TINY)
    batch = inputs(TINY) | {
        "lune_teacher": torch.tensor([True, False, False]),
        "sol_teacher": torch.tensor([False] * B),
    }
    for network in (model, reference):
        x = batch["hidden_states"].clone().requires_grad_()
        out = network(**batch | {"hidden_states": x}, **({"return_expert_pred": True} if network is model else {}))
        loss = out[0].square().mean() + sum(out[1][key].square().mean() for key in sorted(out[1]) if "_pred" in key)
        loss.backward()
        network.x_grad = x.grad
    torch.testing.assert_close(model.x_grad, reference.x_grad, atol=1e-5, rtol=1e-3)
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = expected[name].reshape(parameter.shape)
        assert grad.norm() > 0, name
        assert (parameter.grad - grad).norm() < 1e-3 * grad.norm() + 1e-7, name


def test_calls_of_the_original():
    model, _ = pair(TINY)
    batch = inputs(TINY, teacher=False)
    full = model(**batch)
    x, t5, clip = batch["hidden_states"], batch["encoder_hidden_states"], batch["pooled_projections"]
    assert torch.equal(model(x, t5, clip, batch["timestep"]), full)  # a square grid without img_ids
    ids = TinyFluxDeep.create_img_ids(B, H, W)
    assert ids.shape == (B, H * W, 3) and ids[0, W + 2].tolist() == [0, 1, 2]
    for img_ids in (ids, ids.float().contiguous()):
        torch.testing.assert_close(model(x, t5, clip, batch["timestep"], img_ids, torch.zeros(L, 3)), full)
    for scalar in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
        torch.testing.assert_close(model(x, t5, clip, scalar), model(x, t5, clip, torch.full((B,), 0.3)))
    with pytest.raises(ValueError, match="35 image tokens are not a square grid"):
        model(x[:, :35], t5, clip, 0.3)
    with pytest.raises(ValueError, match=r"img_ids must be .* N = 36, not \[9, 3\]"):
        model(x, t5, clip, 0.3, ids[0, :9])


def test_published_size():
    with torch.device("meta"):
        model = TinyFluxDeep()
    shapes = published_shapes(model.config)
    assert len(shapes) == 683
    reference_shapes = {}
    with torch.device("meta"):
        reference_shapes = {key: value.shape for key, value in ReferenceTinyFlux(model.config).state_dict().items()}
    assert shapes == reference_shapes

    def count(prefix):
        return sum(s.numel() for key, s in shapes.items() if key.startswith(prefix) and not key.startswith("rope."))

    parts = {"": 245_347_234, "double_blocks.": 141_757_560, "single_blocks.": 98_432_200, "lune_predictor.": 2_496_257}
    parts |= {"sol_prior.": 805_712, "t5_pool.": 656_385 - 1, "text_balance": 1}
    assert {prefix: count(prefix) for prefix in parts} == parts
    assert model.num_parameters() == 245_347_234 - 8
    assert all(p.ndim > 0 for p in model.parameters()) and not list(model.buffers())


def test_initial_values():
    config = tiny(hidden_size=128, attention_head_dim=64, axes_dims_rope=(16, 24, 24), sol_geometric_weight=1.0)
    model = TinyFluxDeep(config)
    zeros = ("bias", "expert_gate", "text_balance", "final_linear.weight", "spatial_to_mod.weight")
    for name, p in model.named_parameters():
        if name.endswith("blend_gate"):
            assert p.sigmoid().item() == pytest.approx(1 - 1e-4, abs=1e-6)
        elif name.endswith(zeros):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.8 * bound < p.abs().max() <= bound and abs(p.std() / bound - 3**-0.5) < 0.15, name
    assert TinyFluxDeep(TINY).sol_prior.blend_gate.sigmoid().item() == pytest.approx(0.7)
    assert not model(**inputs(config)).any()


def test_initial_values_depend_on_the_generator_alone():
    torch.manual_seed(5)
    plain = TinyFluxDeep(TINY).state_dict()
    with torch.device("meta"):
        model = TinyFluxDeep(TINY)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.init_weights()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    model.to(torch.bfloat16).init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(value, plain[key].bfloat16()) for key, value in model.state_dict().items())


def test_freezing_a_head():
    model = TinyFluxDeep(tiny(freeze_lune=True, freeze_sol=True))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("lune_predictor.", "sol_prior."))}
    assert model.num_parameters() - model.num_parameters(trainable_only=True) > 0


def test_bfloat16_is_near_float32():
    model, _ = pair(TINY)
    batch = inputs(TINY)
    exact = model(**batch)
    low = model.bfloat16()(**batch)
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() < 0.05 * exact.norm()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(**batch) - exact).norm() < 0.05 * exact.norm()


def test_blocks_compile_whole():
    model, _ = pair(tiny(num_double_layers=1, num_single_layers=1))
    batch = inputs(TINY)
    eager = model(**batch)
    for blocks in (model.double_blocks, model.single_blocks):
        blocks[0] = torch.compile(blocks[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(**batch), eager)
    model(**batch).sum().backward()
    assert all(p.grad is not None for p in model.double_blocks.parameters())


def gradients(model, batch):
    model.zero_grad()
    model(**batch).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}


def test_activation_checkpointing_changes_nothing():
    model, _ = pair(TINY)
    batch = inputs(TINY)
    expected = gradients(model, batch)
    for block in (*model.double_blocks, *model.single_blocks):
        block.forward = lambda *args, run=block.forward: checkpoint(run, *args, use_reentrant=False)
    for name, grad in gradients(model, batch).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.fixture
def one_rank():
    with process_group(torch.device("cpu")):
        yield


def test_fully_sharded(one_rank):
    plain = TinyFluxDeep(TINY)
    with torch.device("meta"):
        model = TinyFluxDeep(TINY)
    plain.eval(), model.eval()
    mesh = dist.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in (*model.double_blocks, *model.single_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    for network in (plain, model):
        network.init_weights(torch.Generator().manual_seed(2))
        torch.nn.init.ones_(network.final_linear.weight)
    batch = inputs(TINY, teacher=False)
    torch.testing.assert_close(model(**batch), plain(**batch))
    expected = gradients(plain, batch)
    assert expected["double_blocks.0.img_norm1.linear.weight"].any()
    for name, grad in gradients(model, batch).items():
        torch.testing.assert_close(grad, expected[name])


def test_flops():
    # the products of PyTorch's own counter, on the reference network
    from torch.utils.flop_counter import FlopCounterMode

    for changes in ({}, {"use_lune_expert": False, "use_sol_prior": False, "use_t5_vec": False}):
        config = tiny(**changes)
        reference = ReferenceTinyFlux(config)
        with FlopCounterMode(display=False) as counter:
            reference(**inputs(config, teacher=False))
        counted = flops_per_sample(config, H * W, L)
        assert counted == pytest.approx(counter.get_total_flops() / B, rel=5e-3)


BAD = {
    "hidden_size 96 is not num_attention_heads x attention_head_dim = 2 x 32": {"hidden_size": 96},
    r"axes_dims_rope \(8, 12, 16\) must sum to attention_head_dim 32": {"axes_dims_rope": (8, 12, 16)},
    "model.axes_dims_rope is .* three even numbers": {"axes_dims_rope": (7, 13, 12)},
    "model.sol_geometric_weight is 1.5: it must be in": {"sol_geometric_weight": 1.5},
    "model.lune_dropout is 1.0: it must be in": {"lune_dropout": 1.0},
    "model.patch_size is 2: it must be": {"patch_size": 2},
    "model.num_single_layers is -1: it must be at least 0": {"num_single_layers": -1},
    "model.in_channels is '16': it must be an integer": {"in_channels": "16"},
    "model.use_sol_prior is 'no': it must be true or false": {"use_sol_prior": "no"},
    "model.mlp_ratio is 0.0: it must be more than 0": {"mlp_ratio": 0.0},
}


@pytest.mark.parametrize(("message", "changes"), BAD.items(), ids=[next(iter(c)) for c in BAD.values()])
def test_impossible_configs_are_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_config_files(tmp_path):
    path = tmp_path / "config.json"
    TINY.save_json(path)
    assert TinyFluxConfig.from_json(path) == TINY
    values = json.loads(path.read_text())
    assert values["axes_dims_rope"] == [8, 12, 12]
    path.write_text(json.dumps(values | {"_class_name": "TinyFluxDeep"}))
    assert TinyFluxConfig.from_json(path) == TINY
    for text, message in (
        (json.dumps(values | {"hiden_size": 64}), "unknown model config keys: hiden_size"),
        ("[1]", "not a JSON object"),
        ("{", "config.json"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json.*{message}|{message}"):
            TinyFluxConfig.from_json(path)
