"""Import a data folder that REPA's or SRA's preprocessing wrote, without encoding images again.

    vae-sd/00000/img-mean-std-00000000.npy  (2C, h, w) float32, mean and standard deviation
    vae-sd/dataset.json                     {"labels": [["00000/img-mean-std-...npy", class], ...]}
    images/00000/img00000000.png            the encoded image, for preview.png and --keep-images

C latent channels, h w latent height and width, R image resolution.

The reasons of BadImage are stored in skipped.jsonl and are compared with those of existing caches,
so they must not be reworded.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from common.cli import UserError, first_line
from common.files import NpyWriter, discard_on_error
from models.autoencoder import DEFAULT_VAE, Autoencoder
from models.errors import FieldError
from preprocessing.build import image_range
from preprocessing.cache_preview import make_preview, spread_indices
from preprocessing.encoding import absolute_if_exists, map_in_order
from preprocessing.images import BadImage, SquareReader, UnreadableImage, format_image_error
from preprocessing.labels import assign_labels, parse_dataset_json, summarize_names
from preprocessing.shards import Shard, shard_file_name
from preprocessing.sources import ImageSource

READER_THREADS = 16  # reading small files mostly waits for the disk


@dataclass(frozen=True)
class ImportSettings:
    """The flags of import_repa that determine the content of the cache."""

    source: str
    skip_bad: bool = False
    vae: str = DEFAULT_VAE
    dtype: str = "float16"
    shard_size: int = 8192
    keep_images: bool = False


class ImportedImage(NamedTuple):
    """The stored moments of an image, (2C, h, w), and its pixels, (3, R, R) uint8, if requested."""

    moments: np.ndarray
    pixels: np.ndarray | None


class ImportJob:
    """A preprocessing.build.CacheJob that reads moments from REPA's files.

    Args:
        settings: The content of the cache.
        device: The device that decodes the preview.

    Raises:
        UserError: The folder or the VAE is missing or does not fit.
    """

    def __init__(self, settings: ImportSettings, device: str):
        root = Path(settings.source)
        if not root.is_dir():
            raise UserError(f"SRC {root} is not a folder")
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        self.image_root = self.root.parent / "images"
        self.source = open_moments(self.root)
        self.description = f"importing {root.name}"
        self.num_images = len(self.source)
        self.shard_size = settings.shard_size
        self.skip_bad = settings.skip_bad
        self.dtype = np.dtype(settings.dtype)
        self.keep_images = settings.keep_images
        try:
            self.vae = Autoencoder(settings.vae, device)
        except FieldError as error:
            raise UserError(f"--vae {error.reason}") from None
        self.shape = self._find_common_shape()

        self.settings = asdict(settings) | {
            "source": absolute_if_exists(settings.source),
            "vae": absolute_if_exists(settings.vae),
            "made_by": "import_repa",
        }
        fingerprint = self.vae.fingerprint()
        self.plan: dict[str, Any] = {
            "images": self.num_images,
            "vae_fingerprint": fingerprint,
            "dtype": settings.dtype,
            "shard_size": settings.shard_size,
            "keep_images": settings.keep_images,
            "names_and_labels": self.source.digest(self.num_images),
        }
        side = self.shape[1]
        self.manifest_fields: dict[str, Any] = {
            "source": settings.source,
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "resolution": side * self.vae.downsampling_factor,
            "crop": "as imported",
            "vae": settings.vae,
            "vae_fingerprint": fingerprint,
            "scale": self.vae.scale.scale,
            "shift": self.vae.scale.shift,
            "latent_shape": [self.vae.channels, side, side],
            "dtype": settings.dtype,
            "flips": False,
            "images": settings.keep_images,
        }

    def iter_shards(
        self,
        dest: Path,
        shard_indices: list[int],
        progress: Callable[[int], None],
        only_images: bool = False,
    ) -> Iterator[tuple[int, Shard]]:
        """Yield the index and the content of each shard, in the given order.

        Args:
            dest: The folder of the cache. Images are written there directly.
            shard_indices: The shards to import.
            progress: A function that is called with the number of images just read.
            only_images: Has no effect, because reading all moments is cheap.
        """
        for shard_index in shard_indices:
            writer = None
            if self.keep_images:
                resolution = self.manifest_fields["resolution"]
                path = dest / "images" / shard_file_name(shard_index)
                writer = NpyWriter(path, np.uint8, (3, resolution, resolution))
            with discard_on_error(writer):
                shard = self._read_shard(shard_index, progress, writer)
            yield shard_index, shard

    def make_preview(self) -> tuple[Image.Image, str]:
        """Decode a few moments and return them as an image, with a line of text.

        The images that were encoded are shown for comparison if they exist.
        """
        names = []
        images = []
        moments = []
        for image_index in spread_indices(self.num_images):
            try:
                stored = self._read_moments(image_index)
            except BadImage:
                continue
            pixels = None
            with suppress(BadImage):
                pixels = self._read_pixels(image_index)
            names.append(self.source.class_names[self.source.labels[image_index]])
            images.append(None if pixels is None else torch.from_numpy(pixels))
            moments.append(torch.from_numpy(stored.astype(self.dtype))[None])
        return make_preview(names, images, moments, self.vae)

    def _find_common_shape(self) -> tuple[int, int, int]:
        """Return the shape (2C, h, h) that most of a few sampled files have."""
        shapes: dict[int, tuple[int, ...]] = {}
        for image_index in spread_indices(self.num_images):
            # An unreadable file is reported later, when its shard is read.
            with suppress(OSError, ValueError, EOFError, AttributeError):
                stored = np.load(self.root / self.source.names[image_index], mmap_mode="r")
                shapes[image_index] = stored.shape
        if not shapes:
            raise UserError(f"SRC {self.root}: none of the sampled files can be read")
        [(shape, _)] = Counter(shapes.values()).most_common(1)
        example = next(index for index, other in shapes.items() if other == shape)
        path = self.root / self.source.names[example]

        channels = self.vae.channels
        if len(shape) == 4 and shape[0] == 1:
            shape = shape[1:]
        if len(shape) == 3 and shape[0] == channels:
            raise UserError(
                f"SRC {path} has {channels} channels; it is a sampled latent, not the mean and "
                f"standard deviation of the posterior ({2 * channels} channels); encode the images"
            )
        if len(shape) != 3 or shape[0] != 2 * channels or shape[1] != shape[2]:
            raise UserError(
                f"SRC {path} has shape {shape}; expected ({2 * channels}, h, h), the mean and "
                f"standard deviation from --vae {self.vae.name}"
            )
        return shape

    def _read_shard(
        self, shard_index: int, progress: Callable[[int], None], writer: NpyWriter | None
    ) -> Shard:
        image_indices = image_range(self, shard_index)
        moments = np.empty((len(image_indices), *self.shape), self.dtype)
        labels: list[int] = []
        skipped: list[dict] = []
        with ThreadPoolExecutor(READER_THREADS) as pool:
            results = map_in_order(pool, self._read_image, image_indices, 4 * READER_THREADS)
            for image_index, result in zip(image_indices, results):
                progress(1)
                if isinstance(result, ImportedImage):
                    moments[len(labels)] = result.moments
                    labels.append(self.source.labels[image_index])
                    if writer and result.pixels is not None:
                        writer.append(result.pixels[None])
                    continue
                if not self.skip_bad:
                    pool.shutdown(cancel_futures=True)
                    line = format_image_error("SRC", self.source, image_index, result)
                    raise UserError(f"{line}; fix the file or pass --skip-bad")
                skipped.append(
                    {
                        "file": self.source.names[image_index],
                        "shard": shard_file_name(shard_index),
                        "reason": str(result),
                    }
                )
        arrays = {"moments": moments[: len(labels)], "labels": np.array(labels, np.int64)}
        kinds = Counter({"imported moments": len(labels)} if labels else {})
        return Shard(arrays, skipped, kinds, writer)

    def _read_image(self, image_index: int) -> ImportedImage | BadImage:
        """Read the moments and, if images are kept, the pixels; return BadImage if unusable."""
        try:
            moments = self._read_moments(image_index)
            pixels = None
            if self.keep_images:
                pixels = self._read_pixels(image_index)
                if pixels is None:
                    raise BadImage(f"its image is not in {self.image_root}")
        except BadImage as error:
            return error
        return ImportedImage(moments, pixels)

    def _read_moments(self, image_index: int) -> np.ndarray:
        """Return the moments of an image, (2C, h, h). Raises BadImage."""
        try:
            moments = np.load(self.root / self.source.names[image_index])
        except (OSError, ValueError, EOFError) as error:
            file_errors = (None, errno.ENOENT, errno.EACCES)
            if isinstance(error, OSError) and error.errno not in file_errors:
                # The disk failed: this says nothing about the file.
                raise self._read_failure(image_index, str(error.strerror)) from None
            raise BadImage(first_line(error)) from None
        if not isinstance(moments, np.ndarray) or moments.dtype.kind != "f":
            raise BadImage("it is no array of floating-point numbers")
        if moments.shape not in (self.shape, (1, *self.shape)):
            raise BadImage(f"its shape is {moments.shape}, others have {self.shape}")
        moments = moments.reshape(self.shape)
        if (moments[self.vae.channels :] < 0).any():
            raise BadImage("negative standard deviations: are these log-variances?")
        with np.errstate(over="ignore"):
            if not np.isfinite(moments.astype(self.dtype)).all():
                raise BadImage(f"it has values that {self.dtype} cannot hold")
        return moments

    def _read_pixels(self, image_index: int) -> np.ndarray | None:
        """Return the image that was encoded, (3, R, R) uint8, or None if there is none.

        Raises BadImage.
        """
        name = Path(self.source.names[image_index])
        numbers = re.findall(r"\d+", name.stem)
        if not numbers:
            return None
        png = name.parent / f"img{numbers[-1]}.png"
        if not (self.image_root / png).exists():
            return None
        source = ImageSource(self.image_root, [str(png)], np.zeros(1, np.int64), ["0"])
        try:
            image = SquareReader(self.manifest_fields["resolution"]).read(source, 0)
        except BadImage as error:
            raise BadImage(f"its image: {error}") from None
        except UnreadableImage as error:
            raise self._read_failure(image_index, f"its image: {error}") from None
        return image.pixels.copy()  # a writable array

    def _read_failure(self, image_index: int, reason: str) -> UserError:
        line = format_image_error("SRC", self.source, image_index, reason, "could not be read")
        return UserError(f"{line}; fix the problem and rerun the same command")


def open_moments(root: Path) -> ImageSource:
    """List the .npy files under a folder with the classes that its dataset.json assigns.

    Raises:
        UserError: There are no files, or dataset.json is missing or does not match the files.
    """
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders.sort()
        prefix = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"
        names += [
            prefix + file for file in files if file.endswith(".npy") and not file.startswith(".")
        ]
    if not names:
        raise UserError(
            f"SRC {root} contains no .npy files; "
            "pass REPA's data folder, which contains vae-sd/00000/img-mean-std-*.npy"
        )
    names.sort()
    label_file = root / "dataset.json"
    if not label_file.exists():
        raise UserError(
            f"SRC {label_file} is missing; it contains the classes, and REPA's encoding writes it "
            "last; check that the encoding is complete"
        )
    table = parse_dataset_json(label_file.read_bytes(), f"SRC {label_file}")
    missing = sorted(set(table.classes) - set(names))
    if missing:
        raise UserError(
            f"SRC {label_file} lists missing files: {summarize_names(missing)}; "
            "check that the folder is complete"
        )
    return ImageSource(root, names, *assign_labels(names, table))
