"""Pictures that people look at first: images in rows, each row with its name."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import write_file


def draw_labelled_grid(
    rows: list[tuple[str, np.ndarray]], title: str = "", tile: int = 64
) -> Image.Image:
    """rows: (name, (n, H, W, 3) uint8), names may repeat. Images smaller than `tile` pixels are enlarged by a whole factor."""
    rows = [(name if name.isprintable() else ascii(name), images) for name, images in rows]
    side = rows[0][1].shape[1]
    factor = max(1, round(tile / side))
    side *= factor
    font = ImageFont.load_default(max(12, side // 5))
    margin = 12 + int(max(font.getlength(name) for name, _ in rows))
    top = 8 + font.size * 3 // 2 if title else 4
    columns = max(len(images) for _, images in rows)
    width = max(margin + columns * (side + 2) + 4, int(font.getlength(title)) + 12)
    canvas = Image.new("RGB", (width, top + len(rows) * (side + 2) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, "black", font)
    for r, (name, images) in enumerate(rows):
        y = top + r * (side + 2)
        draw.text((6, y + side // 2), name, "black", font, anchor="lm")
        for c, image in enumerate(images):
            tile_image = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile_image, (margin + c * (side + 2), y))
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_file(path, buffer.getvalue())
