"""Portraits and landscapes, from the folder to pictures of three shapes, by the real commands."""

from PIL import Image

from launch import sample
from sharding import build
from tests.training import ROOT, options_of, records, run_ranks
from tinyflux.model.tiny import shapes
from tinyflux.shards.manifest import Manifest

NETWORK = {
    "hidden_size": 32, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6),
    "num_double_layers": 1, "num_single_layers": 1, "lune_hidden_dim": 16, "sol_hidden_dim": 8,
}  # fmt: skip
SIZES = {(64, 64): 10, (56, 80): 8, (80, 56): 6}  # height, width in pixels of the nearest shape: how many pictures


def test_a_folder_of_portraits_and_landscapes(tmp_path, one_thread, monkeypatch, capsys):
    """Built with --shapes auto, trained on two ranks, drawn in each of its shapes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, (height, width) in enumerate(size for size, count in SIZES.items() for _ in range(count)):
        picture, caption = shapes.render(number)
        picture.resize((3 * width, 3 * height)).save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text(caption)
    options = ("--kind", "imagefolder", "--zoo", "tiny", "--shapes", "auto", "--shard-size", "4", "--device", "cpu")
    assert build.main(["--source", "photos", "--out", "built", *options]) == 0
    printed = capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "built")
    assert sorted(manifest.shapes) == [(7, 10), (8, 8), (10, 7)] and "pixels cut" in printed
    train = ("--data.global-batch-size", 8, "--data.unit", 4, "--data.micro-batch-size", 4, "--trainer.total-steps", 6)
    settings = ("--trainer.dtype", "float32", "--trainer.zoo", "tiny", "--trainer.sample-every", 0)
    words = ["--data.sources", "built", "--run-dir", "run", *options_of("model", NETWORK), *train, *settings]
    status = run_ranks([ROOT / "launch/train.py", *words], 2, tmp_path / "log")
    assert status == 0, (tmp_path / "log").read_text()
    steps = records(tmp_path / "run")
    assert len(steps) == 6 and all(0 < step["loss"] < 100 for step in steps)
    for height, width in SIZES:
        words = ["--prompt", shapes.render(0)[1], "--steps", 2, "--height", height, "--width", width, "--out", "a.png"]
        assert sample.main(["--checkpoint", "run", *map(str, words)]) == 0
        assert Image.open("a.png").size == (width, height)
        said = capsys.readouterr()
        assert "no training image was" not in said.out + said.err
