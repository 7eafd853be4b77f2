"""Image files of any kind -> upright sRGB pictures of a shape, or the reason for a rejection.

Rules: EXIF orientation is applied; colours of an ICC profile are converted to sRGB; transparency is flattened on white;
16-bit grey is scaled to 8 bits; palette, grey and CMYK become RGB.

Rejected: files that cannot be decoded completely; animations (a caption rarely describes a single frame; extra frames
of MPO photographs and TIFF pages are ignored instead); too many pixels (checked before decoding); a side that is too
short; an extreme aspect.
"""

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

from tinyflux.util import rng

EXTENSIONS = frozenset("jpg jpeg jpe jfif png webp gif bmp tif tiff avif jp2 ppm pgm heic heif jxl".split())
"""Extensions that are read; .heic, .heif and .jxl only if their plugins are installed."""
PICTURES = EXTENSIONS | frozenset("cr2 cr3 nef nrw arw dng raf orf rw2 pef psd svg eps exr hdr tga".split())
"""Extensions of pictures; those that are not read are rejected if they have captions."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")
"""Accepted formats, whatever the extension. Pillow knows more, such as EPS, for which it runs Ghostscript."""
ANIMATED = frozenset(("GIF", "PNG", "WEBP", "AVIF"))
# what Pillow's decoders raise on damaged data
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip
PROFILE_FAULTS = (*DAMAGE, ImageCms.PyCMSError)
UNUSABLE = "have an ICC profile that cannot be used: their colours are taken as sRGB"
COLOURS = "sRGB of ICC profiles"


class Rejected(Exception):
    """An input is rejected. The message is a short reason, with details after a colon."""


@dataclass(frozen=True)
class Picture:
    """An image cropped to a shape, ready to encode, and its crop."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    size: tuple[int, int]
    """Width and height of the upright original."""
    crop: tuple[int, int, int, int]
    """Left, top, right, bottom of the crop in the upright original."""
    remark: str = ""
    """A problem with the image that did not lead to rejection."""


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """The FORMATS that can be read here: HEIC and JPEG XL need their plugins (the extra [images])."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    try:
        import pillow_jxl  # noqa: F401  registers itself
    except ImportError:
        pass
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def unknown(data: bytes) -> str:
    """The kind of a file that Pillow does not recognise."""
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC, which needs pillow-heif: pip install tinyflux-deep[images]"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL, which needs pillow-jxl-plugin: pip install tinyflux-deep[images]"
    return "not an image file of a known kind"


def open_image(data: bytes | Image.Image, max_pixels: int = 100_000_000) -> Image.Image:
    """The whole image, upright, mode RGB. Raises Rejected."""
    return _opened(data, max_pixels)[0]


def _opened(data: bytes | Image.Image, max_pixels: int) -> tuple[Image.Image, str]:
    """The whole image, and a remark about problems."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats()) if isinstance(data, bytes) else data
        width, height = image.size
        if width * height > max_pixels:
            raise Rejected(f"too many pixels: {width}x{height}, at most {max_pixels} are accepted")
        if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1:
            raise Rejected(f"animated: {image.n_frames} frames")
        image.load()
        return _rgb(ImageOps.exif_transpose(image)), UNUSABLE if uses_profile(image) is None else ""
    except Image.UnidentifiedImageError as error:
        raise Rejected(f"unreadable image: {unknown(data)}") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Rejected(f"too many pixels: {error}") from error
    except DAMAGE as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise Rejected(f"unreadable image: {why}") from error


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile's colours to sRGB, None if they are sRGB already. Raises as ImageCms."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def uses_profile(image: Image.Image) -> bool | None:
    """Whether the colours of an image need its ICC profile; None if the profile is unusable."""
    if (profile := image.info.get("icc_profile")) and image.mode in ("RGB", "RGBA", "P", "CMYK", "L", "LA"):
        try:
            return _to_srgb(profile, _flat(image).mode) is not None
        except PROFILE_FAULTS:
            return None
    return False


def _flat(image: Image.Image) -> Image.Image:
    """The image in a mode that colour transforms accept, without transparency."""
    return image.convert({"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode))


def _rgb(image: Image.Image) -> Image.Image:
    if uses_profile(image):
        colours = ImageCms.applyTransform(_flat(image), _to_srgb(image.info["icc_profile"], _flat(image).mode))
        if image.has_transparency_data:
            colours.putalpha(image.convert("RGBA").getchannel("A"))
        image = colours
    if image.mode.startswith("I"):  # I;16, I;16B, I: convert() would clip to 255 instead of scaling
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise Rejected(f"unsupported pixels: integers outside 16 bits (mode {image.mode})")
        pixels = np.round(grey / 257).astype(np.uint8)
        pixels[grey == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(pixels)
    if image.mode == "F":
        raise Rejected("unsupported pixels: floating point (mode F)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_box(
    width: int, height: int, rule: str, seed: int, shape: tuple[int, int] = (1, 1)
) -> tuple[int, int, int, int]:
    """The largest part of an image with the aspect of `shape`, (height, width): left, top, right, bottom.

    `rule`: center, top (for images that are too tall; others are centred) or random, keyed by `seed`.
    """
    tall, wide = shape
    across = width * tall > height * wide  # it is cut in width
    if across:
        cut = max(1, round(height * wide / tall)), height
    else:
        cut = width, max(1, round(width * tall / wide))
    slack = width - cut[0] if across else height - cut[1]
    offset = slack // 2
    if rule == "random":
        offset = rng.key(seed, "crop") % (slack + 1)
    elif rule == "top" and not across:
        offset = 0
    left, top = (offset, 0) if across else (0, offset)
    return left, top, left + cut[0], top + cut[1]


def auto_shapes(side: int, step: int) -> list[tuple[int, int]]:
    """Shapes (height, width) in steps of `step` pixels, from 1:2 to 2:1, within 10% of the square's area."""
    n = side // step
    sides = range(1, 2 * n + 1)
    fits = [(h, w) for h in sides for w in sides if max(h, w) <= 2 * min(h, w) and abs(h * w / n**2 - 1) <= 0.1]
    return [(h * step, w * step) for h, w in fits]


def nearest(width: int, height: int, shapes: Sequence[tuple[int, int]]) -> int:
    """The number of the shape (height, width) whose log aspect is nearest to the image's."""
    aspect = math.log(width / height)
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][1] / shapes[i][0]) - aspect))


def size_of(data: bytes | Image.Image) -> tuple[int, int] | None:
    """Width and height of the upright image, from its header only; None if it is unreadable."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats()) if isinstance(data, bytes) else data
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size
    except (*DAMAGE, Image.DecompressionBombError):
        return None


def content_hash(image: bytes | Image.Image, prompts: Sequence[str]) -> str:
    """A hash of an image (a file's bytes or a PIL image) and its captions."""
    found = hashlib.blake2b(image if isinstance(image, bytes) else image.tobytes(), digest_size=8)
    for prompt in prompts:
        found.update(b"\0" + prompt.encode(errors="surrogateescape"))
    return found.hexdigest()


def prepare(
    data: bytes | Image.Image,
    shape: tuple[int, int],
    *,
    crop: str = "center",
    seed: int = 0,
    min_side: int = 1,
    max_aspect: float = float("inf"),
    max_pixels: int = 100_000_000,
) -> Picture:
    """Crop the image by the rule to the aspect of `shape`, (height, width), and resize it with Lanczos.

    Cropping first gives the same as resizing first, and touches fewer pixels. Raises Rejected.
    """
    image, remark = _opened(data, max_pixels)
    width, height = image.size
    short, long = sorted((width, height))
    if short < min_side:
        raise Rejected(f"too small: {width}x{height}, the short side must be at least {min_side}")
    if long > max_aspect * short:
        raise Rejected(f"extreme aspect: {width}x{height}, at most {max_aspect:g}:1 is accepted")
    box = crop_box(width, height, crop, seed, shape)
    pixels = np.asarray(image.resize(shape[::-1], Image.Resampling.LANCZOS, box=box))
    return Picture(pixels, (width, height), box, remark)


def preview(pixels: np.ndarray, side: int = 128) -> bytes:
    """A JPEG of at most `side` pixels per side; deterministic."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85, subsampling=2, optimize=False, progressive=False)
    return out.getvalue()
