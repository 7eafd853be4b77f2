"""Image files of every kind: what comes out upright, RGB and square, and what is rejected with which reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tinyflux.precache.images import Rejected, crop_box, open_image, prepare, preview

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width=60, height=40) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack((x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 128)), -1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = gradient()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera's tag undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_image(encoded(stored, "PNG", exif=exif))
    assert found.size == (60, 40)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


def grey16() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)), "PNG")


def rgb16() -> bytes:
    """A PNG with 16 bits a channel, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 32896, 0) * 8 for _ in range(8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def half_transparent(mode: str) -> bytes:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 4))
    return encoded(image.convert(mode), "PNG")


PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, 10, 200, 30])

# name -> (file, expected colour of the top left pixel, of the bottom right one)
KINDS = {
    "16-bit grey": (grey16(), (0, 0, 0), (255, 255, 255)),
    "16-bit colour": (rgb16(), (255, 128, 0), (255, 128, 0)),
    "32-bit integers": (encoded(Image.new("I", (8, 8), 32896), "TIFF"), (128, 128, 128), (128, 128, 128)),
    "alpha on white": (half_transparent("RGBA"), (255, 0, 0), (255, 255, 255)),
    "grey with alpha": (half_transparent("LA"), (76, 76, 76), (255, 255, 255)),
    "palette": (encoded(PALETTE, "PNG"), (10, 200, 30), (10, 200, 30)),
    "transparent palette": (encoded(PALETTE, "PNG", transparency=1), (255, 255, 255), (255, 255, 255)),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), (255, 0, 0)),
    "bilevel": (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255), (255, 255, 255)),
    "grey": (encoded(Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77), (77, 77, 77)),
    "one-frame GIF": (encoded(PALETTE, "GIF"), (10, 200, 30), (10, 200, 30)),
    "pages of a TIFF": (
        encoded(Image.new("RGB", (8, 8), "red"), "TIFF", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        (255, 0, 0),
        (255, 0, 0),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_becomes_rgb(kind):
    data, first, last = KINDS[kind]
    image = open_image(data)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == first
    assert image.getpixel((image.width - 1, image.height - 1)) == last


def test_cmyk_jpeg_is_close_to_its_colours():
    image = open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.subtract(image.getpixel((8, 8)), (255, 0, 0))).max() <= 4


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))


def cut(kind: str) -> bytes:
    """The first nine tenths of a file."""
    data = encoded(NOISE, kind)
    return data[: len(data) * 9 // 10]


REFUSED = {
    "not an image": (b"hello", "unreadable image: not an image file"),
    "empty file": (b"", "unreadable image: not an image file"),
    "truncated JPEG": (cut("JPEG"), "unreadable image: .*truncated"),
    "truncated PNG": (cut("PNG"), "unreadable image: .*truncated"),
    "truncated WebP": (cut("WEBP"), "unreadable image: "),
    "animated GIF": (animation("GIF"), "animated: 3 frames"),
    "animated WebP": (animation("WEBP"), "animated: 3 frames"),
    "animated PNG": (animation("PNG"), "animated: 3 frames"),
    "too many pixels": (encoded(Image.new("1", (2000, 1000)), "PNG"), "too many pixels: 2000x1000"),
    "decompression bomb": (encoded(Image.new("1", (60000, 60000)), "PNG"), "too many pixels: "),
    "floating point": (encoded(Image.new("F", (40, 40)), "TIFF"), "unsupported pixels: floating point"),
    "wide integers": (encoded(Image.new("I", (40, 40), 1 << 20), "TIFF"), "unsupported pixels: integers outside 16"),
    "too small": (encoded(gradient(60, 31), "PNG"), "too small: 60x31, the short side must be at least 32"),
    "extreme aspect": (encoded(gradient(400, 40), "PNG"), "extreme aspect: 400x40, at most 4:1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejected_with_its_reason(case):
    data, reason = REFUSED[case]
    with pytest.raises(Rejected, match=f"^{reason}"):
        prepare(data, 64, min_side=32, max_aspect=4, max_pixels=1_000_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_damaged_files_are_rejected_and_nothing_else(kind):
    """Bytes flipped and cut at random: a picture or a Rejected, never another exception."""
    draw, whole = random.Random(0), encoded(gradient(), kind)
    outcomes = set()
    for n in range(60):
        data = bytearray(whole[: draw.randrange(len(whole))] if n % 3 == 0 else whole)
        for _ in range(draw.randrange(10) if data else 0):
            data[draw.randrange(min(len(data), 200))] = draw.randrange(256)
        try:
            outcomes.add(prepare(bytes(data), 32).pixels.shape)
        except Rejected:
            outcomes.add("rejected")
    assert outcomes <= {(32, 32, 3), "rejected"} and "rejected" in outcomes


@pytest.mark.parametrize(
    "size, rule, box",
    [
        ((60, 40), "center", (10, 0, 50, 40)),
        ((40, 60), "center", (0, 10, 40, 50)),
        ((40, 60), "top", (0, 0, 40, 40)),
        ((60, 40), "top", (10, 0, 50, 40)),
        ((40, 40), "random", (0, 0, 40, 40)),
    ],
)
def test_crop_rules(size, rule, box):
    assert crop_box(*size, rule, seed=1) == box


def test_random_crop_is_keyed_and_reaches_both_ends():
    lefts = [crop_box(60, 40, "random", seed)[0] for seed in range(400)]
    assert lefts == [crop_box(60, 40, "random", seed)[0] for seed in range(400)]
    assert min(lefts) == 0 and max(lefts) == 20 and len(set(lefts)) == 21


def test_prepare_keeps_the_picture():
    """The middle of a gradient, resized: the colours of the middle."""
    found = prepare(encoded(gradient(120, 40), "PNG"), 64)
    assert found.size == (120, 40) and found.crop == (40, 0, 80, 40)
    assert found.pixels.shape == (64, 64, 3) and found.pixels.dtype == np.uint8
    expected = np.linspace(40 / 119 * 255, 79 / 119 * 255, 64)
    assert np.abs(found.pixels[32, :, 0] - expected).max() < 3


def test_preview_is_small_and_repeatable():
    pixels = prepare(encoded(gradient(300, 300), "PNG"), 256).pixels
    data = preview(pixels)
    assert data == preview(pixels) and len(data) < 8000
    image = Image.open(io.BytesIO(data))
    assert image.size == (128, 128) and image.format == "JPEG"
    assert Image.open(io.BytesIO(preview(pixels[:64, :64]))).size == (64, 64)
