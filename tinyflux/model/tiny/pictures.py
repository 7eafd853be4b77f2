"""Training pictures of the tiny zoo: shapes in any colours, patterns, and crops of scikit-image's photographs."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyflux.model.tiny import patterns, shapes
from tinyflux.util.pixels import to_pixels as bytes_to_pixels

PHOTOGRAPHS = {
    "astronaut": "a portrait of a smiling astronaut in an orange suit in front of a flag",
    "brick": "a grey brick wall",
    "camera": "a black and white photo of a man with a camera on a tripod",
    "cat": "a closeup of the face of a cat with brown fur",
    "clock": "a black and white photo of a clock on a wall",
    "coffee": "a cup of coffee with a spoon on a wooden table",
    "coins": "old coins on a dark background",
    "grass": "a texture of dry grass",
    "gravel": "a texture of grey gravel stones",
    "hubble_deep_field": "many bright galaxies and stars in dark space",
    "immunohistochemistry": "brown and blue cells of a tissue",
    "moon": "the grey surface of the moon",
    "retina": "a medical image of an orange retina",
    "rocket": "a rocket on the launch pad at night",
}
HELD_OUT = ("cat", "rocket")  # never trained on


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image (a test requirement of this package), RGB."""
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError("the photographs are scikit-image's: pip install scikit-image") from error
    pixels = getattr(skimage.data, name)()
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def to_pixels(images: list[Image.Image]) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1]."""
    return bytes_to_pixels(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def shape_pictures(n: int, seed: int, size: int = 64) -> list[Image.Image]:
    """Half from the captioned series, half with two overlapping shapes in random colours and sizes."""
    draws = np.random.default_rng(seed)
    images = [shapes.render(i, seed, size)[0] for i in range(n // 2)]
    for _ in range(n - n // 2):
        pixels = draws.uniform(0, 255, 3)
        for _ in range(2):
            mask = shapes.draw("white", draws.choice(shapes.SHAPES), "black", size, draws.uniform(0, 1, 2),
                               draws.uniform(0.1, 0.5))  # fmt: skip
            cover = (np.asarray(mask, np.float32)[..., :1] - 20) / 225
            pixels = cover * draws.uniform(0, 255, 3) + (1 - cover) * pixels
        images.append(Image.fromarray(np.uint8(pixels)))
    return images


def captioned(n: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures and their captions: two thirds of them shapes, the rest patterns."""
    series = [shapes.render(i, seed) for i in range(n - n // 3)] + [patterns.render(i) for i in range(n // 3)]
    images, captions = map(list, zip(*series, strict=True))
    return images, captions


def photo_pictures(n: int, seed: int, names: tuple[str, ...] = tuple(PHOTOGRAPHS), size: int = 64) -> list[Image.Image]:
    """Random crops at random scales, flipped, half of them with their colour channels shuffled."""
    draws = np.random.default_rng(seed)
    photos = [photograph(name) for name in names]
    crops = []
    for _ in range(n):
        photo = photos[draws.integers(len(photos))]
        side = int(np.exp(draws.uniform(np.log(size), np.log(min(photo.size)))))
        x, y = (int(draws.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize((size, size), Image.Resampling.BOX, box=(x, y, x + side, y + side))
        pixels = np.asarray(crop)[:, :: draws.choice((-1, 1))]
        if draws.random() < 0.5:
            pixels = pixels[..., draws.permutation(3)]
        crops.append(Image.fromarray(np.ascontiguousarray(pixels)))
    return crops
