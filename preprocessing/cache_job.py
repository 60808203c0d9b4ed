"""Base class of the jobs that create the shards of a cache from batches of images.

Shapes: B batch size, S image side, C latent channels, h x w latent size.
"""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cli import UserError
from common.config import record_flags
from common.evenly_spaced import make_evenly_spaced_indices
from common.files import NpyWriter, discard_on_error
from latents.manifest import list_moment_folders
from models.autoencoder import Autoencoder
from models.errors import FieldError
from preprocessing.cache_preview import NUM_IMAGES, PreviewRow, draw_preview
from preprocessing.image_source import ImageSource
from preprocessing.images import BadImage, UnreadableImage, format_image_error
from preprocessing.shards import Shard, shard_file_name

Plan = dict[str, Any]  # the settings that determine the bytes of a cache or of features
# The settings that the plan of a cache contains, if the job has them.
PLAN_FIELDS = (
    "images",
    "resolution",
    "crop",
    "seed",
    "background",
    "flip",
    "vae_fingerprint",
    "precision",
    "dtype",
    "shard_size",
    "batch_size",
    "keep_images",
    "names_and_labels",
)
DTYPES = ("float16", "float32")


@dataclass
class Batch:
    """Consecutive images of one shard, before or after they are encoded.

    Attributes:
        image_indices: Indices of the images in the source, including those that cannot be used.
        pixels: The usable images, (B, 3, S, S) uint8. Empty if the pixels are not needed.
        bad_images: The reason why an image cannot be used, by image index.
        unreadable: The reason why an image could not be read, by image index. The batch ends at
            that image.
        kinds: Number of images of each kind.
        moments: Arrays (B, 2C, h, w) by folder. Empty if there are no usable images or no moments
            are needed.
        copy_done: The event at which the copy of the moments from the GPU is complete. None without
            a GPU.
    """

    image_indices: range
    pixels: Tensor
    bad_images: dict[int, str] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    copy_done: torch.cuda.Event | None = None

    def pin_memory(self) -> "Batch":
        """Pin the pixels. The DataLoader's default would double the counts of `kinds`."""
        return replace(self, pixels=self.pixels.pin_memory())


class CacheJob(ABC):
    """Creates the shards of a cache.

    Attributes:
        command_name: Name of the command, recorded in the manifest.
        source_flag: Flag that specifies the source, for error messages.
        plan: All settings that determine the bytes of the shards. Shards of different plans are
            never mixed.
        recorded_settings: Settings that recreate the job; stored in the manifest.
        manifest_fields: Fields of the manifest that do not depend on the shards.
        num_images: Number of images of the source, including those that cannot be used.
        description: Label of the progress bar.

    Args:
        settings: EncodingSettings or ImportSettings.
        source: The images or files to read.
        device: Device of the VAE.

    Raises:
        UserError: If the VAE cannot be opened.
    """

    command_name: str
    source_flag: str
    description: str

    def __init__(self, settings: Any, source: ImageSource, device: torch.device | str):
        self.settings = settings
        self.source = source
        self.num_images = len(source)
        try:
            self.vae = Autoencoder(settings.vae, device)
        except FieldError as error:
            raise UserError(f"--vae {error.reason}") from None

    def record(self, resolution: int, crop: str, flips: bool = False) -> None:
        """Set `recorded_settings`, `plan` and `manifest_fields`.

        Args:
            resolution: Side of the images in pixels.
            crop: Description of the crop, for the manifest.
            flips: Whether moments of the flipped images are stored.
        """
        settings = record_flags(self.settings)
        fingerprint = self.vae.fingerprint()
        values = settings | {
            "images": self.num_images,
            "vae_fingerprint": fingerprint,
            "names_and_labels": self.source.digest(self.num_images),
        }
        self.plan: Plan = {name: values[name] for name in PLAN_FIELDS if name in values}
        side = resolution // self.vae.downsampling_factor
        self.manifest_fields: dict[str, Any] = {
            "source": settings["source"],
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "resolution": resolution,
            "crop": crop,
            "vae": make_absolute_if_exists(self.vae.name),
            "vae_fingerprint": fingerprint,
            "scale": self.vae.scale.scale,
            "shift": self.vae.scale.shift,
            "latent_shape": [self.vae.channels, side, side],
            "dtype": self.settings.dtype,
            "flips": flips,
            "images": self.settings.keep_images,
        }
        for name in {"source", "labels", "vae"} & settings.keys():
            settings[name] = make_absolute_if_exists(settings[name])
        self.recorded_settings = settings | {"made_by": self.command_name}

    @abstractmethod
    def iter_batches(self, shards: list[range], images_only: bool) -> Generator[Batch, None, None]:
        """Yield the batches of several shards in order.

        Args:
            shards: The indices of the images of each shard.
            images_only: Whether moments are needed only for the comparison in `add_images`.
        """

    @abstractmethod
    def read_preview_row(self, image_index: int) -> tuple[Tensor | None, Tensor]:
        """Return an image, (3, S, S) uint8 or None, and its moments, (1, 2C, h, w).

        Raises:
            BadImage: If the image cannot be used.
            UnreadableImage: If the disk failed.
        """

    def get_image_range(self, shard_index: int) -> range:
        """Return the indices of a shard's images in the source."""
        start = shard_index * self.settings.shard_size
        return range(start, min(start + self.settings.shard_size, self.num_images))

    def iter_shards(
        self,
        dest: Path,
        shard_indices: list[int],
        progress: Callable[[int], None],
        images_only: bool,
    ) -> Iterator[Shard]:
        """Create shards.

        Args:
            dest: Folder of the cache, for the files of images.
            shard_indices: Indices of the shards to create, in this order.
            progress: Function that is called with the number of images that were just processed.
            images_only: Whether to create only the images and the data that `add_images` compares.

        Raises:
            UserError: If an image could not be read, or cannot be used and --skip-bad is not set.
        """
        shards = [self.get_image_range(k) for k in shard_indices]
        side = self.manifest_fields["resolution"]
        with closing(self.iter_batches(shards, images_only)) as batches:
            for shard_index in shard_indices:
                file = shard_file_name(shard_index)
                images = None
                if self.settings.keep_images:
                    images = NpyWriter(dest / "images" / file, np.uint8, (3, side, side))
                with discard_on_error(images):
                    shard = self._join_batches(shard_index, batches, progress, images)
                yield shard

    def _join_batches(
        self,
        shard_index: int,
        batches: Iterator[Batch],
        progress: Callable[[int], None],
        images: NpyWriter | None,
    ) -> Shard:
        """Join the batches of a shard, and append their pixels to `images`."""
        file = shard_file_name(shard_index)
        channels, *size = self.manifest_fields["latent_shape"]
        remaining = len(self.get_image_range(shard_index))
        shape = (remaining, 2 * channels, *size)
        arrays = {
            folder: np.empty(shape, self.settings.dtype)
            for folder in list_moment_folders(self.manifest_fields["flips"])
        }
        usable_indices: list[int] = []
        skipped = []
        kinds: Counter[str] = Counter()
        num_encoded = 0
        # Do not read ahead into the next shard, because reading its first batch may raise an error.
        while remaining:
            batch = next(batches)
            progress(len(batch.image_indices))
            remaining -= len(batch.image_indices)
            self._check_batch(batch)
            skipped += [
                {"file": self.source.names[image_index], "shard": file, "reason": reason}
                for image_index, reason in batch.bad_images.items()
            ]
            start = len(usable_indices)
            usable_indices += [i for i in batch.image_indices if i not in batch.bad_images]
            kinds.update(batch.kinds)
            if images and len(batch.pixels):
                images.append(batch.pixels.numpy())
            if batch.copy_done:
                batch.copy_done.synchronize()
            if batch.moments:
                num_encoded = len(usable_indices)
            for folder, moments in batch.moments.items():
                arrays[folder][start:num_encoded] = moments
        arrays = {folder: array[:num_encoded] for folder, array in arrays.items()}
        arrays["labels"] = self.source.labels[usable_indices].astype(np.int64)
        return Shard(file, arrays, skipped, kinds, images)

    def _check_batch(self, batch: Batch) -> None:
        """Raise UserError for an unreadable image, or for a bad image if --skip-bad is not set."""
        failures = batch.unreadable
        problem = "could not be read"
        remedy = "fix the problem and rerun the same command"
        if not failures and not self.settings.skip_bad:
            failures = batch.bad_images
            problem = "cannot be used"
            remedy = "fix the file or pass --skip-bad"
        if failures:
            image_index, reason = next(iter(failures.items()))
            line = format_image_error(self.source_flag, self.source, image_index, reason, problem)
            raise UserError(f"{line}; {remedy}")

    def make_preview(self) -> tuple[Image.Image, str]:
        """Return the preview of images from across the source, and a one-line description."""
        rows = []
        for image_index in make_evenly_spaced_indices(self.num_images, NUM_IMAGES).tolist():
            with suppress(BadImage, UnreadableImage):
                image, moments = self.read_preview_row(image_index)
                name = self.source.class_names[self.source.labels[image_index]]
                rows.append(PreviewRow(name, image, moments))
        return draw_preview(rows, self.vae)


def make_absolute_if_exists(path: str | None) -> str | None:
    """Return an absolute path, or the unchanged string if it is not a path (hub ids, patterns)."""
    if not path or not Path(path).exists():
        return path
    return os.path.abspath(path)  # noqa: PTH100  Path.resolve would also follow symlinks
