"""Select the images of a report and encode them for the page."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.evenly_spaced import make_evenly_spaced_indices
from evaluations.metrics_files import MetricsFile
from evaluations.runs import Run

MAX_PREVIEWS = 8  # per run
# Maximum widths in pixels. Wider images are downscaled.
PREVIEW_WIDTH = 560
GRID_WIDTH = 860
TILE_WIDTH = 96


class EmbeddedImage(NamedTuple):
    """An image as a data URI."""

    src: str
    width: int
    height: int


class Figure(NamedTuple):
    """An image file with a caption. `image` is None if the file cannot be read."""

    path: Path
    caption: str
    image: EmbeddedImage | None


def embed(image: Image.Image | np.ndarray, max_width: int) -> EmbeddedImage:
    """Encode an image as PNG or JPEG, whichever is smaller.

    Args:
        image: An image, or its pixels, (H, W, 3) uint8.
        max_width: Maximum width in pixels. Wider images are downscaled to this width.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    image = image.convert("RGB")
    if image.width > max_width:
        height = max(1, round(image.height * max_width / image.width))
        image = image.resize((max_width, height), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        base64_text = base64.b64encode(buffer.getvalue()).decode()
        encoded.append(f"data:image/{kind};base64,{base64_text}")
    return EmbeddedImage(min(encoded, key=len), image.width, image.height)


def embed_file(path: Path, caption: str, max_width: int) -> Figure:
    """Return a figure with the image in a PNG file."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return Figure(path, caption, embed(image, max_width))
    except (OSError, Image.DecompressionBombError):
        return Figure(path, caption, None)


def load_previews(run: Run) -> list[Figure]:
    """Load at most MAX_PREVIEWS evenly spaced previews of a run's first EMA, and real images."""
    files = (run.folder / "samples").glob("*.png")
    paths = sorted(
        (path for path in files if path.stem.isdecimal()), key=lambda path: int(path.stem)
    )
    batch_size = run.args.get("batch_size")
    figures = []
    for index in make_evenly_spaced_indices(len(paths), MAX_PREVIEWS):
        step = int(paths[index].stem)
        caption = f"step {step:,}"
        if batch_size:
            caption += f" · {step * batch_size:,} images"
        figures.append(embed_file(paths[index], caption, PREVIEW_WIDTH))
    real_images = run.folder / "samples" / "real.png"
    if real_images.exists():
        figures.append(embed_file(real_images, "training images", PREVIEW_WIDTH))
    return figures


def load_sample_grids(files: list[MetricsFile]) -> list[Figure]:
    """Load the image grids that sample_ddp.py wrote together with the evaluated samples."""
    figures = []
    for file in files:
        if file.samples:
            path = file.samples.with_suffix(".png")
        else:  # sample_ddp.py ran with --no-npz
            path = file.path.with_name(f"{file.stem}.png")
        if path.exists():
            caption = f"{file.run.name}: {path.stem}" if file.run else path.stem
            figures.append(embed_file(path, caption, GRID_WIDTH))
    return figures
