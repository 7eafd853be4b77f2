"""A third teacher needs only data and settings: one feature grid per image, in an overlay, and a head for training
only."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training import curve, make_source, records, train
from tinyflux.model.align import AlignHead, pooling

SIZES = {"align_width": 12, "align_rows": 2, "align_columns": 3}
OPTIONS = ("--trainer.enable-align", "--trainer.align-block", 1, "--trainer.total-steps", 8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    plain, base = make_source(root / "plain", 1), make_source(root / "base", 2)
    return [plain, make_source(root / "aligned", 2, base=base, groups=("align",), **SIZES)]


def test_pooling_is_the_mean_of_equal_parts():
    assert pooling(4, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert torch.allclose(pooling(5, 3).sum(1), torch.ones(3)) and torch.allclose(pooling(3, 3), torch.eye(3))
    tokens = torch.arange(24.0).view(1, 24, 1)
    head = AlignHead(1, 0, (1, 2, 3))
    head.layers = torch.nn.Identity()
    expected = torch.nn.functional.adaptive_avg_pool2d(tokens.view(1, 1, 4, 6), (2, 3))
    assert torch.allclose(head(tokens, (4, 6)), expected)


def test_it_is_learnt_resumed_and_not_exported(sources, tmp_path):
    missing = train(tmp_path / "no", sources, *OPTIONS)
    assert missing.returncode == 2 and "has no align" in missing.stdout, missing.stdout
    options = (*OPTIONS, "--data.allow-missing", "plain")
    done = train(tmp_path / "one", sources, *options)
    assert done.returncode == 0, done.stdout
    for steps, ranks in ((4, 2), (8, 1)):
        done = train(tmp_path / "two", sources, *options, "--trainer.total-steps", steps, ranks=ranks)
        assert done.returncode == 0, done.stdout
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a["align"] == pytest.approx(b["align"], abs=1e-5) and a["weights"]["align"] == 0.5
    first, last = records(tmp_path / "one")[0], records(tmp_path / "one")[-1]
    assert last["align"] < first["align"]
    assert not any("align" in name for name in load_file(tmp_path / "one/checkpoints/step_8.safetensors"))
    tuned = train(tmp_path / "tuned", sources, *options, "--trainer.init-from", tmp_path / "one")
    assert tuned.returncode == 0, tuned.stdout
