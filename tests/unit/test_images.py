"""Image files of every kind: which become upright RGB squares, and which are rejected with which reason."""

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from tinyflux.precache.images import (
    Rejected,
    auto_shapes,
    crop_box,
    nearest,
    open_image,
    prepare,
    preview,
    size_of,
)

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


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))


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
            outcomes.add(prepare(bytes(data), (32, 32)).pixels.shape)
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
    found = prepare(encoded(gradient(120, 40), "PNG"), (64, 64))
    assert found.size == (120, 40) and found.crop == (40, 0, 80, 40)
    assert found.pixels.shape == (64, 64, 3) and found.pixels.dtype == np.uint8
    expected = np.linspace(40 / 119 * 255, 79 / 119 * 255, 64)
    assert np.abs(found.pixels[32, :, 0] - expected).max() < 3


def test_preview_is_small_and_repeatable():
    pixels = prepare(encoded(gradient(300, 300), "PNG"), (256, 256)).pixels
    data = preview(pixels)
    assert data == preview(pixels) and len(data) < 8000
    image = Image.open(io.BytesIO(data))
    assert image.size == (128, 128) and image.format == "JPEG"
    assert Image.open(io.BytesIO(preview(pixels[:64, :64]))).size == (64, 64)


def profile(gamma: float, red: tuple[float, float]) -> bytes:
    """An ICC profile of an RGB space with that gamma and that red primary (x, y), its other colours sRGB's."""

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    white = xyz(0.3457, 0.3585)  # D50
    columns = np.stack([xyz(*red), xyz(0.30, 0.60), xyz(0.15, 0.06)], 1)
    columns = columns * np.linalg.solve(columns, white)

    def s15(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    text = b"Wide test"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(79),
        b"wtpt": b"XYZ " + bytes(4) + b"".join(map(s15, white)),
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T, strict=True):
        tags[name] = b"XYZ " + bytes(4) + b"".join(map(s15, column))
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        tags[name] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    head = struct.pack(">I4sI4s4s4s12x4s28x", 0, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head += b"".join(map(s15, (0.9642, 1.0, 0.8249))) + bytes(48)
    whole = head + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


WIDE = profile(2.2, (0.735, 0.265))


def test_transparency_stays_with_a_profile():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert open_image(encoded(image, "PNG", icc_profile=WIDE)).getpixel((2, 2)) == (255, 255, 255)


def test_nine_shapes_of_about_the_area():
    shapes = auto_shapes(512, 64)
    assert len(shapes) == 9 and (512, 512) in shapes and {(w, h) for h, w in shapes} == set(shapes)
    assert all(0.9 <= h * w / 512**2 <= 1.1 and 0.5 <= h / w <= 2 for h, w in shapes)
    assert len(auto_shapes(64, 8)) == 9
    names = {(3000, 2000): (448, 640), (2000, 3000): (640, 448), (500, 500): (512, 512), (9000, 100): (384, 704)}
    for (width, height), shape in names.items():
        assert shapes[nearest(width, height, shapes)] == shape


@pytest.mark.parametrize("shape", [(448, 640), (704, 384), (64, 64)])
def test_a_cut_has_the_aspect_of_its_shape(shape):
    for width, height in ((301, 200), (200, 301), (64, 64), (400, 100)):
        for rule in ("center", "top", "random"):
            left, top, right, bottom = crop_box(width, height, rule, 7, shape)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left, bottom - top)[width * shape[0] > height * shape[1]] in (width, height)
            assert abs((right - left) * shape[0] - (bottom - top) * shape[1]) <= max(shape)
    assert prepare(encoded(gradient(301, 200), "PNG"), shape).pixels.shape == (*shape, 3)


def test_size_by_the_header():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert size_of(encoded(gradient(60, 40), "JPEG", exif=exif)) == (40, 60)
    assert size_of(encoded(NOISE, "JPEG")[:2000]) == (80, 80)
    assert size_of(b"hello") is None
