"""Scores of held-out samples: by the command, during training, and the meaning of each score."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.evaluate import main
from sharding import build
from tests.training import make_source, records, train
from tinyflux.model.tiny import shapes
from tinyflux.model.zoo import ModelZoo
from tinyflux.run.recorded import Recorded
from tinyflux.trainer.scores import ClipScorer, clip_scores, cmmd, frechet

TINY = ["--trainer.zoo", "tiny", "--trainer.sample-steps", 2, "--trainer.guidance-scale", 2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of four steps that evaluates twice, on the packaged small models' shapes."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "sources.toml").write_text('[shapes]\nkind = "shapes"\ndataset_id = 8\ncount = 40\n')
    words = ["--source", "shapes", "--sources", folder / "sources.toml", "--out", folder / "shapes", "--zoo", "tiny"]
    assert build.main([*map(str, words), "--threads", "1", "--device", "cpu"]) == 0
    every = ["--trainer.evaluate-every", 2, "--trainer.evaluation-samples", 5, "--data.val-fraction", 0.5]
    options = ["--trainer.total-steps", 4, "--trainer.save-every-steps", 2, *every, *TINY]
    options += ["--trainer.tensorboard-dir", "board"]
    process = train(folder / "run", [folder / "shapes"], *options)
    assert process.returncode == 0, process.stdout
    return folder / "run"


def test_in_a_training(run_dir):
    assert len(records(run_dir)) == 4
    for step in (2, 4):
        scores = json.loads((run_dir / "evaluations" / f"step_{step}_ema.json").read_text())
        assert scores["samples"] == 5 and len(scores["loss_by_t"]) == 10 and scores["held_out"]
        assert scores["clip_score"] < 50 < scores["clip_score_of_real"] and scores["cmmd"] > 0
    board = EventAccumulator(str(run_dir / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("evaluation/clip_score")] == [2, 4]
    page = (run_dir / "evaluations" / "step_4_ema.html").read_text()
    assert page.count("<figure>") == 6 and "background" in page and "data:image/png;base64" in page


def test_the_command_gives_the_scores_of_the_training(run_dir, tmp_path, capsys):
    """Zoo, guidance, seed and held-out samples come from the run; a second evaluation gives the same."""
    told = json.loads((run_dir / "evaluations" / "step_4_ema.json").read_text())
    options = ["--source", run_dir.parent / "shapes", "--samples", 5, "--steps", 2, "--out", tmp_path]
    for checkpoint in (run_dir, run_dir / "checkpoints" / "step_4"):
        assert main([str(word) for word in ("--checkpoint", checkpoint, *options)]) == 0
        path = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(".json"))
        scores = json.loads(open(path).read())
        assert scores["step"] == 4 and scores["held_out"] and scores["guidance"] == 2.0
        for key in ("loss", "clip_score", "clip_score_of_real", "cmmd"):
            assert scores[key] == pytest.approx(told[key], rel=1e-3, abs=1e-3), key
    board = EventAccumulator(str(run_dir / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("evaluation/loss")] == [2, 4, 4, 4]


def test_what_was_trained_on_and_what_does_not_fit_is_said(run_dir, tmp_path, caplog, capsys):
    options = ["--source", run_dir.parent / "shapes", "--samples", 2, "--steps", 1]
    for other in ("--val-fraction=0.9", "--seed=1"):  # the seed is that of the split too
        caplog.clear()
        assert main([str(word) for word in ("--checkpoint", run_dir, *options, other, "--out", tmp_path)]) == 0
        assert "may have been trained on" in caplog.text
    make_source(tmp_path / "other", 1)
    assert main(["--checkpoint", str(run_dir), "--source", str(tmp_path / "other"), "--out", str(tmp_path)]) == 2
    assert "have 4, 24 and 24 channels, this network takes 16, 128 and 128" in capsys.readouterr().err
    missing = ["--inception", tmp_path / "none.pth"]
    assert main([str(word) for word in ("--checkpoint", run_dir, *options, *missing)]) == 2


def test_a_run_records_what_it_has_seen(run_dir):
    recorded = Recorded.read(run_dir / "checkpoints" / "training_config.json")
    assert recorded.latent_shapes == ((8, 8),) and {"red", "circle", "background"} <= recorded.words
    assert recorded.unseen("a red hexagon") == ["hexagon"]


def test_clip_knows_which_caption_is_whose():
    zoo = ModelZoo(zoo="tiny")
    zoo.load_clip()
    scorer = ClipScorer(zoo)
    pictures, captions = zip(*(shapes.render(i, seed=99) for i in range(24)), strict=True)
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
    pixels = pixels.view(-1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    images, texts = scorer.images(pixels), scorer.texts(zoo.encode_clip(list(captions)))
    right, wrong = clip_scores(images, texts), clip_scores(images, texts.roll(1, 0))
    assert right.mean() > 85 and wrong.mean() < 30
    wide = torch.nn.functional.interpolate(pixels, size=(128, 192), mode="nearest")
    assert scorer.images(wide).shape == images.shape
    noisy = scorer.images(torch.randn(pixels.shape).clamp(-1, 1))
    assert cmmd(images, images) == pytest.approx(0, abs=1e-6)
    assert cmmd(images, noisy) > 4 * cmmd(images[:12], images[12:]) > 0


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a, b = torch.randn(4000, 3), 2 * torch.randn(4000, 3) + torch.tensor([1.0, 0, 0])
    assert frechet(a, b) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.1)  # of the means, and of the deviations
    assert frechet(a, a) == pytest.approx(0, abs=1e-3)
