"""A table of awkward files in a folder of images, and the expected result for each: one real file per row."""

import io
import os
import re
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.listed import inputs_of
from tests.unit.test_images import WIDE, encoded
from tests.unit.test_sources import source
from tinyflux.precache.images import UNUSABLE, Rejected, formats, prepare, unknown
from tinyflux.precache.kinds.base import SourceError

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
formats()  # registers the plugins
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
FLAG = Image.new("RGB", (96, 64))
for corner, colour in (((0, 0), RED), ((48, 0), GREEN), ((0, 32), BLUE), ((48, 32), WHITE)):
    FLAG.paste(colour, (*corner, corner[0] + 48, corner[1] + 32))
COLOURS = [RED, GREEN, BLUE, WHITE]
GREYS = [(76,) * 3, (150,) * 3, (29,) * 3, WHITE]  # ITU-R 601 luma
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))
TOLERANCE = 14  # of lossy kinds


def flag(kind: str, mode: str = "RGB", **options) -> bytes:
    return encoded(FLAG.convert(mode), kind, **options)


def turned(orientation: int) -> bytes:
    """The flag as a camera stores it that was held otherwise."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the tag undoes
    stored = FLAG if orientation == 1 else FLAG.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)


def deep(channels: int, clear: int | None = None) -> bytes:
    """A PNG with 16 bits a channel, which Pillow does not write; `clear` is a transparent grey."""
    pixels = np.asarray(FLAG if channels == 3 else FLAG.convert("L")).astype(">u2").reshape(64, -1) * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = png(96, 64, 16, 2 if channels == 3 else 0, rows)
    return data if clear is None else data[:33] + chunk(b"tRNS", struct.pack(">H", clear)) + data[33:]


def bilevel(width: int, height: int, value: int = 0) -> Callable[[Path], None]:
    """A PNG of one bit a pixel, made when it is needed: the largest is 450 MB before it is packed, 3.6 GB to Pillow."""
    row = b"\0" + bytes([255 * value]) * ((width + 7) // 8)
    return lambda path: path.write_bytes(png(width, height, 1, 0, row * height))


def png(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    data = zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_text_bomb(path: Path) -> None:
    data = flag("PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 27)))
    path.write_bytes(data[:33] + text + data[33:])


def see_through(mode: str) -> bytes:
    """Its lower half is transparent."""
    image = FLAG.convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 32, 96, 64))
    return encoded(image.convert(mode), "PNG")


def see_through_palette() -> bytes:
    image = FLAG.quantize(4)
    blue = image.getpixel((0, 63))
    return encoded(image, "PNG", transparency=blue)


def moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def cut(kind: str) -> bytes:
    data = encoded(NOISE, kind)
    return data[: len(data) * 9 // 10]


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def size(width: int, height: int) -> bytes:
    return encoded(Image.new("L", (width, height), 9), "PNG")


def pages() -> bytes:
    return flag("TIFF", save_all=True, append_images=[Image.new("RGB", (96, 64))])


def stereo() -> bytes:
    return flag("MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))], quality=95)


def linked(to: str) -> Callable[[Path], None]:
    return lambda path: os.symlink(to, path)


def secret(path: Path) -> None:
    (path.parent.parent / "secret.png").write_bytes(flag("PNG"))
    os.symlink("../secret.png", path)


def locked(path: Path) -> None:
    path.write_bytes(flag("PNG"))
    path.chmod(0)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.png").write_bytes(flag("PNG"))
    (path / "inside.txt").write_text("a caption")


def linked_folder(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    os.symlink("../elsewhere", path)


PASSED = "skipped"
PNG = flag("PNG")
# name -> (file name, its bytes or what makes it, what becomes of it: its colours, PASSED, or why it is left out)
FILES: dict[str, tuple[str, bytes | Callable[[Path], None], list | str]] = {
    "JPEG": ("a.jpg", flag("JPEG", quality=95), COLOURS),
    "progressive JPEG": ("a.jpeg", flag("JPEG", quality=95, progressive=True), COLOURS),
    "grey JPEG": ("a.jpe", flag("JPEG", "L", quality=95), GREYS),
    "CMYK JPEG": ("a.jfif", flag("JPEG", "CMYK", quality=95), COLOURS),
    "JPEG with a damaged EXIF": ("a.jpg", flag("JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\xff\xff junk"), COLOURS),
    "JPEG with something behind it": ("a.jpg", flag("JPEG", quality=95) + bytes(5000), COLOURS),
    "stereo photograph (MPO)": ("a.jpg", stereo(), COLOURS),
    **{f"EXIF orientation {n}": ("a.jpg", turned(n), COLOURS) for n in range(1, 9)},
    "PNG": ("a.png", PNG, COLOURS),
    "16-bit colour PNG": ("a.png", deep(3), COLOURS),
    "16-bit grey PNG": ("a.png", deep(1), GREYS),
    "16-bit grey with transparency": ("a.png", deep(1, clear=29 * 257), [*GREYS[:2], WHITE, WHITE]),
    "palette PNG": ("a.png", encoded(FLAG.quantize(4), "PNG"), COLOURS),
    "palette with transparency": ("a.png", see_through_palette(), [RED, GREEN, WHITE, WHITE]),
    "transparent PNG": ("a.png", see_through("RGBA"), [RED, GREEN, WHITE, WHITE]),
    "grey with transparency": ("a.png", see_through("LA"), [*GREYS[:2], WHITE, WHITE]),
    "bilevel PNG": ("a.png", encoded(FLAG.convert("L").point(lambda x: 255 * (x > 99)).convert("1"), "PNG"),
                    [BLACK, WHITE, BLACK, WHITE]),
    "lossless WebP": ("a.webp", flag("WEBP", lossless=True), COLOURS),
    "lossy WebP": ("a.webp", flag("WEBP", quality=95), COLOURS),
    "AVIF": ("a.avif", flag("AVIF", quality=95, subsampling="4:4:4"), COLOURS),
    "HEIC": ("a.heic", flag("HEIF", quality=95), COLOURS),
    "JPEG XL": ("a.jxl", flag("JXL", quality=98), COLOURS),
    "JPEG 2000": ("a.jp2", flag("JPEG2000"), COLOURS),
    "BMP": ("a.bmp", flag("BMP"), COLOURS),
    "GIF of one frame": ("a.gif", encoded(FLAG.quantize(4), "GIF"), COLOURS),
    "PPM": ("a.ppm", flag("PPM"), COLOURS),
    "TIFF": ("a.tif", flag("TIFF"), COLOURS),
    "TIFF, LZW": ("a.tiff", flag("TIFF", compression="tiff_lzw"), COLOURS),
    "TIFF, deflate": ("a.tif", flag("TIFF", compression="tiff_adobe_deflate"), COLOURS),
    "TIFF, JPEG": ("a.tif", flag("TIFF", compression="jpeg", quality=98), COLOURS),
    "TIFF, CMYK": ("a.tif", flag("TIFF", "CMYK"), COLOURS),
    "TIFF of several pages": ("a.tif", pages(), COLOURS),
    "TIFF, 32-bit integers": ("a.tif", encoded(Image.new("I", (64, 64), 32896), "TIFF"), [(128,) * 3] * 4),
    "TIFF, wide integers": ("a.tif", encoded(Image.new("I", (64, 64), 1 << 20), "TIFF"), "unsupported pixels: int"),
    "TIFF, floating point": ("a.tif", encoded(Image.new("F", (64, 64)), "TIFF"), "unsupported pixels: floating point"),
    "TIFF, CIELAB": ("a.tif", encoded(Image.new("LAB", (64, 64), (255, 128, 128)), "TIFF"), [WHITE] * 4),
    "sRGB profile": ("a.png", flag("PNG", icc_profile=srgb()), COLOURS),
    "wide profile": ("a.png", encoded(Image.new("RGB", (64, 64), (180, 60, 60)), "PNG", icc_profile=WIDE),
                     [(190, 0, 57)] * 4),
    "wide profile, JPEG": ("a.jpg", encoded(Image.new("RGB", (64, 64), (180, 60, 60)), "JPEG", icc_profile=WIDE,
                                            quality=98), [(190, 0, 57)] * 4),
    "wide profile, transparent": ("a.png", encoded(Image.new("RGBA", (64, 64), (9, 9, 9, 0)), "PNG", icc_profile=WIDE),
                                  [WHITE] * 4),
    "no profile at all": ("a.png", flag("PNG", icc_profile=b"no profile"), COLOURS),
    "profile of another space": ("a.png", flag("PNG", "L", icc_profile=WIDE), GREYS),
    "PNG called .jpg": ("a.jpg", PNG, COLOURS),
    "two extensions": ("a.png.jpg", flag("JPEG", quality=95), COLOURS),
    "upper-case extension": ("A.PNG", PNG, COLOURS),
    "spaces": ("a  photo of (mine) .png", PNG, COLOURS),
    "newline": ("a\nb.png", PNG, COLOURS),
    "leading dash": ("-rf.png", PNG, COLOURS),
    "quotes and percent signs": ("a'\"%20%s{}.png", PNG, COLOURS),
    "composed letters (NFC)": (unicodedata.normalize("NFC", "é.png"), PNG, COLOURS),
    "decomposed letters (NFD)": (unicodedata.normalize("NFD", "é.png"), PNG, COLOURS),
    "a long name": ("x" * 250 + ".png", PNG, COLOURS),
    "a name that is not UTF-8": (os.fsdecode(b"\xff\xfe.png"), PNG, COLOURS),
    "leading dot": (".a.png", PNG, PASSED),
    "AppleDouble file": ("._a.jpg", b"\0\5\x16\7", PASSED),
    "Thumbs.db": ("Thumbs.db", b"\xd0\xcf", PASSED),
    "video": ("a.mov", b"\0\0\0\x14ftypqt", PASSED),
    "folder called .jpg": ("a.jpg", folder, {"a.jpg/inside.png": COLOURS}),
    "link to a file beside it": ("a.png", linked("other.PNG"), COLOURS),
    "broken link": ("a.png", linked("nothing.png"), "unreadable file: No such file"),
    "link to itself": ("a.png", linked("a.png"), "unreadable file: "),
    "link that leads outside": ("a.png", secret, "outside the folder"),
    "link to a folder": ("a.jpg", linked_folder, SourceError),
    "named pipe": ("a.png", os.mkfifo, "not a file"),
    "unreadable file": ("a.png", locked, COLOURS if os.geteuid() == 0 else "unreadable file: Permission denied"),
    "empty file": ("a.png", b"", "unreadable image: not an image file"),
    "text": ("a.png", b"hello", "unreadable image: not an image file"),
    "HTML": ("a.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "unreadable image: not an image file"),
    "EPS, which runs Ghostscript": ("a.jpg", flag("EPS"), "unreadable image: not an image file"),
    "truncated JPEG": ("a.jpg", cut("JPEG"), "unreadable image: .*truncated"),
    "truncated PNG": ("a.png", cut("PNG"), "unreadable image: .*truncated"),
    "truncated WebP": ("a.webp", cut("WEBP"), "unreadable image: "),
    "truncated HEIC": ("a.heic", cut("HEIF"), "unreadable image: "),
    "truncated JPEG XL": ("a.jxl", cut("JXL"), "unreadable image: "),
    "a text that unpacks to 128 MB": ("a.png", with_text_bomb, "unreadable image: "),
    "animated GIF": ("a.gif", moving("GIF"), "animated: 3 frames"),
    "animated WebP": ("a.webp", moving("WEBP"), "animated: 3 frames"),
    "animated PNG": ("a.png", moving("PNG"), "animated: 3 frames"),
    "animated AVIF": ("a.avif", moving("AVIF"), "animated: 3 frames"),
    "1x1": ("a.png", size(1, 1), "too small: 1x1"),
    "too small": ("a.png", size(60, 31), "too small: 60x31, the short side must be at least 32"),
    "a line": ("a.png", size(10000, 1), "too small: 10000x1"),
    "extreme aspect": ("a.png", size(400, 40), "extreme aspect: 400x40, at most 4:1"),
    "10000x10000": ("a.png", bilevel(10000, 10000, 1), [WHITE] * 4),
    "too many pixels": ("a.png", bilevel(10001, 10000), "too many pixels: 10001x10000"),
    "decompression bomb": ("a.png", bilevel(60000, 60000), "too many pixels: "),
    "raw photograph": ("a.cr2", b"II*\0\x10\0\0\0CR", "unreadable image: "),
    "SVG": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable image: not an image file"),
    "Photoshop file": ("a.psd", b"8BPS\0\1", "unreadable image: not an image file"),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse some of these names")
@pytest.mark.parametrize("case", FILES)
def test_what_becomes_of_it(tmp_path, case):
    name, content, expected = FILES[case]
    images = tmp_path / "images"
    images.mkdir()
    for each, data in ((name, content), ("other.PNG", PNG)):
        content(images / each) if callable(data) else (images / each).write_bytes(data)
        (images / each).with_suffix(".txt").write_text("a caption")
    files = source(tmp_path)
    if expected is SourceError:
        with pytest.raises(SourceError, match="is a link to a folder"):
            inputs_of(files)
        return
    found, remarks = {}, {}
    for item in inputs_of(files):
        assert item.origin.encode() and files.prompts(item, 0) == ["a caption"]
        try:
            picture = prepare(files.read_image(item), (64, 96), min_side=32, max_aspect=4)
            found[item.origin], remarks[item.origin] = picture.pixels, picture.remark
        except Rejected as reason:
            found[item.origin] = str(reason)
    assert found.pop("other.PNG") is not None
    if expected == PASSED:
        assert not found
        return
    ((origin, outcome),) = found.items()
    if isinstance(expected, dict):
        assert [origin] == [*expected]
        expected = expected[origin]
    if isinstance(expected, str):
        assert isinstance(outcome, str), "was taken"
        assert re.match(expected, outcome), outcome
        return
    assert not isinstance(outcome, str), outcome
    corners = [outcome[y, x] for y, x in ((8, 8), (8, 87), (55, 8), (55, 87))]
    assert np.abs(np.subtract(corners, expected)).max() <= TOLERANCE, corners
    assert remarks[origin] == (UNUSABLE if case in ("no profile at all", "profile of another space") else "")


@pytest.mark.parametrize("kind, needs", [("HEIF", "HEIC, which needs pillow-heif"), ("JXL", "JPEG XL, which needs pi")])
def test_the_missing_plugin_is_named(kind, needs):
    assert unknown(flag(kind)).startswith(needs)


def test_an_image_in_memory_may_be_of_any_kind():
    """Not its file's kind, but its pixels are what counts."""
    out = io.BytesIO(flag("PCX"))
    assert prepare(Image.open(out), (64, 96)).pixels.shape == (64, 96, 3)
