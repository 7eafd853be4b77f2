"""Loading and saving weights: the published layout both ways, every kind of source, and every kind of bad file."""

import logging
import os
import pickle

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.forked import Forked
from tests.hub import serve
from tests.reference_model import ReferenceTinyFlux
from tests.training import environment
from tinyflux.model.loader import (
    CheckpointError,
    from_pretrained,
    from_published,
    load_checkpoint,
    load_model,
    save_published,
    to_published,
)
from tinyflux.model.locate import pick_weights
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep

TINY = TinyFluxConfig(
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    num_double_layers=1,
    num_single_layers=1,
    axes_dims_rope=(4, 6, 6),
    lune_expert_dim=12,
    lune_hidden_dim=8,
    sol_hidden_dim=8,
)
HEADS = ("use_lune_expert", "use_sol_prior", "use_t5_vec")


def published(config: TinyFluxConfig = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """A published checkpoint's entries, as the reference network names and shapes them, none of them trivial."""
    torch.manual_seed(seed)
    state = ReferenceTinyFlux(config).state_dict()
    state = {k: v if k.startswith("rope.") else torch.randn(v.shape) for k, v in state.items()}
    if config.use_sol_prior:
        state["sol_prior.spatial_to_qk_scale.weight"] = torch.zeros(config.num_attention_heads, 1)
        state["sol_prior.spatial_to_qk_scale.bias"] = torch.ones(config.num_attention_heads)
    return state


def same(a: dict, b: dict) -> bool:
    """The same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].contiguous().flatten().view(torch.uint8).equal(b[k].contiguous().flatten().view(torch.uint8))
        for k in a
    )


def weight(model: TinyFluxDeep) -> torch.Tensor:
    return model.img_in.weight


@pytest.fixture
def folder(tmp_path):
    """A published folder: config.json, model.safetensors (seed 0), ema.safetensors (seed 1)."""
    TINY.save_json(tmp_path / "config.json")
    save_file(published(seed=0), tmp_path / "model.safetensors")
    save_file(published(seed=1), tmp_path / "ema.safetensors")
    return tmp_path


@pytest.mark.parametrize("off", [(), ("use_lune_expert",), ("use_sol_prior",), ("use_t5_vec",), HEADS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_identical(tmp_path, off, dtype):
    config = TinyFluxConfig.from_dict(TINY.to_dict() | dict.fromkeys(off, False))
    state = {key: value.to(dtype) for key, value in published(config).items()}
    assert same(to_published(from_published(state, config), config), state)
    save_file(state, tmp_path / "model.safetensors")
    config.save_json(tmp_path / "config.json")
    model = load_model(tmp_path)
    assert weight(model).dtype == dtype and not model.training
    save_published(model, tmp_path / "out" / "model.safetensors")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), state)
    assert TinyFluxConfig.from_json(tmp_path / "out" / "config.json") == config
    assert [key for key in state if "spatial_to_qk_scale" in key] == [] or config.use_sol_prior


def test_full_size_layout():
    config = TinyFluxConfig()
    with torch.device("meta"):
        state = to_published(TinyFluxDeep(config).state_dict(), config)
        expected = ReferenceTinyFlux(config).state_dict()
    assert len(state) == 683
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert [list(state[f"rope.freqs_{i}"].shape) for i in range(3)] == [[8], [28], [28]]
    theta = [10000 ** (-2 * j / 56) for j in range(28)]
    torch.testing.assert_close(state["rope.freqs_1"], torch.tensor(theta))


def test_unused_entries_are_dropped_and_written_as_published():
    state = published()
    odd = state | {"sol_prior.spatial_to_qk_scale.bias": torch.full((2,), 7.0)}
    loaded = from_published(odd, TINY)
    assert not any("spatial_to_qk_scale" in key or key.startswith("rope.") for key in loaded)
    assert same(to_published(loaded, TINY), state)
    with pytest.raises(CheckpointError, match="rope.freqs_1 is not that of theta 10000"):
        from_published(state | {"rope.freqs_1": state["rope.freqs_1"] * 1.1}, TINY)


def test_compiled_and_wrapped_names():
    state = published()
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    assert same(to_published(from_published(compiled, TINY), TINY), state)
    model = TinyFluxDeep(TINY)
    model.single_blocks[0] = torch.compile(model.single_blocks[0])
    assert any("_orig_mod" in key for key in model.state_dict())
    assert to_published(model.state_dict(), TINY).keys() == state.keys()
    with pytest.raises(CheckpointError, match="img_in.bias is there twice"):
        from_published(state | {"_orig_mod.img_in.bias": state["img_in.bias"]}, TINY)


def test_every_misfit_is_listed(folder):
    state = published()
    del state["img_in.bias"], state["double_blocks.0.attn.txt_qkv.weight"]
    state |= {"extra.weight": torch.zeros(3), "final_norm.weight": torch.ones(31), "txt_in.bias": torch.ones(32).int()}
    state["text_balance"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    for line in (
        "model.safetensors: 6 entries do not fit",
        "missing img_in.bias [32]",
        "missing double_blocks.0.attn.txt_qkv.weight [96, 32]",
        "unexpected extra.weight [3]",
        "final_norm.weight has shape [31] instead of [32]",
        "text_balance has shape [1] instead of []",
        "txt_in.bias has dtype torch.int32",
    ):
        assert line in str(error.value)
    with pytest.raises(CheckpointError, match="missing img_in.bias"):
        to_published({k: v for k, v in TinyFluxDeep(TINY).state_dict().items() if k != "img_in.bias"}, TINY)


PICKS = {
    # names in a folder: picked without EMA, with EMA
    ("model.safetensors", "ema.safetensors"): ("model.safetensors", "ema.safetensors"),
    ("step_9.safetensors", "step_10.safetensors", "step_9_ema.safetensors", "step_10_ema.safetensors"): (
        "step_10.safetensors",
        "step_10_ema.safetensors",
    ),
    ("step_100_ema.safetensors", "step_20_ema.safetensors", "best_ema.safetensors", "config.json"): (
        "step_100_ema.safetensors",
        "step_100_ema.safetensors",
    ),
    ("best.safetensors", "best_ema.safetensors", "notes.txt"): ("best.safetensors", "best_ema.safetensors"),
    ("model.safetensors", "tiny_ema.safetensors"): ("model.safetensors", "tiny_ema.safetensors"),
    ("step_5.pt", "step_4_ema.safetensors"): ("step_5.pt", "step_4_ema.safetensors"),
    ("lone.safetensors",): ("lone.safetensors", "lone.safetensors"),
    ("config.json", "step_3"): (None, None),
}


@pytest.mark.parametrize(("names", "picked"), PICKS.items(), ids=str)
def test_which_file_of_a_folder(names, picked):
    assert (pick_weights(names, False), pick_weights(names, True)) == picked
    assert (pick_weights(reversed(names), False), pick_weights(reversed(names), True)) == picked


def test_sources(folder, caplog):
    raw, ema = published(seed=0)["img_in.weight"], published(seed=1)["img_in.weight"]
    assert weight(load_model(folder)).equal(raw)
    assert weight(load_model(str(folder), use_ema=True)).equal(ema)
    assert weight(from_pretrained(folder)).equal(ema)
    assert weight(load_model(folder / "ema.safetensors")).equal(ema)
    assert weight(load_model(folder, dtype=torch.bfloat16)).equal(raw.bfloat16())
    (folder / "checkpoints").mkdir()
    (folder / "ema.safetensors").rename(folder / "checkpoints" / "step_7_ema.safetensors")
    (folder / "model.safetensors").unlink()
    for source in (folder, folder / "checkpoints"):  # a run folder: config.json above
        with caplog.at_level(logging.WARNING):
            assert weight(load_model(source)).equal(ema)
        assert "no trained weights here: loading step_7_ema.safetensors" in caplog.text
    assert load_checkpoint(folder)["step"] == 7
    save_file(published(), folder / "checkpoints" / "a.safetensors")
    save_file(published(), folder / "checkpoints" / "b.safetensors")
    with pytest.raises(CheckpointError, match="both b.safetensors and a.safetensors match"):
        load_model(folder)


def test_mixed_dtypes_become_the_wider(tmp_path):
    TINY.save_json(tmp_path / "config.json")
    state = published()
    state["img_in.weight"] = state["img_in.weight"].half()
    save_file(state, tmp_path / "model.safetensors")
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def test_training_checkpoint(tmp_path):
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": published(seed=0), "ema": published(seed=1), "optimizer": optimizer, "scheduler": None}
    content |= {"step": 5000, "epoch": 2, "best_loss": 0.5, "trainer_config": {"shift": 3.0}}
    content["model_config"] = TINY.to_dict()
    path = tmp_path / "step_5000.pt"
    torch.save(content, path)
    checkpoint = load_checkpoint(path)
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["best_loss"]) == (5000, 2, 0.5)
    assert isinstance(checkpoint["model"], TinyFluxDeep) and checkpoint["model"].config == TINY
    assert same(to_published(checkpoint["model"].state_dict(), TINY), content["model"])
    checkpoint["model"].load_state_dict(checkpoint["ema"])
    assert same(to_published(checkpoint["model"].state_dict(), TINY), content["ema"])
    assert checkpoint["optimizer"] == optimizer and checkpoint["trainer_config"] == {"shift": 3.0}
    assert weight(load_model(path)).equal(content["model"]["img_in.weight"])
    assert weight(load_model(path, use_ema=True)).equal(content["ema"]["img_in.weight"])
    TINY.save_json(tmp_path / "config.json")
    torch.save(content["model"], tmp_path / "plain.pt")  # nothing but a state dict
    assert weight(load_model(tmp_path / "plain.pt")).equal(content["model"]["img_in.weight"])
    assert load_checkpoint(tmp_path / "plain.pt")["step"] is None


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickle_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": published(), "step": Bomb()}, "step_1.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    for path in ("step_1.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=f"{path} is refused: it contains more than tensors"):
            load_checkpoint(path)
    assert not os.path.exists("exploded")


@pytest.mark.parametrize("size", [0, 4, 100, -1000, -1])
def test_truncated_files(folder, size):
    torch.save({"model": published()}, folder / "step_1.pt")
    for name in ("model.safetensors", "step_1.pt"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=f"{name} is (damaged or cut short|refused)"):
            load_model(folder / name)


def test_places_that_cannot_be(folder):
    for given, message in (
        ({"dtype": torch.int8}, "dtype torch.int8: models are loaded in torch.float32"),
        ({"device": "hpu:7"}, "device hpu:7 cannot be used here"),
        ({"device": "gpu"}, "device gpu cannot be used here: Expected one of cpu, cuda"),
    ):
        for load in (load_model, load_checkpoint):
            with pytest.raises(ValueError, match=message):
                load(folder / "model.safetensors", **given)


def test_missing_config(folder, caplog):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no config.json beside it, .* do not fit"):
        load_model(folder)
    (folder / "config.json").write_text('{"hidden_size": 32, "depth": 3}')
    with pytest.raises(ValueError, match="config.json: unknown model config keys: depth"):
        load_model(folder)


def test_missing_config_with_the_default_shapes(tmp_path, caplog):
    with torch.device("meta"):
        shapes = to_published(TinyFluxDeep().state_dict(), TinyFluxConfig())
    torch.save({"model": {k: torch.empty(0).expand(0) for k in shapes}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="with the default config 683 entries do not fit"):
        load_model(tmp_path / "a.pt")
    # one value for a whole tensor: full size, small file
    state = {k: torch.full((), 0.5, dtype=torch.bfloat16).expand(v.shape) for k, v in shapes.items()}
    state |= {k: v.bfloat16() for k, v in published(TinyFluxConfig(num_double_layers=0, num_single_layers=0)).items()}
    torch.save({"model": state}, tmp_path / "b.pt")
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path / "b.pt")
    assert "every entry fits the default config, which is used" in caplog.text
    assert model.config == TinyFluxConfig() and model.num_parameters() == 245_347_226


def test_saving(tmp_path, monkeypatch):
    model = TinyFluxDeep(TINY)
    path = tmp_path / "run" / "step_3.safetensors"
    save_published(model.state_dict(), path, TINY)
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "step_3.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="pass its config"):
        save_published(model.state_dict(), path)
    with pytest.raises(ValueError, match="written as .safetensors"):
        save_published(model, tmp_path / "model.pt")
    other = TinyFluxConfig.from_dict(TINY.to_dict() | {"num_single_layers": 2})
    with pytest.raises(ValueError, match="config.json is another model's"):
        save_published(TinyFluxDeep(other), path)
    with pytest.raises(CheckpointError, match="missing single_blocks.1"):
        save_published(model.state_dict(), path, other)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "step_3.safetensors"]


def test_disk_full_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.safetensors"
    save_published(TinyFluxDeep(TINY), path)
    before = path.read_bytes()
    code = "import sys; from tests.unit.test_loader import *; save_published(TinyFluxDeep(TINY), sys.argv[1])"
    process = Forked(["-c", code, path], environment(), file_limit=5000)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "File too large" in said
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .safetensors or .pt weights in this folder"):
        load_model(tmp_path)
    for source in (tmp_path / "model.safetensors", "checkpoints/step_5.pt", "not a repo", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            load_model(source)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="weights are .safetensors or .pt files"):
        load_model(tmp_path / "weights.bin")


def test_hub(folder, tmp_path_factory, monkeypatch, caplog):
    """Repositories, folders in them and revisions, from a local hub, and then from the cache only."""
    raw, ema = published(seed=0)["img_in.weight"], published(seed=1)["img_in.weight"]
    (folder / "runs" / "a").mkdir(parents=True)
    save_file(published(seed=2), folder / "runs" / "a" / "step_30_ema.safetensors")
    save_file(published(seed=3), folder / "runs" / "a" / "step_4_ema.safetensors")
    old = tmp_path_factory.mktemp("old")
    TINY.save_json(old / "config.json")
    save_file(published(seed=4), old / "model.safetensors")
    cache = tmp_path_factory.mktemp("cache")
    with serve({"user/tiny": {"main": folder, "v1": old}}, cache, monkeypatch) as hub:
        assert weight(from_pretrained("user/tiny")).equal(ema)
        assert hub.fetched == ["user/tiny/ema.safetensors", "user/tiny/config.json"]  # no more than it needs
        assert weight(load_model("user/tiny")).equal(raw)
        step = published(seed=2)["img_in.weight"]
        assert weight(from_pretrained("user/tiny:runs/a")).equal(step)  # config.json from the folder above
        with caplog.at_level(logging.WARNING):
            assert weight(from_pretrained("user/tiny", revision="v1")).equal(published(seed=4)["img_in.weight"])
        assert "no averaged (EMA) weights here: loading model.safetensors" in caplog.text
        with pytest.raises(RepositoryNotFoundError, match="user/other"):
            from_pretrained("user/other")
        with pytest.raises(RevisionNotFoundError):
            from_pretrained("user/tiny", revision="v2")
        with pytest.raises(FileNotFoundError, match="user/tiny:runs has no .safetensors"):
            load_model("user/tiny:runs")
    with pytest.raises(ConnectionError, match="user/tiny: no answer from the Hub .* HF_HUB_OFFLINE=1"):
        from_pretrained("user/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weight(from_pretrained("user/tiny")).equal(ema)
    assert weight(from_pretrained("user/tiny:runs/a")).equal(step)
