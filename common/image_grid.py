"""Draw images as a grid of labelled rows, and save images as PNG files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import write_file

GAP = 2  # pixels between images
MARGIN = 4  # pixels around the grid


def draw_labelled_grid(
    rows: list[tuple[str, np.ndarray]], title: str = "", tile_size: int = 64
) -> Image.Image:
    """Draw images as a grid with one label per row.

    Args:
        rows: (label, images) pairs. Images are (n, H, W, 3) uint8 with H = W. Several rows may have
            the same label.
        title: Text above the grid.
        tile_size: Approximate size of an image in the grid, in pixels. Smaller images are enlarged
            by an integer factor.
    """
    rows = [(label if label.isprintable() else ascii(label), images) for label, images in rows]
    image_size = rows[0][1].shape[1]
    size = image_size * max(1, round(tile_size / image_size))
    num_columns = max(len(images) for _, images in rows)

    # Compute the layout. Labels are on the left, and the title is at the top.
    font_size = max(12, size // 5)
    font = ImageFont.load_default(font_size)
    left = 12 + int(max(font.getlength(label) for label, _ in rows))
    top = 8 + font_size * 3 // 2 if title else MARGIN
    grid_width = left + num_columns * (size + GAP) + MARGIN
    width = max(grid_width, int(font.getlength(title)) + 12)
    height = top + len(rows) * (size + GAP) + MARGIN

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, "black", font)
    for i, (label, images) in enumerate(rows):
        y = top + i * (size + GAP)
        draw.text((6, y + size // 2), label, "black", font, anchor="lm")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + j * (size + GAP), y))
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Save an image as a PNG file atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_file(path, buffer.getvalue())
