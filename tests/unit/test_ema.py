import pytest
import torch
from torch import nn

from tinyflux.trainer.ema import EMA


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def step(model, by: float = 1.0):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def test_follows_the_formula(model):
    ema, expected = EMA(model, 0.5), model.weight.detach().clone()
    for n in range(12):
        step(model)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(ema.shadow["weight"], expected, atol=1e-5)


def test_swap_needs_no_copy_and_comes_back_exactly(model):
    ema = EMA(model, 0.9)
    step(model)
    ema.update()
    trained, averaged = model.weight.detach().clone(), ema.shadow["weight"].clone()
    storage = model.weight.data_ptr()
    with ema.average_parameters():
        assert torch.equal(model.weight, averaged) and model.weight.data_ptr() == storage
        with pytest.raises(RuntimeError, match="restore"):
            ema.update()
    assert torch.equal(model.weight, trained) and torch.equal(ema.shadow["weight"], averaged)
    ema.apply_shadow()
    ema.apply_shadow()  # a second time changes nothing
    ema.restore()
    assert torch.equal(model.weight, trained)


def test_restores_after_an_error(model):
    ema, trained = EMA(model), model.weight.detach().clone()
    step(model)
    ema.update()
    with pytest.raises(KeyError), ema.average_parameters():
        raise KeyError
    assert torch.equal(model.weight, trained + 1)


def test_save_load_copy(model, tmp_path):
    ema = EMA(model, 0.9)
    step(model)
    ema.update()
    ema.save(tmp_path / "ema.safetensors")
    other = nn.Linear(3, 2)
    restored = EMA(other, 0.9)
    restored.load(tmp_path / "ema.safetensors")
    assert restored.updates == 1 and torch.equal(restored.shadow["weight"], ema.shadow["weight"])
    ema.copy_to(other)
    assert torch.equal(other.weight, ema.shadow["weight"])
    with pytest.raises(ValueError, match="bias"):
        ema.copy_to(nn.Linear(3, 2, bias=False))
    state = ema.state_dict()
    del state["shadow"]["bias"]
    with pytest.raises(ValueError, match="bias"):
        restored.load_state_dict(state)


def test_bad_decay(model):
    with pytest.raises(ValueError, match="ema_decay is 1"):
        EMA(model, 1.0)
