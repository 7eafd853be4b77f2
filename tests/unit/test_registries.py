"""Help texts and READMEs name exactly what the registries have."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from sharding.pull import PullConfig
from tinyflux.precache.config import BuildConfig
from tinyflux.precache.kinds import KINDS, kind_of
from tinyflux.shards.clients import CLIENTS
from tinyflux.shards.config import DataConfig
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.drawing import SampleOptions
from tinyflux.trainer.optim.registry import OPTIMIZERS
from tinyflux.trainer.solvers import SOLVERS

ROOT = Path(__file__).parents[2]


def told(options: type, key: str) -> str:
    """The help of an option."""
    body = ast.parse(inspect.getsource(options)).body[0].body
    at = next(i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign) and node.target.id == key)
    return ast.literal_eval(body[at + 1].value)


def sentence(readme: str, start: str) -> str:
    """The sentence of a README that starts with these words."""
    return re.search(rf"{start}.*?\.\s", (ROOT / readme).read_text(), re.DOTALL)[0]


def first_column(readme: str, heading: str) -> set[str]:
    """The words in the first column of a README's table."""
    table = (ROOT / readme).read_text().partition(f"| {heading} |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| ([^|]*)", table, re.MULTILINE)
    return {word for cell in cells for word in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(
    "text",
    [
        told(DataConfig, "sources"),
        told(PullConfig, "url"),
        sentence("launch/README.md", "Sources are folders"),
        sentence("sharding/README.md", "Training reads"),
    ],
)
def test_url_schemes(text):
    assert set(re.findall(r"(\w+)://", text.replace("http(s)://", "http:// https://"))) == set(CLIENTS)


def test_source_kinds():
    assert first_column("sharding/README.md", "kind") == set(KINDS)
    named = re.search(r"file: (.*?) \(", told(BuildConfig, "kind"))[1]
    unlisted = [kind for kind in KINDS if kind_of(kind).required() == ["dataset_id", "location"]]
    assert set(re.split(r", | or ", named)) == set(unlisted)


def test_optimizers():
    assert first_column("launch/README.md", "name") == set(OPTIMIZERS)
    assert set(OPTIMIZERS) <= set(re.findall(r"\w+", told(TrainerConfig, "optimizer")))


def test_solvers():
    assert set(SOLVERS) <= set(re.findall(r"\w+", told(SampleOptions, "solver")))
    assert set(re.findall(r"`(\w+)`", sentence("launch/README.md", "Solvers are"))) == set(SOLVERS)
