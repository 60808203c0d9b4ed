"""Encode images to moments. Worker processes decode the images, and threads encode batches.

A shard is always split into the same batches, and each batch runs the same kernels. Hence the bytes
of a cache do not depend on the number of processes, threads or attempts.

Shapes: B batch size, S image side, C latent channels, h x w latent size.
"""

import signal
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.config import setting
from common.loader import Loader
from common.logs import get_logger
from common.ordered_map import map_in_order
from common.processes import World
from common.tf32 import set_tf32
from models.autoencoder import DEFAULT_VAE
from preprocessing.cache_job import DTYPES, Batch, CacheJob
from preprocessing.image_source import ImageSource
from preprocessing.images import BACKGROUNDS, CROPS, BadImage, SquareReader, UnreadableImage
from preprocessing.sources import open_source

logger = get_logger(__name__)

PRECISIONS = ("fp32", "tf32", "bf16")
MAX_WORKERS = 16  # default maximum number of decoding workers per process
MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class EncodingSettings:
    """Flags of encode_latents, except for the destination, the device and the workers."""

    source: Path = setting(
        help="images: a folder tree class/image.ext, an EDM zip, a tar or WebDataset tars, "
        "Hugging Face parquet files, or a quoted pattern of such files"
    )
    labels: Path | None = setting(
        None,
        help="CSV file with rows image,class or JSON file in the format of EDM's dataset.json "
        "(default: the labels of the source)",
    )
    label_column: str | None = setting(
        None, help="column of parquet files that contains the class (default: found by its name)"
    )
    unlabeled: bool = setting(
        False, help="put all images in one class, regardless of the labels in the source"
    )
    resolution: int = setting(
        256,
        type=cli.positive_int,
        help="width and height in pixels; images of other sizes are resized and cropped",
    )
    crop: str = setting(
        "center",
        choices=CROPS,
        help="crop method, as in ADM; random-seeded: one random crop per image, 80%% to 100%% of "
        "its shorter side",
    )
    seed: int = setting(0, type=cli.seed, help="seed of the random crops")
    background: str = setting(
        "white", choices=BACKGROUNDS, help="colour that transparent images are composited over"
    )
    flip: bool = setting(
        False,
        help="also encode the horizontally flipped images; training picks one of the two versions "
        "of an image in every epoch",
    )
    skip_bad: bool = setting(
        False,
        help="record images that cannot be used in DEST/skipped.jsonl instead of stopping",
    )
    limit: int = setting(
        0,
        type=cli.non_negative_int,
        help="number of images to encode, in the order of the source; 0: all images",
    )
    vae: str = setting(DEFAULT_VAE, help="hub id or folder of a diffusers AutoencoderKL")
    precision: str = setting("fp32", choices=PRECISIONS, help="arithmetic precision of the VAE")
    batch_size: int = setting(
        0,
        type=cli.non_negative_int,
        help="images per forward pass; 0: as many as have the pixels of 64 images of 256x256 on a "
        "GPU, or of 4 on the CPU",
    )
    dtype: str = setting("float16", choices=DTYPES, help="dtype of the stored moments")
    shard_size: int = setting(
        8192,
        type=cli.positive_int,
        help="images per shard; an interruption loses at most one shard per process",
    )
    keep_images: bool = setting(
        False,
        help="also store the cropped images as uint8, for --align repa; to add them to a complete "
        "cache, rerun the same command with this flag",
    )


def decode_batch(source: ImageSource, reader: SquareReader, image_indices: range) -> Batch:
    """Decode images. The batch ends early at an image that could not be read."""
    pixels = []
    kinds: Counter[str] = Counter()
    bad_images = {}
    unreadable = {}
    for image_index in image_indices:
        try:
            image = reader.read(source, image_index)
        except BadImage as error:
            bad_images[image_index] = str(error)
            continue
        except UnreadableImage as error:
            unreadable[image_index] = str(error)
            break
        pixels.append(image.pixels)
        kinds.update(image.kinds)
    stacked = np.stack(pixels) if pixels else np.empty((0, 3, reader.side, reader.side), np.uint8)
    return Batch(image_indices, torch.from_numpy(stacked), bad_images, unreadable, kinds)


def init_worker(_: int) -> None:
    """Make a decoding process ignore Ctrl-C, which the main process handles, and use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def select_device(device: str, world: World) -> torch.device:
    """Return the device of this process; `cuda` selects a different GPU for each local process."""
    if device == "cuda":
        return world.select_device()
    selected = torch.device(device)
    if selected.type == "cuda":
        if world.num_local_processes > 1:
            raise UserError(
                f"--device {device} would run {world.num_local_processes} processes on one GPU; "
                "pass --device cuda"
            )
        # The DataLoader pins memory on the current device, which would otherwise be GPU 0.
        torch.cuda.set_device(selected)
    return selected


def get_default_batch_size(resolution: int, device: torch.device) -> int:
    """Return the default batch size.

    On a GPU, a batch has as many pixels as 64 images of 256x256. On the CPU, where each thread
    computes its own batch, a batch has as many pixels as 4 such images. The maximum is
    MAX_BATCH_SIZE.
    """
    num_256px_images = 64 if device.type == "cuda" else 4
    return max(1, min(MAX_BATCH_SIZE, num_256px_images * 256**2 // resolution**2))


class EncodingJob(CacheJob):
    """Encodes images with a VAE.

    Args:
        settings: Settings of the cache.
        device: One of cpu, cuda and cuda:N.
        num_workers: Number of decoding workers; -1 uses one per core, up to MAX_WORKERS.
        world: The processes of this command.

    Raises:
        UserError: If the source or the VAE cannot be opened, or if the settings do not suit them.
    """

    command_name = "encode_latents"
    source_flag = "--source"
    settings: EncodingSettings

    def __init__(self, settings: EncodingSettings, device: str, num_workers: int, world: World):
        source = open_source(
            settings.source,
            labels=settings.labels,
            label_column=settings.label_column,
            is_unlabeled=settings.unlabeled,
        )
        logger.info("%s: %s", settings.source, source.describe())
        self.device = select_device(device, world)
        use_tf32 = settings.precision == "tf32"
        if use_tf32 and self.device.type == "cpu":
            raise UserError("--precision tf32 requires a GPU; on the CPU use fp32 or bf16")
        set_tf32(use_tf32)
        self.batch_size = settings.batch_size or get_default_batch_size(
            settings.resolution, self.device
        )
        super().__init__(replace(settings, batch_size=self.batch_size), source, self.device)
        factor = self.vae.downsampling_factor
        if settings.resolution % factor:
            raise UserError(
                f"--resolution {settings.resolution} is not a multiple of {factor}, the "
                f"downsampling factor of --vae {settings.vae}"
            )

        latent_side = settings.resolution // factor
        if latent_side % 2 and world.rank == 0:
            cli.print_warning(
                f"--resolution {settings.resolution} gives latents of {latent_side}x{latent_side}, "
                "which only models with patch size 1, such as SiT-XL/1, can use; for models such "
                f"as SiT-XL/2, choose a multiple of {2 * factor}"
            )

        cores = max(1, world.cores // world.num_local_processes)
        self.num_workers = min(cores, MAX_WORKERS) if num_workers < 0 else num_workers
        self.num_threads = 1
        if self.device.type == "cpu":
            # One thread computes each batch, because the number of threads affects the results.
            torch.set_num_threads(1)
            self.num_threads = cores
        self.num_images = min(settings.limit or self.num_images, self.num_images)
        self.description = f"encoding {settings.source.name}"
        self.reader = SquareReader(
            settings.resolution, settings.crop, settings.background, settings.seed
        )
        is_center = settings.crop == "center"
        crop = "center" if is_center else f"random, seed {settings.seed}"
        self.record(settings.resolution, crop, settings.flip)
        if is_center:
            self.plan["seed"] = None

    def iter_batches(self, shards: list[range], images_only: bool) -> Generator[Batch, None, None]:
        """Yield batches (see CacheJob). If images_only, encode only the first batch of a shard."""

        def encode(batch: Batch) -> Batch:
            is_first_in_shard = batch.image_indices.start % self.settings.shard_size == 0
            return self.encode_batch(batch) if is_first_in_shard or not images_only else batch

        batches = [
            images[start : start + self.batch_size]
            for images in shards
            for start in range(0, len(images), self.batch_size)
        ]
        loader = Loader(
            partial(decode_batch, self.source, self.reader),
            "images of --source",
            num_workers=min(self.num_workers, len(batches)),
            pin_memory=self.device.type == "cuda",
            worker_init=init_worker,
        )
        with (
            closing(loader.iterate(batches)) as decoded,
            ThreadPoolExecutor(self.num_threads, initializer=self.init_thread) as pool,
        ):
            yield from map_in_order(pool, encode, decoded, self.num_threads)

    def init_thread(self) -> None:
        """Select the device in an encoding thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def encode_batch(self, batch: Batch) -> Batch:
        """Add moments to a batch. On a GPU, they are copied to the host asynchronously."""
        if not len(batch.pixels):
            return batch
        pixels = batch.pixels.to(self.device, non_blocking=True)
        moments = {"moments": self._encode(pixels).numpy()}
        if self.settings.flip:
            moments["mirrored"] = self._encode(pixels.flip(-1)).numpy()
        copy_done = None
        if self.device.type == "cuda":
            copy_done = torch.cuda.Event()
            copy_done.record(torch.cuda.current_stream(self.device))
        return replace(batch, moments=moments, copy_done=copy_done)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S) to moments (B, 2C, h, w) in host memory.

        On a GPU, the copy to the host is asynchronous.
        """
        dtype = getattr(torch, self.settings.dtype)
        is_bf16 = self.settings.precision == "bf16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
                values = self.vae.encode(pixels).to(dtype)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch-size {self.batch_size} exceeds the memory of {self.device}; pass a "
                "smaller value"
            ) from None
        moments = torch.empty(values.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        return moments.copy_(values, non_blocking=True)

    def read_preview_row(self, image_index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its moments in the dtype of the cache (see CacheJob)."""
        image = torch.from_numpy(self.reader.read(self.source, image_index).pixels.copy())
        moments = self._encode(image[None].to(self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return image, moments
