"""Image files of any kind -> upright RGB squares, or a reason why not.

Rules: EXIF orientation is applied; transparency is flattened on white; 16-bit grey is scaled to 8; palette, grey and
CMYK become RGB. Rejected: what cannot be decoded in full, animations (a frame of one rarely is what the caption says;
the extra frames of MPO photographs and TIFF pages are ignored instead), too many pixels (checked before decoding),
too short a side, too long a shape.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from tinyflux.util import rng

EXTENSIONS = frozenset("jpg jpeg jpe jfif png webp gif bmp tif tiff avif jp2 ppm pgm".split())
ANIMATED = frozenset(("GIF", "PNG", "WEBP", "AVIF"))
# what Pillow's decoders raise on damaged data
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


class Rejected(Exception):
    """An input that is left out; the text is the reason, short, with the detail after a colon."""


@dataclass(frozen=True)
class Picture:
    """A square image, ready to encode, and where it was cut from."""

    pixels: np.ndarray
    """uint8 [size, size, 3]."""
    size: tuple[int, int]
    """Width and height of the upright original."""
    crop: tuple[int, int, int, int]
    """Left, top, right, bottom of the square in the upright original."""


def open_image(data: bytes | Image.Image, max_pixels: int = 100_000_000) -> Image.Image:
    """The whole image, upright, mode RGB. Raises Rejected."""
    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        width, height = image.size
        if width * height > max_pixels:
            raise Rejected(f"too many pixels: {width}x{height}, at most {max_pixels} are accepted")
        if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1:
            raise Rejected(f"animated: {image.n_frames} frames")
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise Rejected("unreadable image: not an image file of a known kind") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Rejected(f"too many pixels: {error}") from error
    except DAMAGE as error:
        raise Rejected(f"unreadable image: {str(error) or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16, I;16B, I: convert() would clip to 255 instead of scaling
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise Rejected(f"unsupported pixels: integers outside 16 bits (mode {image.mode})")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    if image.mode == "F":
        raise Rejected("unsupported pixels: floating point (mode F)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_box(width: int, height: int, rule: str, seed: int) -> tuple[int, int, int, int]:
    """The largest square of an image: left, top, right, bottom.

    `rule` center, top (of tall images; wide ones are centred) or random, which `seed` decides.
    """
    side = min(width, height)
    slack = max(width, height) - side
    offset = slack // 2
    if rule == "random":
        offset = rng.key(seed, "crop") % (slack + 1)
    elif rule == "top" and height > width:
        offset = 0
    left, top = (offset, 0) if width > height else (0, offset)
    return left, top, left + side, top + side


def prepare(
    data: bytes | Image.Image,
    size: int,
    *,
    crop: str = "center",
    seed: int = 0,
    min_side: int = 1,
    max_aspect: float = float("inf"),
    max_pixels: int = 100_000_000,
) -> Picture:
    """The image cut to its largest square by the crop rule and resized to `size` with Lanczos.

    Cutting first gives what a resize of the short side and then a crop gives, and touches fewer pixels.
    Raises Rejected.
    """
    image = open_image(data, max_pixels)
    width, height = image.size
    short, long = sorted((width, height))
    if short < min_side:
        raise Rejected(f"too small: {width}x{height}, the short side must be at least {min_side}")
    if long > max_aspect * short:
        raise Rejected(f"extreme aspect: {width}x{height}, at most {max_aspect:g}:1 is accepted")
    box = crop_box(width, height, crop, seed)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))
    return Picture(pixels, (width, height), box)


def preview(pixels: np.ndarray, side: int = 128) -> bytes:
    """A JPEG of at most `side` pixels, the same bytes every time."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85, subsampling=2, optimize=False, progressive=False)
    return out.getvalue()
