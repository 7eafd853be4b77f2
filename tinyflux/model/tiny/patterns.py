"""Captioned stripes and checkerboards: the demo's second source, written as an image folder."""

from pathlib import Path

import numpy as np
from PIL import Image

from tinyflux.model.tiny.shapes import COLOURS
from tinyflux.util import rng

SIZE = 64
KINDS = ("vertical stripes", "horizontal stripes", "a checkerboard")
PERIOD = 16  # pixels of a stripe or a field


def mask(kind: str) -> np.ndarray:
    """Where a pattern has its second colour, bool [SIZE, SIZE]."""
    y, x = np.indices((SIZE, SIZE)) // PERIOD
    return {"vertical stripes": x, "horizontal stripes": y, "a checkerboard": x + y}[kind] % 2 == 1


def caption(kind: str, first: str, second: str) -> str:
    """E.g. "vertical stripes in red and yellow"."""
    return f"{kind} in {first} and {second}"


def draw(kind: str, first: str, second: str) -> Image.Image:
    """A picture of SIZE x SIZE pixels that starts with the first colour."""
    pixels = np.where(mask(kind)[..., None], COLOURS[second], COLOURS[first])
    return Image.fromarray(pixels.astype(np.uint8))


def combinations() -> list[tuple[str, str, str]]:
    """Every (kind, first, second) whose colours differ."""
    return [(kind, a, b) for a in COLOURS for b in COLOURS if a != b for kind in KINDS]


def render(index: int) -> tuple[Image.Image, str]:
    """Picture and caption number `index` of an endless series that repeats all combinations in shuffled order."""
    every = combinations()
    scene = every[rng.permutation(len(every), "patterns")[index % len(every)]]
    return draw(*scene), caption(*scene)


def write_folder(folder: Path, count: int) -> None:
    """An image folder: name.png beside name.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, text = render(i)
        image.save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"{text}\n")
