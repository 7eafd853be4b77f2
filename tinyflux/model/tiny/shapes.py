"""Captioned coloured shapes: the toy pictures for training the tiny zoo and the demo's network."""

import itertools
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from tinyflux.util import rng

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
_OVERSAMPLE = 4


def caption(colour: str, shape: str, background: str) -> str:
    """E.g. "a red circle on a blue background"."""
    first, second = ("an" if name[0] in "aeiou" else "a" for name in (colour, background))
    return f"{first} {colour} {shape} on {second} {background} background"


def draw(colour: str, shape: str, background: str, size: int, centre=(0.5, 0.5), radius=0.33) -> Image.Image:
    """An RGB picture of size x size pixels; `centre` (x, y) and `radius` are fractions of its side. Antialiased."""
    big = size * _OVERSAMPLE
    image = Image.new("RGB", (big, big), COLOURS[background])
    x, y, r = centre[0] * big, centre[1] * big, radius * big
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]

    def polygon(corners: int, radii: tuple[float, ...], turn: float) -> None:
        angles = [math.pi * (2 * i / corners + turn) for i in range(corners)]
        pen.polygon(
            [(x + radii[i % len(radii)] * math.cos(a), y + radii[i % len(radii)] * math.sin(a))
             for i, a in enumerate(angles)], fill=fill,
        )  # fmt: skip

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        polygon(4, (1.2 * r,), 0.25)
    elif shape == "triangle":
        polygon(3, (1.2 * r,), -0.5)
    elif shape == "star":
        polygon(10, (1.25 * r, 0.5 * r), -0.5)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        pen.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=COLOURS[background])
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return image.resize((size, size), Image.Resampling.BOX)


def combinations() -> list[tuple[str, str, str]]:
    """Every (colour, shape, background) whose colours differ."""
    return [(a, shape, b) for a in COLOURS for shape in SHAPES for b in COLOURS if a != b]


@lru_cache
def held_out(count: int) -> frozenset[tuple[str, str, str]]:
    """`count` fixed combinations that a source leaves out."""
    every = combinations()
    return frozenset(every[i] for i in rng.permutation(len(every), "held out")[:count])


def render(
    index: int, seed: int = 0, size: int = 64, leave_out: frozenset[tuple[str, str, str]] = frozenset()
) -> tuple[Image.Image, str]:
    """Picture and caption number `index` of an endless series keyed by `seed`, without the held-out combinations.

    Shape and background colours differ; position and scale vary a little.
    """
    for attempt in itertools.count():
        start = rng.key(seed, "shapes", index, attempt) if attempt else rng.key(seed, "shapes", index)
        u = rng.splitmix64(np.uint64(start) + np.arange(6, dtype=np.uint64)) / 2.0**64
        names = list(COLOURS)
        colour = names.pop(int(u[0] * len(names)))
        background = names[int(u[1] * len(names))]
        shape = SHAPES[int(u[2] * len(SHAPES))]
        if (colour, shape, background) not in leave_out:
            break
    centre = (0.5 + 0.06 * (u[3] - 0.5), 0.5 + 0.06 * (u[4] - 0.5))
    image = draw(colour, shape, background, size, centre, 0.29 + 0.05 * u[5])
    return image, caption(colour, shape, background)
