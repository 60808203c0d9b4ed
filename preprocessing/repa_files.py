"""Import a data folder of REPA or SRA without encoding the images again.

    vae-sd/00000/img-mean-std-00000000.npy  (2C, h, w) float32, mean and standard deviation
    vae-sd/dataset.json                     {"labels": [["00000/img-mean-std-...npy", class], ...]}
    images/00000/img00000000.png            the encoded image, for preview.png and --keep-images

C latent channels, h x w latent size, R image resolution.

The reasons of BadImage are stored in skipped.jsonl and are compared with those of existing caches,
so they must not be reworded.
"""

import errno
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mode

import numpy as np
import torch
from torch import Tensor

from common import cli
from common.cli import UserError, first_line
from common.config import setting
from common.evenly_spaced import make_evenly_spaced_indices
from common.files import NPY_READ_ERRORS
from common.lfs import describe_lfs_pointer
from common.npy_file import read_npy, read_npy_header
from common.ordered_map import map_in_order
from models.autoencoder import DEFAULT_VAE
from preprocessing.cache_job import DTYPES, Batch, CacheJob
from preprocessing.cache_preview import NUM_IMAGES
from preprocessing.image_source import ImageSource
from preprocessing.images import BadImage, UnreadableImage, load_square
from preprocessing.labels import assign_labels, read_label_file, summarize_names
from preprocessing.sources import walk_folder

READER_THREADS = 16  # reading small files is limited by the latency of the disk


@dataclass(frozen=True)
class ImportSettings:
    """Flags of import_repa that determine the content of the cache."""

    source: Path
    skip_bad: bool = setting(False, help="skip unusable files and list them in DEST/skipped.jsonl")
    vae: str = setting(
        DEFAULT_VAE,
        help="VAE that encoded SRC: hub id or folder; the cache records its scale and fingerprint",
    )
    dtype: str = setting(
        "float16",
        choices=DTYPES,
        help="data type of the stored moments; those of SRC are float32",
    )
    shard_size: int = setting(8192, type=cli.positive_int, help="images per shard")
    keep_images: bool = setting(
        False,
        help="also store the images of SRC as uint8, for --align repa; to add them to a complete "
        "cache, rerun the same command with this flag",
    )


class ImportJob(CacheJob):
    """Reads moments from REPA's files.

    Args:
        settings: Settings of the cache.
        device: Device that decodes the preview.

    Raises:
        UserError: The folder or the VAE is missing, or they do not match.
    """

    command_name = "import_repa"
    source_flag = "SRC"
    settings: ImportSettings

    def __init__(self, settings: ImportSettings, device: str):
        root = settings.source
        if not root.is_dir():
            raise UserError(f"SRC {root} is not a folder")
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        self.image_root = self.root.parent / "images"
        super().__init__(settings, open_moments(self.root), device)
        self.description = f"importing {root.name}"
        self.shape = self._find_common_shape()
        self.record(self.shape[1] * self.vae.downsampling_factor, "as imported")

    def iter_batches(self, shards: list[range], images_only: bool) -> Generator[Batch, None, None]:
        """Yield one batch per image (see CacheJob). Moments are always read, which is fast."""
        image_indices = chain.from_iterable(shards)
        with ThreadPoolExecutor(READER_THREADS) as pool:
            yield from map_in_order(pool, self._read_image, image_indices, 4 * READER_THREADS)

    def read_preview_row(self, image_index: int) -> tuple[Tensor | None, Tensor]:
        """Return the image, if it exists, and its moments (see CacheJob)."""
        moments = self._read_moments(image_index).astype(self.settings.dtype)
        pixels = None
        with suppress(BadImage):
            pixels = self._read_pixels(image_index)
        return pixels, torch.from_numpy(moments)[None]

    def _find_common_shape(self) -> tuple[int, int, int]:
        """Return the most common shape (2C, h, h) in a sample of the files."""
        shapes: dict[Path, tuple[int, ...]] = {}
        for image_index in make_evenly_spaced_indices(self.num_images, NUM_IMAGES).tolist():
            path = self.root / self.source.names[image_index]
            # An unreadable file is reported later, when its shard is read.
            with suppress(*NPY_READ_ERRORS), path.open("rb") as file:
                shapes[path] = read_npy_header(file)[0]
        if not shapes:
            raise UserError(f"SRC {self.root}: none of the sampled files can be read")
        shape = mode(shapes.values())
        path = next(path for path, path_shape in shapes.items() if path_shape == shape)

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

    def _read_image(self, image_index: int) -> Batch:
        """Read the moments and, if images are kept, the pixels of an image."""
        batch = Batch(range(image_index, image_index + 1), torch.empty(0))
        try:
            moments = self._read_moments(image_index)
            if self.settings.keep_images:
                pixels = self._read_pixels(image_index)
                if pixels is None:
                    raise BadImage(f"its image is not in {self.image_root}")
                batch.pixels = pixels[None]
        except BadImage as error:
            batch.bad_images[image_index] = str(error)
        except UnreadableImage as error:
            batch.unreadable[image_index] = str(error)
        else:
            batch.moments["moments"] = moments[None]
            batch.kinds["imported moments"] = 1
        return batch

    def _read_moments(self, image_index: int) -> np.ndarray:
        """Return the moments of an image, (2C, h, h). Raises BadImage or UnreadableImage."""
        path = self.root / self.source.names[image_index]
        try:
            moments = read_npy(path)
        except NPY_READ_ERRORS as error:
            file_errors = (None, errno.ENOENT, errno.EACCES)
            if isinstance(error, OSError) and error.errno not in file_errors:
                raise UnreadableImage(str(error.strerror)) from None
            problem = describe_lfs_pointer(path)
            raise BadImage(problem or first_line(error)) from None
        if moments.dtype.kind != "f":
            raise BadImage("it is no array of floating-point numbers")
        if moments.shape not in (self.shape, (1, *self.shape)):
            raise BadImage(f"its shape is {moments.shape}, others have {self.shape}")
        moments = moments.reshape(self.shape)
        if (moments[self.vae.channels :] < 0).any():
            raise BadImage("negative standard deviations: are these log-variances?")
        with np.errstate(over="ignore"):
            if not np.isfinite(moments.astype(self.settings.dtype)).all():
                raise BadImage(f"it has values that {self.settings.dtype} cannot hold")
        return moments

    def _read_pixels(self, image_index: int) -> Tensor | None:
        """Return the image that was encoded, (3, R, R) uint8, or None if its file does not exist.

        Raises:
            BadImage: The image cannot be used.
            UnreadableImage: The disk or the machine failed.
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
            pixels = load_square(source, 0, self.manifest_fields["resolution"])
        except (BadImage, UnreadableImage) as error:
            raise type(error)(f"its image: {error}") from None
        return torch.from_numpy(pixels.copy())


def is_moments_name(name: str) -> bool:
    """Return whether a file name has the extension .npy and no leading dot."""
    return name.endswith(".npy") and not name.startswith(".")


def open_moments(root: Path) -> ImageSource:
    """List the .npy files under a folder with the classes that its dataset.json assigns.

    Raises:
        UserError: There are no files, or dataset.json is missing or does not match the files.
    """
    names = sorted(
        folder + name
        for folder, _, files, _ in walk_folder(root, "SRC")
        for name in files
        if is_moments_name(name)
    )
    if not names:
        raise UserError(
            f"SRC {root} contains no .npy files; "
            "pass REPA's data folder, which contains vae-sd/00000/img-mean-std-*.npy"
        )
    label_file = root / "dataset.json"
    if not label_file.exists():
        raise UserError(
            f"SRC {label_file} is missing; it contains the classes, and REPA's encoding writes it "
            "last; check that the encoding is complete"
        )
    table = read_label_file(label_file, "SRC")
    missing_names = sorted(set(table.classes) - set(names))
    if missing_names:
        raise UserError(
            f"SRC {label_file} lists missing files: {summarize_names(missing_names)}; "
            "check that the folder is complete"
        )
    return ImageSource(root, names, *assign_labels(names, table))
