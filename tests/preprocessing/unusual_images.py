"""A folder of images as they are: each file, and what docs/data.md says becomes of it."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BAD, IGNORED = "bad", "ignored"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [
        _chunk(b"IHDR", header),
        *extra,
        _chunk(b"IDAT", zlib.compress(rows)),
        _chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_hostile(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes the files under folder/class; returns by name: ("", a kind it is counted as), (BAD, part of the reason) or
    (IGNORED, "")."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((80, 60))
    rgba = photo.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(photo.size))
    turned, odd = Image.Exif(), b"Exif\0\0no TIFF header here"
    turned[0x0112] = 6
    long_text = _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000)))
    first = "animated or of several pages: the first"
    jpeg, png = _saved(photo, "JPEG", quality=90), _saved(photo, "PNG")
    grey16 = Image.fromarray((np.arange(80 * 60, dtype=np.uint16) * 13).reshape(60, 80))
    deep = np.zeros((60, 1 + 80 * 6), np.uint8)
    deep[:, 1:] = rng.integers(0, 256, (60, 480), dtype=np.uint8)
    palette = photo.quantize(16)
    small = "smaller than 32 pixels: enlarged"
    files: dict[str, tuple[bytes, str, str]] = {
        "rgb.jpg": (jpeg, "", "JPEG RGB"),
        "UPPER.JPEG": (jpeg, "", "JPEG RGB"),
        "progressive.jpeg": (_saved(photo, "JPEG", progressive=True), "", "JPEG RGB"),
        "grey.jpg": (_saved(photo.convert("L"), "JPEG"), "", "JPEG L"),
        "cmyk.jpg": (_saved(photo.convert("CMYK"), "JPEG"), "", "JPEG CMYK"),
        "phone.jpg": (_saved(photo, "MPO", save_all=True, append_images=[photo]), "", "JPEG RGB"),
        "turned.jpg": (_saved(photo, "JPEG", exif=turned), "", "turned by EXIF"),
        "broken_exif.jpg": (_saved(photo, "JPEG", exif=odd), "", "JPEG RGB"),
        "palette.png": (_saved(palette, "PNG"), "", "PNG P"),
        "palette_clear.png": (
            _saved(palette, "PNG", transparency=3),
            "",
            "transparent: over white",
        ),
        "rgba.png": (_saved(rgba, "PNG"), "", "transparent: over white"),
        "opaque.png": (_saved(photo.convert("RGBA"), "PNG"), "", "PNG RGBA"),
        "la.png": (_saved(rgba.convert("LA"), "PNG"), "", "transparent: over white"),
        "one_bit.png": (_saved(photo.convert("1"), "PNG"), "", "PNG 1"),
        "grey16.png": (_saved(grey16, "PNG"), "", "16 bits: rounded to 8"),
        "grey16.tif": (_saved(grey16, "TIFF"), "", "16 bits: rounded to 8"),
        "rgb48.png": (_png(80, 60, 16, 2, deep.tobytes()), "", "PNG RGB"),
        "moving.gif": (
            _saved(palette, "GIF", save_all=True, append_images=[photo.quantize(8)]),
            "",
            first,
        ),
        "moving.webp": (_saved(photo, "WEBP", save_all=True, append_images=[rgba]), "", first),
        "moving.png": (_saved(photo, "PNG", save_all=True, append_images=[rgba]), "", first),
        "pages.tiff": (_saved(photo, "TIFF", save_all=True, append_images=[photo]), "", first),
        "wrong_name.jpg": (png, "", "PNG RGB"),
        "dot.png": (_saved(photo.resize((1, 1)), "PNG"), "", small),
        "small.bmp": (_saved(photo.resize((20, 30)), "BMP"), "", small),
        "a 'name' with \n ü.ppm": (_saved(photo, "PPM"), "", "PPM RGB"),
        os.fsdecode(b"caf\xe9.png"): (png, "", "PNG RGB"),
        "large.png": (_saved(Image.new("RGB", (6000, 5000), "teal"), "PNG"), "", "PNG RGB"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], BAD, "truncated"),
        "truncated.png": (png[: len(png) // 2], BAD, "truncated"),
        "flipped_bits.png": (png[:60] + bytes(200) + png[260:], BAD, ""),
        "empty.png": (b"", BAD, "the file is empty"),
        "page.webp": (b"<html>404</html>", BAD, "not one of PNG"),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", BAD, "not one of PNG"),
        "bomb.png": (_png(65535, 65535, 1, 0, bytes(1000)), BAD, "more than 89,478,485 pixels"),
        "text_bomb.png": (
            _png(8, 8, 8, 0, bytes(72), long_text),
            BAD,
            "Decompressed data too large",
        ),
        "thread.png": (_saved(Image.new("RGB", (1, 100_000)), "PNG"), BAD, "too long and thin"),
        "float.tiff": (_saved(Image.new("F", (40, 40), 0.5), "TIFF"), BAD, "no agreed range"),
        "deep.tiff": (
            _saved(Image.fromarray(np.full((40, 40), 70_000, np.int32)), "TIFF"),
            BAD,
            "no agreed range",
        ),
        ".hidden.png": (png, IGNORED, ""),
        "._of_a_mac.jpg": (bytes(100), IGNORED, ""),
        "notes.txt": (b"hello", IGNORED, ""),
    }
    place = folder / "class"
    place.mkdir(parents=True)
    for name, (data, _, _) in files.items():
        (place / name).write_bytes(data)
    (place / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(place / "pipe.png")
    (place / "folder.png").mkdir()
    expected = {name: (outcome, what) for name, (_, outcome, what) in files.items()}
    return expected | {
        "gone.png": (BAD, "No such file"),
        "pipe.png": (BAD, "not a file"),
        "folder.png": (IGNORED, ""),
    }
