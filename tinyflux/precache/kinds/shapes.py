"""Kind "shapes": rendered coloured shapes, to try things out."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from PIL import Image

from tinyflux.model.tiny.shapes import held_out, render
from tinyflux.precache.kinds.base import ImageSource, Input
from tinyflux.util.settings import AtLeast, Within

_draw = lru_cache(maxsize=64)(render)  # an image and its caption are requested separately


@dataclass(frozen=True, kw_only=True)
class Shapes(ImageSource):
    """`count` rendered images of coloured shapes."""

    count: Annotated[int, AtLeast(1)]
    held_out: Annotated[int, Within(0, 200)] = 0
    """Number of combinations of shape and colours that are never rendered, to test whether a model can compose them."""
    keeps_order = True

    @property
    def where(self) -> str:
        return f"{self.count} rendered images"

    def inputs(self, size: int, seed: int) -> Iterator[Input]:
        for i in range(self.count):
            yield Input(f"shapes/{i}", f"{seed}", (i, seed, size))

    def read_image(self, item: Input) -> Image.Image:
        return _draw(*item.place, held_out(self.held_out))[0]

    def read_texts(self, item: Input) -> list[str]:
        return [_draw(*item.place, held_out(self.held_out))[1]]
