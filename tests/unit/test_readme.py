"""Every command and snippet of the READMEs: snippets and cheap commands are run, others go through their parsers."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch import demo, plan, sample, train
from sharding import build, inspect, pull, push, verify
from tests.training import records
from tinyflux.precache.config import BuildConfig
from tinyflux.precache.sources import load_sources
from tinyflux.run import export, report
from tinyflux.shards.config import DataConfig
from tinyflux.trainer.app import AppOptions
from tinyflux.trainer.config import RunConfig, TrainerConfig, load_config
from tinyflux.trainer.drawing import SampleOptions
from tinyflux.trainer.evaluate import EvaluateOptions
from tinyflux.util import cli, settings

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "sharding/README.md", "launch/README.md", "tinyflux/README.md"]
OPTIONS = {
    "sharding.build": BuildConfig,
    "sharding.verify": verify.VerifyConfig,
    "sharding.inspect": inspect.InspectConfig,
    "sharding.push": push.PushConfig,
    "sharding.pull": pull.PullConfig,
    "launch/sample.py": SampleOptions,
    "launch/evaluate.py": EvaluateOptions,
    "launch/app.py": AppOptions,
    "tinyflux.run.export": export.Options,
    "tinyflux.run.report": report.Options,
}
FILES = {"launch/slurm/train.sbatch": "launch/train.py", "launch/slurm/build.sbatch": "sharding.build"}


def fenced(readme: str, language: str) -> list[str]:
    """The blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / readme).read_text(), re.MULTILINE | re.DOTALL)


def commands(readme: str) -> Iterator[list[str]]:
    """The words of each command, in blocks and in the text."""
    text = (ROOT / readme).read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|sbatch|pip|\./torchrun\.sh) [^`]+)`", prose)
    for block in [*fenced(readme, "bash"), *inline]:
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in shlex.split(line, comments=True):
                if word == "&&":
                    yield words
                    words = []
                else:
                    words.append(word)
            yield words


def check(words: list[str]) -> None:
    """Parse a command as the program would. Raises SystemExit, ValueError or OSError if it is refused."""
    while "=" in words[0]:
        words = words[1:]
    program, *rest = words
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(name in extras for word in rest for name in re.findall(r"\[(.*)\]", word))
        return
    if program == "pytest":
        return
    if program == "kubectl":
        assert list(yaml.safe_load_all((ROOT / rest[rest.index("-f") + 1]).read_text()))
        return
    if program in ("torchrun", "./torchrun.sh", "sbatch"):  # their own options, then a script
        if rest == ["--help"]:
            assert "usage" in subprocess.run([ROOT / program, "--help"], capture_output=True, text=True).stdout
            return
        scripts = [i for i, word in enumerate(rest) if word == "-m" or (ROOT / word).is_file()]
        assert scripts, f"{words} names no file of this repository"
        if program == "torchrun":
            from torch.distributed.run import parse_args

            parse_args(rest)
        rest = rest[scripts[0] :]
    name = rest[1] if rest[0] == "-m" else FILES.get(rest[0], rest[0])
    run(name, rest[2:] if rest[0] == "-m" else rest[1:])


def run(name: str, argv: list[str]) -> None:
    """Parse the arguments of one of this package's programs."""
    if name == "launch/train.py":
        load_config(argv, train.PRESETS)
    elif name == "launch/plan.py":
        settings.load(plan.Options, argv, presets=train.PRESETS, ignored=("model", "trainer", "parallel"))
    elif name in ("launch.demo", "tinyflux.test_training"):
        assert not argv
    elif name.startswith("tests/bench/"):
        assert (ROOT / name).is_file() and not argv
    else:
        options = cli.parse(OPTIONS[name], argv, name, None)
        if name == "sharding.build" and not options.list and options.sources is None and options.kind is None:
            assert options.source in {"portraits", *load_sources(ROOT / "sharding" / "sources.toml")}


@pytest.mark.parametrize("readme", READMES)
def test_commands_are_understood(readme, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    monkeypatch.chdir(tmp_path)
    found = [words for words in commands(readme) if words]
    assert len(found) >= 1
    for words in found:
        try:
            check(words)
        except (SystemExit, ValueError, OSError, KeyError) as error:
            pytest.fail(f"{readme}: {' '.join(words)}: {error!r}")


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m sharding.build --source portraits --shape auto",
        "python -m sharding.nothing data/portraits",
        "torchrun --nproc_per_node 8 launch/train.py --config no-preset --run-dir runs/mine",
        "torchrun --nproc_per_nodes 8 launch/train.py --config small",
        "./torchrun.sh launch/train.py --data.slots-per-streams 3",
        "sbatch launch/slurm/no.sbatch --source portraits",
        "python tests/bench/no.py",
    ],
)
def test_a_wrong_command_would_be_noticed(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError, KeyError, AssertionError)):
        check(shlex.split(wrong))


@pytest.mark.parametrize("readme", READMES)
def test_what_is_named_is_there(readme):
    """Links to files and headings, options in the text, and keys of the configuration."""
    text, folder = (ROOT / readme).read_text(), (ROOT / readme).parent
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        file = folder / path if path else ROOT / readme
        assert file.exists(), f"{readme}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target
    fields = {"data": DataConfig, "trainer": TrainerConfig}
    for group, key in re.findall(r"`(?:--)?(data|trainer)\.([a-z_-]+)", text):
        if key.rstrip("-").replace("-", "_") not in fields[group].__dataclass_fields__ and key not in ("py", "train"):
            pytest.fail(f"{readme}: {group}.{key} is no setting")
    assert RunConfig().trainer.zoo == "flux"


def test_the_example_source_is_understood(tmp_path):
    blocks = [block for readme in READMES for block in fenced(readme, "toml")]
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "sources.toml").write_text(block)
        assert load_sources(tmp_path / "sources.toml")["portraits"].crop == "top"


def test_cheap_commands(tmp_path, monkeypatch, capsys, one_thread):
    """The first command of the sharding README, then the commands that check and show its source."""
    monkeypatch.chdir(tmp_path)
    first = shlex.split(fenced("sharding/README.md", "bash")[0].splitlines()[0], comments=True)
    assert first[:5] == ["python", "-m", "sharding.build", "--source", "shapes"]
    assert build.main([*first[3:], "--limit", "12", "--shard-size", "6"]) == 0
    assert verify.main(["data/shapes", "--deep"]) == inspect.main(["data/shapes", "--html", "shapes.html"]) == 0
    assert build.main(["--list"]) == 0 and "shapes" in capsys.readouterr().out
    assert plan.main(["--data.sources", "data/shapes", "--data.global-batch-size", "8", "--step", "1"]) == 0
    [block] = fenced("sharding/README.md", "python")
    found: dict = {}
    exec(compile(block, "sharding/README.md", "exec"), found)
    assert found["latents"].ndim == 3 and found["latents"].dtype == "float16"
    assert abs(float(found["latents"].astype("float32").std())) > 0.1


def test_the_notebook(tmp_path, monkeypatch, one_thread):
    """The cells of tinyflux/README.md, in order and unchanged."""
    monkeypatch.chdir(tmp_path)
    notebook: dict = {"__name__": "__main__"}
    cells = fenced("tinyflux/README.md", "python")
    assert len(cells) == 7
    for cell in cells:
        exec(compile(cell, os.fspath(ROOT / "tinyflux/README.md"), "exec"), notebook)
    assert verify.main(["cache/portraits", "--deep"]) == verify.main(["cache/imagenet", "--deep"]) == 0
    assert len(records(tmp_path / "runs" / "notebook")) == 20
    assert notebook["total"].isfinite() and notebook["image"].shape == (1, 3, 64, 64)
    assert notebook["image"].isfinite().all() and (tmp_path / "samples.png").is_file()
    assert notebook["images"][0].size == (64, 64)
    assert json.loads((tmp_path / "my-pipeline" / "model_index.json").read_text())["_class_name"] == "TinyFluxPipeline"


def test_the_demo_is_the_command_that_ci_runs():
    run_file = (ROOT / ".ci" / "run").read_text()
    [first], [second] = fenced("README.md", "bash")[0].splitlines(), fenced("README.md", "bash")[1].splitlines()
    for command in (*first.split(" && "), *second.split(" && ")):
        plain = command.replace("pip install", "pip install -q")
        assert plain in run_file or command in run_file, command
    assert callable(demo.main) and callable(sample.main) and sys.version_info >= (3, 11)
