"""The README's notebook section, run as it stands."""

import os
import re
from pathlib import Path

import pytest
import torch

from sharding import verify
from tests.training import records

README = Path(__file__).parents[2] / "README.md"


def blocks(section: str) -> list[str]:
    """The Python code of a section."""
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_in_a_notebook(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    notebook: dict = {"__name__": "__main__"}
    cells = blocks("In a notebook")
    assert len(cells) == 5
    for cell in cells:
        exec(compile(cell, os.fspath(README), "exec"), notebook)
    assert verify.main(["cache/portraits", "--deep"]) == verify.main(["cache/imagenet", "--deep"]) == 0
    assert len(records(tmp_path / "runs" / "notebook")) == 20
    assert notebook["total"].isfinite() and notebook["image"].shape == (1, 3, 64, 64)
    assert notebook["image"].isfinite().all() and (tmp_path / "samples.png").is_file()
