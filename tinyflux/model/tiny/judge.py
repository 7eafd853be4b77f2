"""Check by pixels whether a drawn picture shows its prompt: the colours, and the best-fitting outline."""

from collections.abc import Iterable, Iterator, Set
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tinyflux.model.tiny import patterns, shapes
from tinyflux.model.tiny.shapes import COLOURS

REGULAR = 0.9  # least fraction of a pattern's pixels that must have their colour
ALL, NEW = "all of them", "shapes and colours that were never trained on"


class Verdict(NamedTuple):
    """Whether a picture's colours are right, whether its colours and form are right, and which form it shows."""

    colours: bool
    right: bool
    seen: str


class Prompt(NamedTuple):
    """A prompt of the demo and its content: a shape on a background, or a pattern in two colours."""

    text: str
    form: str
    first: str
    second: str


def prompts() -> Iterator[Prompt]:
    """Every possible caption of the demo's two sources."""
    for first, shape, second in shapes.combinations():
        yield Prompt(shapes.caption(first, shape, second), shape, first, second)
    for kind, first, second in patterns.combinations():
        yield Prompt(patterns.caption(kind, first, second), kind, first, second)


class Score(NamedTuple):
    """Number of prompts, of pictures with right colours, and of pictures with right colours and form."""

    prompts: int
    colours: int
    right: int

    @property
    def share(self) -> float:
        """The share of right pictures."""
        return self.right / self.prompts


def score(images: Iterable[np.ndarray], left_out: Set[tuple[str, str, str]]) -> dict[str, Score]:
    """The scores of pictures of all `prompts`, in their order: of each form, of ALL, and of the NEW ones.

    left_out: the combinations of `shapes.held_out` that the model was not trained on.
    """
    found: dict[str, list[Verdict]] = {form: [] for form in (*shapes.SHAPES, *patterns.KINDS, ALL, NEW)}
    for image, prompt in zip(images, prompts(), strict=True):
        rows = (prompt.form, ALL, NEW) if (prompt.first, prompt.form, prompt.second) in left_out else (prompt.form, ALL)
        verdict = judge(image, prompt)
        for row in rows:
            found[row].append(verdict)
    return {
        row: Score(len(verdicts), sum(v.colours for v in verdicts), sum(v.right for v in verdicts))
        for row, verdicts in found.items()
        if verdicts
    }


def judge(image: np.ndarray, prompt: Prompt) -> Verdict:
    """The verdict on a picture uint8 [H, W, 3]."""
    second = _nearer(image, prompt.second, prompt.first)  # the background of a shape
    if prompt.form in shapes.SHAPES:
        seen, fit = max(((name, _overlap(~second, name)) for name in shapes.SHAPES), key=lambda found: found[1])
        form = seen == prompt.form and 0.03 < (~second).mean() < 0.9
    else:
        found = [(kind, (patterns.mask(kind) == second).mean()) for kind in patterns.KINDS]
        seen, fit = max(found, key=lambda found: found[1])
        form = seen == prompt.form and fit >= REGULAR
    both = second.any() and not second.all()
    colours = both and (_colour(image[~second]), _colour(image[second])) == (prompt.first, prompt.second)
    return Verdict(bool(colours), bool(colours and form), seen)


def _nearer(image: np.ndarray, colour: str, other: str) -> np.ndarray:
    """Which pixels are nearer to one named colour than to the other, bool [H, W]."""
    distance = [np.abs(image.astype(int) - COLOURS[name]).sum(-1) for name in (colour, other)]
    return distance[0] < distance[1]


def _colour(pixels: np.ndarray) -> str:
    """The name of the colour nearest to the median of pixels [N, 3]."""
    median = np.median(pixels, axis=0)
    return min(COLOURS, key=lambda name: np.abs(median - COLOURS[name]).sum())


@lru_cache
def _templates(shape: str, size: int) -> np.ndarray:
    """The shape at several sizes and places, bool [K, size * size]."""
    found = []
    for radius in (0.26, 0.3, 0.34):
        drawn = np.asarray(shapes.draw("white", shape, "black", size, radius=radius))
        template = _nearer(drawn, "white", "black")
        found += [np.roll(template, (y, x), (0, 1)) for y in range(-6, 7, 2) for x in range(-6, 7, 2)]
    return np.stack(found).reshape(len(found), -1)


def _overlap(inside: np.ndarray, shape: str) -> float:
    """The best intersection over union of a mask [H, W] with the shape's templates."""
    templates, mask = _templates(shape, len(inside)), inside.reshape(-1)
    return float(((templates & mask).sum(1) / (templates | mask).sum(1)).max())
