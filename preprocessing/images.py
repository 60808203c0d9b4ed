"""Decode stored images into RGB squares, and detect images that are unusual or unusable.

The texts of `DecodedImage.kinds` and the reasons of `BadImage` are stored in manifest.json and
skipped.jsonl and are compared with those of existing caches, so they must not be reworded.
"""

import errno
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from common.cli import UserError
from common.keyed_random import Purpose, uniform
from common.lfs import POINTER_START
from preprocessing.image_source import ImageSource

CROPS = ("center", "random-seeded")
BACKGROUNDS = ("white", "black")
# Other formats of PIL are not used for photographs, and some of their decoders run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXIF_ORIENTATION = 0x0112  # EXIF tag; the value 1 means upright
# EXIF orientation -> transposition that makes the image upright.
TRANSPOSITIONS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_CROP_FRACTION = 0.8  # a random crop covers at least this fraction of the shorter side
MAX_PIXELS = 89_478_485  # default limit of PIL, which corresponds to 268 MB of RGB values
# PIL rejects an image with a text chunk of more than 1 MiB. Image generators store longer texts, so
# only the limit for all text chunks of an image, 64 MiB, is kept.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class BadImage(ValueError):  # noqa: N818  an invalid image is not an error of the program
    """The image cannot be used. The message is the reason."""


class UnreadableImage(OSError):  # noqa: N818  named like BadImage
    """The disk or the machine failed, so it is unknown whether the image can be used."""


class DecodedImage(NamedTuple):
    """An image as the VAE receives it.

    Attributes:
        pixels: (3, side, side) uint8.
        kinds: The format and mode, and the conversions that were applied. The manifest contains the
            number of images of each kind.
    """

    pixels: np.ndarray
    kinds: list[str]


@dataclass(frozen=True)
class SquareReader:
    """Reads images of a source as RGB squares.

    Args:
        side: Width and height of the square in pixels.
        crop: One of CROPS.
        background: One of BACKGROUNDS; transparent images are composited over it.
        seed: Seed of the random crops.
    """

    side: int
    crop: str = "center"
    background: str = "white"
    seed: int = 0

    def read(self, source: ImageSource, image_index: int) -> DecodedImage:
        """Read, convert and crop an image.

        An RGB image that already has the right size is returned unchanged.

        Raises:
            BadImage: If the image cannot be used.
            UnreadableImage: If reading failed for a reason other than the file.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL warns about unusual metadata of each image.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with source.open(image_index) as file:
                    start = file.read(len(POINTER_START))
                    if not start:
                        raise BadImage("the file is empty")
                    if start == POINTER_START:
                        raise BadImage("it is a Git LFS pointer: run 'git lfs pull'")
                    file.seek(0)
                    return self._decode(file, image_index)
        except BadImage:
            raise
        except MemoryError:
            raise UnreadableImage("out of memory") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadImage(f"more than {MAX_PIXELS:,} pixels") from None
        except UnidentifiedImageError:
            raise BadImage(f"not one of {', '.join(FORMATS)}") from None
        except Exception as error:  # Decoders raise many types of exceptions for damaged files.
            description = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            reason = description.splitlines()[0]
            if isinstance(error, OSError) and not is_caused_by_file(error):
                raise UnreadableImage(reason) from None
            raise BadImage(reason) from None

    def _decode(self, file: BinaryIO, image_index: int) -> DecodedImage:
        with Image.open(file, formats=FORMATS) as image:
            # MPO is a JPEG followed by further images, for example a depth map from a phone.
            image_format = "JPEG" if image.format == "MPO" else image.format
            kinds = [f"{image_format} {image.mode}"]
            if getattr(image, "is_animated", False) and image.format != "MPO":
                kinds.append("animated or of several pages: the first")
            rgb = convert_to_rgb(image, self.background, kinds)
        if rgb.size != (self.side, self.side):
            rgb = self._crop(rgb, image_index, kinds)
        return DecodedImage(np.asarray(rgb).transpose(2, 0, 1), kinds)

    def _crop(self, image: Image.Image, image_index: int, kinds: list[str]) -> Image.Image:
        shorter_side, longer_side = sorted(image.size)
        if shorter_side < self.side:
            kinds.append(f"smaller than {self.side} pixels: enlarged")
        # The image is resized before it is cropped, so the resized image must fit into memory.
        if longer_side / shorter_side * self.side**2 > MAX_PIXELS:
            raise BadImage(
                f"{image.width}x{image.height} is too long and thin to be a square of {self.side}"
            )
        if self.crop == "center":
            return center_crop(image, self.side)
        uniforms = uniform(self.seed, Purpose.CROP, torch.tensor([image_index]), (3,))[0]
        return random_crop(image, self.side, uniforms.tolist())


def is_caused_by_file(error: OSError) -> bool:
    """Return whether an OSError is caused by the file rather than by the disk or the machine.

    Every file existed when the source was listed. A missing file therefore indicates a problem with
    the disk, unless it is a broken symlink.
    """
    if error.errno == errno.ENOENT:
        return error.filename is not None and Path(error.filename).is_symlink()
    return error.errno in (None, errno.EACCES, errno.ELOOP)


def _resize_shorter_side(image: Image.Image, length: int) -> Image.Image:
    """Resize an image so that its shorter side has `length` pixels.

    The image is halved with a box filter while it is at least twice the target size, and is then
    resized bicubically.
    """
    while min(image.size) >= 2 * length:
        image = _resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = length / min(image.size)
    size = round(image.width * ratio), round(image.height * ratio)
    return _resize(image, size, Image.Resampling.BICUBIC)


def _resize(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Resize the width first, then the height, with rounding in between.

    Pillow before version 13 does this in one call. Later versions resize the height of tall images
    first, which changes grey levels.
    """
    return image.resize((size[0], image.height), resampling).resize(size, resampling)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Apply ADM's center crop (guided-diffusion, image_datasets.py, center_crop_arr).

    The shorter side is resized to `size` pixels. Smaller images are enlarged bicubically.
    """
    image = _resize_shorter_side(image, size)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, uniforms: list[float]) -> Image.Image:
    """Apply ADM's random crop (guided-diffusion, image_datasets.py, random_crop_arr).

    The crop covers between 80% and 100% of the shorter side.

    Args:
        image: An RGB image.
        size: Side of the crop in pixels.
        uniforms: Three numbers in (0, 1) that determine scale, top and left.
    """
    scale, vertical, horizontal = uniforms
    max_length = math.ceil(size / MIN_CROP_FRACTION)
    image = _resize_shorter_side(image, size + math.floor(scale * (max_length - size + 1)))
    top = math.floor(vertical * (image.height - size + 1))
    left = math.floor(horizontal * (image.width - size + 1))
    return image.crop((left, top, left + size, top + size))


def convert_to_rgb(image: Image.Image, background: str, kinds: list[str]) -> Image.Image:
    """Convert an image to upright RGB.

    Args:
        image: An image in any mode.
        background: Color that transparent images are composited over.
        kinds: List to which the applied conversions are appended.

    Raises:
        BadImage: If the range of the gray values is undefined.
    """
    image.load()
    transposition = read_transposition(image)
    if transposition is not None:
        kinds.append("turned by EXIF")
        image = image.transpose(transposition)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        if image.mode == "F" or array.min() < 0 or array.max() > 65535:
            raise BadImage(f"mode {image.mode} beyond 16 bits has no agreed range of grey")
        kinds.append("16 bits: rounded to 8")
        # PIL's convert would clip the values at 255.
        image = Image.fromarray((array.astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            kinds.append(f"transparent: over {background}")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def read_transposition(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright. Damaged EXIF data is ignored."""
    try:
        return TRANSPOSITIONS.get(image.getexif().get(EXIF_ORIENTATION))
    except (MemoryError, OSError):  # the machine failed, not the EXIF data
        raise
    except Exception:  # PIL raises many types of exceptions for damaged EXIF data
        return None


def load_square(source: ImageSource, image_index: int, side: int) -> np.ndarray:
    """Return a center-cropped image, (3, side, side) uint8. Raises BadImage or UnreadableImage."""
    return SquareReader(side).read(source, image_index).pixels


def load_square_or_user_error(
    source: ImageSource, image_index: int, side: int, flag: str
) -> np.ndarray:
    """Return a center-cropped image, (3, side, side) uint8. Raises UserError if that fails."""
    try:
        return load_square(source, image_index, side)
    except (BadImage, UnreadableImage) as error:
        raise UserError(format_image_error(flag, source, image_index, error)) from None


def format_image_error(
    flag: str,
    source: ImageSource,
    image_index: int,
    reason: Exception | str,
    problem: str = "cannot be used",
) -> str:
    """Return a one-line error message that names the flag, the source and the image."""
    name = source.names[image_index]
    printable_name = name if name.isprintable() else ascii(name)
    return f"{flag} {source.root}: {printable_name} {problem} ({reason})"
