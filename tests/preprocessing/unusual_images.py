"""A folder of unusual images, with the treatment that docs/data.md documents for each file."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from preprocessing.images import EXIF_ORIENTATION

GOOD = "good"
BAD = "bad"
IGNORED = "ignored"


class Expected(NamedTuple):
    """The expected treatment of a file.

    Attributes:
        outcome: GOOD, BAD or IGNORED.
        text: The kind of a good image, or part of the reason why an image is bad.
    """

    outcome: str
    text: str = ""


ENLARGED = Expected(GOOD, "smaller than 32 pixels: enlarged")
FIRST_FRAME = Expected(GOOD, "animated or of several pages: the first")
JPEG_RGB = Expected(GOOD, "JPEG RGB")
PNG_RGB = Expected(GOOD, "PNG RGB")
ROUNDED = Expected(GOOD, "16 bits: rounded to 8")
TRANSPARENT = Expected(GOOD, "transparent: over white")
TRUNCATED = Expected(BAD, "truncated")
UNDEFINED_RANGE = Expected(BAD, "no agreed range")
UNKNOWN_FORMAT = Expected(BAD, "not one of PNG")


def _make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _make_png(
    size: tuple[int, int], depth: int, color_type: int, rows: bytes, *extra: bytes
) -> bytes:
    """Return a PNG written without PIL, with extra chunks before its data."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    data = _make_chunk(b"IDAT", zlib.compress(rows))
    chunks = [_make_chunk(b"IHDR", header), *extra, data, _make_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _make_usable_images(photo: Image.Image, rng: np.random.Generator) -> dict[str, tuple]:
    rgba = photo.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(photo.size))
    palette = photo.quantize(16)
    gray16 = Image.fromarray((np.arange(80 * 60, dtype=np.uint16) * 13).reshape(60, 80))
    rgb48 = np.zeros((60, 1 + 80 * 6), np.uint8)  # each row starts with its filter type
    rgb48[:, 1:] = rng.integers(0, 256, (60, 480), dtype=np.uint8)
    rotated = Image.Exif()
    rotated[EXIF_ORIENTATION] = 6
    animation = {"save_all": True, "append_images": [rgba]}
    pages = {"save_all": True, "append_images": [photo]}
    gif = _encode(palette, "GIF", save_all=True, append_images=[photo.quantize(8)])
    large = Image.new("RGB", (6000, 5000), "teal")
    broken_exif = b"Exif\0\0no TIFF header here"
    comment = _make_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2_000_000)))
    raw_profile = _make_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz")
    metadata = _make_chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(9_000_000)))
    jpeg = _encode(photo, "JPEG", quality=90)
    png = _encode(photo, "PNG")
    return {
        "rgb.jpg": (jpeg, JPEG_RGB),
        "UPPER.JPEG": (jpeg, JPEG_RGB),
        "progressive.jpeg": (_encode(photo, "JPEG", progressive=True), JPEG_RGB),
        "gray.jpg": (_encode(photo.convert("L"), "JPEG"), Expected(GOOD, "JPEG L")),
        "cmyk.jpg": (_encode(photo.convert("CMYK"), "JPEG"), Expected(GOOD, "JPEG CMYK")),
        "phone.jpg": (_encode(photo, "MPO", **pages), JPEG_RGB),
        "rotated.jpg": (_encode(photo, "JPEG", exif=rotated), Expected(GOOD, "turned by EXIF")),
        "broken_exif.jpg": (_encode(photo, "JPEG", exif=broken_exif), JPEG_RGB),
        "broken_exif.png": (_encode(photo, "PNG", exif=broken_exif), PNG_RGB),
        "broken_exif.webp": (_encode(photo, "WEBP", exif=broken_exif), Expected(GOOD, "WEBP RGB")),
        "broken_raw_profile.png": (
            _make_png((80, 60), 16, 2, rgb48.tobytes(), raw_profile),
            PNG_RGB,
        ),
        "long_text.png": (_make_png((80, 60), 16, 2, rgb48.tobytes(), comment), PNG_RGB),
        "long_metadata.png": (_make_png((80, 60), 16, 2, rgb48.tobytes(), metadata), PNG_RGB),
        "palette.png": (_encode(palette, "PNG"), Expected(GOOD, "PNG P")),
        "transparent_palette.png": (_encode(palette, "PNG", transparency=3), TRANSPARENT),
        "rgba.png": (_encode(rgba, "PNG"), TRANSPARENT),
        "opaque.png": (_encode(photo.convert("RGBA"), "PNG"), Expected(GOOD, "PNG RGBA")),
        "la.png": (_encode(rgba.convert("LA"), "PNG"), TRANSPARENT),
        "one_bit.png": (_encode(photo.convert("1"), "PNG"), Expected(GOOD, "PNG 1")),
        "gray16.png": (_encode(gray16, "PNG"), ROUNDED),
        "gray16.tif": (_encode(gray16, "TIFF"), ROUNDED),
        "rgb48.png": (_make_png((80, 60), 16, 2, rgb48.tobytes()), PNG_RGB),
        "animated.gif": (gif, FIRST_FRAME),
        "animated.webp": (_encode(photo, "WEBP", **animation), FIRST_FRAME),
        "animated.png": (_encode(photo, "PNG", **animation), FIRST_FRAME),
        "pages.tiff": (_encode(photo, "TIFF", **pages), FIRST_FRAME),
        "wrong_extension.jpg": (png, PNG_RGB),
        "one_pixel.png": (_encode(photo.resize((1, 1)), "PNG"), ENLARGED),
        "small.bmp": (_encode(photo.resize((20, 30)), "BMP"), ENLARGED),
        "a 'name' with \n ü.ppm": (_encode(photo, "PPM"), Expected(GOOD, "PPM RGB")),
        os.fsdecode(b"caf\xe9.png"): (png, PNG_RGB),
        "large.png": (_encode(large, "PNG"), PNG_RGB),
    }


def _make_other_files(photo: Image.Image) -> dict[str, tuple]:
    jpeg = _encode(photo, "JPEG", quality=90)
    png = _encode(photo, "PNG")
    too_large = _make_png((65535, 65535), 1, 0, bytes(1000))
    # Just above the limit, where PIL only warns: 9,460 rows of 1,183 bytes and a filter byte.
    slightly_too_large = _make_png((9460, 9460), 1, 0, bytes(9460 * 1184))
    long_text = _make_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000)))
    text_bomb = _make_png((8, 8), 8, 0, bytes(72), long_text)
    thin = Image.new("RGB", (1, 100_000))
    floating_point = Image.new("F", (40, 40), 0.5)
    int32 = Image.fromarray(np.full((40, 40), 70_000, np.int32))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], TRUNCATED),
        "truncated.png": (png[: len(png) // 2], TRUNCATED),
        "zeroed_bytes.png": (png[:60] + bytes(200) + png[260:], Expected(BAD)),
        "empty.png": (b"", Expected(BAD, "the file is empty")),
        "page.webp": (b"<html>404</html>", UNKNOWN_FORMAT),
        "script.png": (postscript, UNKNOWN_FORMAT),
        "bomb.png": (too_large, Expected(BAD, "more than 89,478,485 pixels")),
        "large.png": (slightly_too_large, Expected(BAD, "more than 89,478,485 pixels")),
        "text_bomb.png": (text_bomb, Expected(BAD, "Decompressed data too large")),
        "thin.png": (_encode(thin, "PNG"), Expected(BAD, "too long and thin")),
        "float.tiff": (_encode(floating_point, "TIFF"), UNDEFINED_RANGE),
        "int32.tiff": (_encode(int32, "TIFF"), UNDEFINED_RANGE),
        ".hidden.png": (png, Expected(IGNORED)),
        "._macos_metadata.jpg": (bytes(100), Expected(IGNORED)),
        "notes.txt": (b"hello", Expected(IGNORED)),
    }


def make_unusual_images(root: Path) -> dict[str, Expected]:
    """Write the files to ROOT/class, and return the expected treatment by file name."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((80, 60))
    folder = root / "class"
    folder.mkdir(parents=True)
    expected = {}
    for name, (data, treatment) in (
        _make_usable_images(photo, rng) | _make_other_files(photo)
    ).items():
        (folder / name).write_bytes(data)
        expected[name] = treatment

    (folder / "broken_link.png").symlink_to("missing.png")
    expected["broken_link.png"] = Expected(BAD, "No such file")
    os.mkfifo(folder / "pipe.png")
    expected["pipe.png"] = Expected(BAD, "not a file")
    (folder / "folder.png").mkdir()
    expected["folder.png"] = Expected(IGNORED)
    return expected
