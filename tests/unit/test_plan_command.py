"""The plan command names the samples that a stream yields."""

import subprocess
import sys

import pytest
import torch

from launch.plan import main
from tests.make_source import make_source
from tinyflux.shards.stream import DataConfig, Stream, open_sources

STEP = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    shapes = ((4, 4), (2, 8))
    b = make_source(folder / "b", (6, 6), "b", dataset_id=2, shapes=shapes, captions=2)
    options = {"captions": [3, 1], "groups": ("text",), "base": b}
    more = make_source(folder / "b-text", (6, 6), dataset_id=2, shapes=shapes, **options)
    urls = [str(make_source(folder / "a", (5, 3, 4), "a")), str(more)]
    options = {"global_batch_size": 8, "micro_batch_size": 2, "unit": 2, "seed": 3, "val_fraction": 0.2}
    text = f"[data]\nsources = {urls}\nweights = [0.75, 0.25]\n"
    text += "\n".join(f"{key} = {value}" for key, value in options.items())
    (folder / "run.toml").write_text(f"{text}\n[trainer]\nnot_looked_at = 1\n")
    return folder / "run.toml", DataConfig(urls, [0.75, 0.25], **options)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_names_what_a_stream_yields(config, capsys, ranks):
    file, data = config
    assert main(["--config", str(file), "--step", str(STEP), "--ranks", str(ranks)]) == 0
    samples, shares, layers = capsys.readouterr().out.split("\n\n")
    said = [line.split() for line in samples.splitlines()[2:]]
    expected, sources = [], open_sources(data)
    for rank in range(ranks):
        with Stream(sources, data, rank, ranks, start_step=STEP) as stream:
            for _ in range(stream.accumulation):
                batch = next(stream)
                for i, key in enumerate(batch["keys"]):
                    source, position = sources[batch["source_index"][i]], int(batch["local_indices"][i])
                    shard = max(k for k, start in enumerate(source.manifest.starts) if start <= position)
                    row = position - source.manifest.starts[shard]
                    shape = "x".join(map(str, batch["latents"].shape[2:]))
                    where = (source.name, shape, source.manifest.shards[shard].name, row)
                    file, count = source.open(shard), int(source.captions[position])
                    texts = [file.decode(row, caption=n)["t5_embeds"] for n in range(count)]
                    caption = next(n for n in range(count) if torch.equal(texts[n], batch["t5_embeds"][i]))
                    prompt = file.meta(row)["prompts"][caption].split()
                    which = f"{caption + 1}/{count}"
                    expected.append([*map(str, (rank, int(batch["slots"][i]), *where, which, key)), *prompt])
    assert said == expected
    rows = [line.split() for line in shares.splitlines()[1:]]
    assert [line.split()[:3] for line in layers.splitlines()[1:]] == [
        ["a", "base", "latents,"],
        ["b", "base", "latents,"],
        ["b", "overlay", "text"],
    ]
    assert [row[:4] for row in rows] == [["a", "35", "72.9167%", "75.0000%"], ["b", "13", "27.0833%", "25.0000%"]]


def test_options_override_the_file(config, capsys):
    assert main(["--config", str(config[0]), "--step", "0", "--data.global-batch-size", "4"]) == 0
    assert "step 0, seed 3: 4 samples" in capsys.readouterr().out


FAULTS = {
    "no sources": ([], "data.sources is empty"),
    "no such source": (["--data.sources", "/nowhere"], "there is no folder /nowhere"),
    "no such file": (["--config", "nowhere.toml"], "nowhere.toml"),
    "ranks that don't divide": (["--ranks", "3"], "must be a multiple of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line(capsys, name):
    arguments, message = FAULTS[name]
    assert main(["--step", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_as_a_command(config):
    command = [sys.executable, "launch/plan.py", "--config", str(config[0]), "--step", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr and "passes" in done.stdout, done.stderr
