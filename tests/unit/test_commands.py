"""`tinyflux COMMAND` runs the commands of sharding/ and launch/, and the package has the files that they need."""

import fnmatch
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def tinyflux(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_help_names_each_command_and_imports_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinyflux", "--help"])
    assert main() == 0
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in COMMANDS) and all(find_spec(m) for m, _ in COMMANDS.values())
    code = "import sys, launch.__main__; print([m for m in ('torch', 'tyro', 'numpy', 'tinyflux') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.stdout.strip() == "[]", process.stderr


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["sampel"], 2, "did you mean sample?"),
        ([], 2, "usage: tinyflux COMMAND"),
        (["verify", "nowhere"], 2, "nowhere: no such folder"),
        (["train", "--config", "smal"], 2, "did you mean small?"),
    ],
)
def test_exit_statuses_are_those_of_the_command(words, status, told):
    process = tinyflux(*words)
    assert process.returncode == status and told in process.stderr, process.stderr


def test_the_package_has_the_files_that_its_commands_need():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["launch"]
    files = ["torchrun.sh", "constraints.txt", "k8s/train.yaml"]
    files += [
        f"{path.parent.name}/{path.name}"
        for kind in ("slurm", "configs")
        for path in (ROOT / "launch" / kind).glob("*.*")
    ]
    assert len(files) > 10 and not [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in patterns)]
    for name in ("torchrun.sh", "constraints.txt"):  # links to those of the repository's folder
        assert (ROOT / "launch" / name).read_bytes() == (ROOT / name).read_bytes()
    process = subprocess.run([ROOT / "launch" / "torchrun.sh", "--help"], capture_output=True, text=True, check=True)
    assert "torchrun.sh [TORCHRUN OPTION" in process.stdout
