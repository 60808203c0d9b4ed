"""How stored bytes become squares of the right size, and what is done about images that are not what they should be."""

import errno
import math
import os
import warnings
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common.cli import UserError
from common.keyed_random import Purpose, uniform
from preprocessing.sources import ImageSource

CROPS = ("center", "random-seeded")
BACKGROUNDS = ("white", "black")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
)  # no others: some run programs, none are photographs
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
MOST_PIXELS = 89_478_485  # PIL's: a quarter of a gigabyte of RGB


class BadImage(ValueError):
    """An image that cannot be used, and why."""


class UnreadableImage(OSError):
    """An image that nothing is known about, since the disk or the machine failed: no reason to skip it."""


class DecodedImage(NamedTuple):
    """An image as training sees it, and what was met on the way."""

    pixels: np.ndarray  # (3, side, side) uint8
    kinds: list[str]


@dataclass(frozen=True)
class SquareReader:
    """How an image becomes a square of `side` pixels."""

    side: int
    crop: str = "center"
    background: str = "white"
    seed: int = 0  # of random crops

    def read(self, source: ImageSource, i: int) -> DecodedImage:
        """Image i of the source. An RGB image that already has the size passes through untouched. Raises BadImage or
        Unreadable.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata, a line for each image
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with source.open(i) as file:
                    if not file.read(1):
                        raise BadImage("the file is empty")
                    file.seek(0)
                    return self._decoded(file, i)
        except BadImage:
            raise
        except MemoryError:
            raise UnreadableImage("out of memory") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadImage(f"more than {MOST_PIXELS:,} pixels") from None
        except UnidentifiedImageError:
            raise BadImage(f"not one of {', '.join(FORMATS)}") from None
        except Exception as error:  # whatever a decoder may raise for a broken file
            reason = (
                getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            ).splitlines()[0]
            if isinstance(error, OSError) and not is_the_files_own(error):
                raise UnreadableImage(reason) from None
            raise BadImage(reason) from None

    def _decoded(self, file: BinaryIO, i: int) -> DecodedImage:
        with Image.open(file, formats=FORMATS) as image:
            kinds = [
                f"{'JPEG' if image.format == 'MPO' else image.format} {image.mode}"
            ]  # MPO: what phones write
            if getattr(image, "is_animated", False) and image.format != "MPO":
                kinds.append("animated or of several pages: the first")
            rgb = to_rgb(image, self.background, kinds)
        if rgb.size != (self.side, self.side):
            rgb = self._cropped(rgb, i, kinds)
        return DecodedImage(np.asarray(rgb).transpose(2, 0, 1), kinds)

    def _cropped(self, image: Image.Image, i: int, kinds: list[str]) -> Image.Image:
        short, long = sorted(image.size)
        if short < self.side:
            kinds.append(f"smaller than {self.side} pixels: enlarged")
        if (
            long / short * self.side**2 > MOST_PIXELS
        ):  # the whole of it is resized before it is cropped
            raise BadImage(
                f"{image.width}x{image.height} is too long and thin to be a square of {self.side}"
            )
        if self.crop == "center":
            return center_crop(image, self.side)
        return random_crop(
            image, self.side, uniform(self.seed, Purpose.CROP, torch.tensor([i]), (3,))[0].tolist()
        )


def is_the_files_own(error: OSError) -> bool:
    """Whether a file could not be read for a reason of its own. A disk that fails is none, nor is a file that was there when
    the list was made, unless it is a link that leads nowhere.
    """
    if error.errno == errno.ENOENT:
        return error.filename is not None and os.path.islink(error.filename)
    return error.errno in (None, errno.EACCES, errno.ELOOP)


def _scaled(image: Image.Image, short: int) -> Image.Image:
    """The shorter side to `short` pixels: halved by box while twice too large, then bicubic."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = short / min(image.size)
    return image.resize(
        (round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC
    )


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (guided-diffusion, image_datasets.py): the shorter side to `size`, and the middle.

    Images smaller than `size` are enlarged by the same bicubic step.
    """
    image = _scaled(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(
    image: Image.Image, size: int, chance: list[float], smallest: float = 0.8
) -> Image.Image:
    """ADM's random crop (guided-diffusion, image_datasets.py): the square covers between `smallest` and all of the shorter
    side and lies anywhere. `chance`: three numbers in (0, 1), for scale, top and left.
    """
    most = math.ceil(size / smallest)
    image = _scaled(image, size + math.floor(chance[0] * (most - size + 1)))
    top, left = (
        math.floor(u * (n - size + 1)) for u, n in zip(chance[1:], (image.height, image.width))
    )
    return image.crop((left, top, left + size, top + size))


def to_rgb(
    image: Image.Image, background: str = "white", kinds: list[str] | None = None
) -> Image.Image:
    """Upright and RGB, transparency laid over `background`. What was done is appended to `kinds`. Raises BadImage."""
    kinds = [] if kinds is None else kinds
    image.load()
    if image.getexif().get(ORIENTATION) in range(2, 9):
        kinds.append("turned by EXIF")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        if image.mode == "F" or array.min() < 0 or array.max() > 65535:
            raise BadImage(f"mode {image.mode} beyond 16 bits has no agreed range of grey")
        kinds.append("16 bits: rounded to 8")  # PIL's own convert would clip at 255
        image = Image.fromarray((array.astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            kinds.append(f"transparent: over {background}")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def load_square(source: ImageSource, i: int, side: int) -> np.ndarray:
    """Image i, centre-cropped: (3, side, side) uint8. Raises BadImage."""
    return SquareReader(side).read(source, i).pixels


def load_square_or_user_error(
    source: ImageSource, i: int, side: int, flag: str = "--reference"
) -> np.ndarray:
    """load_square; an image that cannot be used is a UserError that names it."""
    try:
        return load_square(source, i, side)
    except (BadImage, UnreadableImage) as error:
        raise UserError(format_image_error(flag, source, i, error)) from None


def format_image_error(
    flag: str, source: ImageSource, i: int, reason: Exception | str, what: str = "cannot be used"
) -> str:
    """One line that any terminal can show."""
    name = source.names[i]
    return f"{flag} {source.root}: {name if name.isprintable() else ascii(name)} {what} ({reason})"
