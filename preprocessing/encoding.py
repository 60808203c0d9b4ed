"""Encode images to moments: worker processes decode, batches are encoded, results are copied back.

A shard is always split into the same batches, and each batch runs the same kernels. Hence the bytes
of a cache do not depend on the number of processes, threads and attempts.

Shapes: B images of a batch, S their side, C latent channels, h x w latent size.
"""

import itertools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.cli import UserError
from common.files import NpyWriter, discard_on_error
from common.processes import World
from models.autoencoder import DEFAULT_VAE, Autoencoder
from models.errors import FieldError
from preprocessing.build import image_range
from preprocessing.cache_preview import make_preview, spread_indices
from preprocessing.images import BadImage, SquareReader, UnreadableImage, format_image_error
from preprocessing.shards import Shard, shard_file_name
from preprocessing.sources import ImageSource, open_source

DTYPES = {"float16": torch.float16, "float32": torch.float32}
PRECISIONS = ("fp32", "tf32", "bf16")
MAX_WORKERS = 16  # default limit of decoding processes per process
MAX_BATCH_SIZE = 64
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncodingSettings:
    """The flags of encode_latents, except for the destination, the device and the workers."""

    source: str
    labels: str | None = None
    resolution: int = 256
    crop: str = "center"
    seed: int = 0
    background: str = "white"
    flip: bool = False
    skip_bad: bool = False
    limit: int = 0
    vae: str = DEFAULT_VAE
    precision: str = "fp32"
    batch_size: int = 0
    dtype: str = "float16"
    shard_size: int = 8192
    keep_images: bool = False


class ImageFailure(NamedTuple):
    """An image that was not decoded, and the reason."""

    image_index: int
    reason: str


@dataclass
class DecodedBatch:
    """A batch as a worker process returns it.

    Attributes:
        shard_index: The shard to which the images belong.
        num_read: Number of images, including those that cannot be used.
        pixels: (B, 3, S, S) uint8, without the images that cannot be used.
        labels: (B,) class indices.
        bad_images: Images that cannot be used.
        kinds: Number of images of each kind.
        read_error: If set, this image could not be read, and the batch is incomplete.
        is_first_in_shard: True for the first batch of a shard.
    """

    shard_index: int
    num_read: int
    pixels: Tensor
    labels: np.ndarray
    bad_images: list[ImageFailure]
    kinds: Counter[str]
    read_error: ImageFailure | None = None
    is_first_in_shard: bool = False

    def pin_memory(self) -> "DecodedBatch":
        """Pin the pixels. The DataLoader's default copies all fields and doubles the Counter."""
        return replace(self, pixels=self.pixels.pin_memory())


class EncodedBatch(NamedTuple):
    """A decoded batch with its moments.

    Attributes:
        decoded: The decoded batch.
        moments: (B, 2C, h, w) in host memory, by folder; empty if they were not requested.
        copy_done: If set, the event that marks the end of the copy of the moments.
    """

    decoded: DecodedBatch
    moments: dict[str, Tensor]
    copy_done: torch.cuda.Event | None


class BatchSpec(NamedTuple):
    """The images of a batch."""

    shard_index: int
    image_indices: range
    is_first_in_shard: bool


class BatchDataset(Dataset[DecodedBatch]):
    """Decodes batches. Item k is batch k."""

    def __init__(self, source: ImageSource, reader: SquareReader, batches: list[BatchSpec]):
        self.source = source
        self.reader = reader
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> DecodedBatch:
        batch = self.batches[k]
        pixels = []
        good_indices = []
        bad_images = []
        kinds: Counter[str] = Counter()
        read_error = None
        for image_index in batch.image_indices:
            try:
                image = self.reader.read(self.source, image_index)
            except BadImage as error:
                bad_images.append(ImageFailure(image_index, str(error)))
                continue
            except UnreadableImage as error:
                read_error = ImageFailure(image_index, str(error))
                break
            pixels.append(image.pixels)
            kinds.update(image.kinds)
            good_indices.append(image_index)
        side = self.reader.side
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, side, side), np.uint8)
        return DecodedBatch(
            batch.shard_index,
            len(batch.image_indices),
            torch.from_numpy(stacked),
            self.source.labels[good_indices],
            bad_images,
            kinds,
            read_error,
            batch.is_first_in_shard,
        )


def absolute_if_exists(path: str | None) -> str | None:
    """Return an absolute path. Strings that are not existing paths (hub ids, patterns) are kept."""
    if not path or not Path(path).exists():
        return path
    return os.path.abspath(path)  # noqa: PTH100  Path.resolve would also follow symlinks


def identity_collate(batch: Any) -> Any:
    """Return the batch unchanged. The default converts arrays and doubles the Counter."""
    return batch


def init_worker(_: int) -> None:
    """Let only the main process handle Ctrl-C, and use one thread per worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def map_in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Result]:
    """Apply a function to items on a pool of threads, and yield the results in order.

    If `items` raises UserError, the results of all earlier items are yielded first.

    Args:
        pool: Threads that call the function.
        function: Called with one item.
        items: Consumed in the thread of the caller.
        ahead: Maximum number of items that are submitted before the result of an earlier one is
            yielded.
    """
    pending: deque[Future[Result]] = deque()
    iterator = iter(items)
    is_exhausted = False
    failure = None
    while pending or not is_exhausted:
        try:
            pending.append(pool.submit(function, next(iterator)))
        except StopIteration:
            is_exhausted = True
        except UserError as error:
            failure = error
            is_exhausted = True
        if pending and (len(pending) > ahead or is_exhausted):
            yield pending.popleft().result()
    if failure is not None:
        raise failure


def select_device(device: str, world: World) -> torch.device:
    """Return the device of this process; `cuda` gives each process of a machine its own GPU."""
    selected = torch.device(device)
    if selected.type != "cuda":
        return selected
    if selected.index is None:
        selected = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    elif world.num_local_processes > 1:
        raise UserError(
            f"--device {device} would run {world.num_local_processes} processes on one GPU; pass "
            "--device cuda"
        )
    # The loader's pinning thread uses the current device; it would allocate memory on GPU 0.
    torch.cuda.set_device(selected)
    return selected


def default_batch_size(resolution: int, device: torch.device) -> int:
    """Return the default batch size.

    A batch has as many pixels as 64 images of 256x256 on a GPU, or as 4 on the CPU, where each
    thread computes a batch; and at most MAX_BATCH_SIZE images.
    """
    images_of_256 = 64 if device.type == "cuda" else 4
    return max(1, min(MAX_BATCH_SIZE, images_of_256 * 256**2 // resolution**2))


class EncodingJob:
    """The job (preprocessing.build.CacheJob) that encodes images.

    Args:
        settings: Settings of the cache.
        device: One of cpu, cuda and cuda:N.
        num_workers: Decoding processes; -1 uses one per core, up to MAX_WORKERS.
        world: The processes of this command.

    Raises:
        UserError: If the source or the VAE cannot be opened, or if the settings do not fit them.
    """

    def __init__(self, settings: EncodingSettings, device: str, num_workers: int, world: World):
        labels = Path(settings.labels) if settings.labels else None
        self.source = open_source(Path(settings.source), labels=labels)
        self.device = select_device(device, world)
        if settings.precision == "tf32" and self.device.type == "cpu":
            raise UserError("--precision tf32 requires a GPU; on the CPU use fp32 or bf16")
        allow_tf32 = settings.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
        try:
            self.vae = Autoencoder(settings.vae, self.device)
        except FieldError as error:
            raise UserError(f"--vae {error.reason}") from None
        factor = self.vae.downsampling_factor
        if settings.resolution % factor:
            raise UserError(
                f"--resolution {settings.resolution} is not a multiple of {factor}, the "
                f"downsampling factor of --vae {settings.vae}"
            )

        cores = max(1, world.cores // world.num_local_processes)
        self.num_workers = min(cores, MAX_WORKERS) if num_workers < 0 else num_workers
        self.num_threads = 1
        if self.device.type == "cpu":
            # Each batch is computed by one thread, because the number of threads changes the bits.
            torch.set_num_threads(1)
            self.num_threads = cores
        self.batch_size = settings.batch_size or default_batch_size(
            settings.resolution, self.device
        )
        self.shard_size = settings.shard_size
        self.num_images = min(settings.limit or len(self.source), len(self.source))
        self.description = f"encoding {Path(settings.source).name}"
        self.precision = settings.precision
        self.flip = settings.flip
        self.skip_bad = settings.skip_bad
        self.keep_images = settings.keep_images
        self.reader = SquareReader(
            settings.resolution, settings.crop, settings.background, settings.seed
        )
        self.settings = asdict(settings) | {
            "batch_size": self.batch_size,
            "made_by": "encode_latents",
            "source": absolute_if_exists(settings.source),
            "labels": absolute_if_exists(settings.labels),
            "vae": absolute_if_exists(settings.vae),
        }
        self.plan = self._make_plan(settings)
        self.manifest_fields = self._make_manifest_fields(settings)

    def _make_plan(self, settings: EncodingSettings) -> dict[str, Any]:
        return {
            "images": self.num_images,
            "resolution": settings.resolution,
            "crop": settings.crop,
            "seed": None if settings.crop == "center" else settings.seed,
            "background": settings.background,
            "flip": settings.flip,
            "vae_fingerprint": self.vae.fingerprint(),
            "precision": settings.precision,
            "dtype": settings.dtype,
            "shard_size": settings.shard_size,
            "batch_size": self.batch_size,
            "keep_images": settings.keep_images,
            "names_and_labels": self.source.digest(self.num_images),
        }

    def _make_manifest_fields(self, settings: EncodingSettings) -> dict[str, Any]:
        side = settings.resolution // self.vae.downsampling_factor
        is_center = settings.crop == "center"
        return {
            "source": settings.source,
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "resolution": settings.resolution,
            "crop": "center" if is_center else f"random, seed {settings.seed}",
            "vae": settings.vae,
            "vae_fingerprint": self.plan["vae_fingerprint"],
            "scale": self.vae.scale.scale,
            "shift": self.vae.scale.shift,
            "latent_shape": [self.vae.channels, side, side],
            "dtype": settings.dtype,
            "flips": settings.flip,
            "images": settings.keep_images,
        }

    def iter_shards(
        self,
        dest: Path,
        shard_indices: list[int],
        progress: Callable[[int], None],
        only_images: bool = False,
    ) -> Iterator[tuple[int, Shard]]:
        """Make shards, see CacheJob. If only_images, only the first batch of each is encoded."""

        def encode(batch: DecodedBatch) -> EncodedBatch:
            return self.encode_batch(batch, not only_images or batch.is_first_in_shard)

        batches = []
        for shard_index in shard_indices:
            images = image_range(self, shard_index)
            for start in range(0, len(images), self.batch_size):
                image_indices = images[start : start + self.batch_size]
                batches.append(BatchSpec(shard_index, image_indices, start == 0))
        loader = DataLoader(
            BatchDataset(self.source, self.reader, batches),
            batch_size=None,
            num_workers=min(self.num_workers, len(batches)),
            worker_init_fn=init_worker,
            collate_fn=identity_collate,
            pin_memory=self.device.type == "cuda",
        )
        with ThreadPoolExecutor(self.num_threads, initializer=self.init_thread) as pool:
            encoded = map_in_order(pool, encode, self._validate(loader), self.num_threads)
            groups = itertools.groupby(encoded, key=lambda batch: batch.decoded.shard_index)
            for shard_index, group in groups:
                images_file = None
                if self.keep_images:
                    images_file = NpyWriter(
                        dest / "images" / shard_file_name(shard_index),
                        np.uint8,
                        (3, self.reader.side, self.reader.side),
                    )
                with discard_on_error(images_file):
                    shard = self._join(shard_index, group, progress, images_file)
                yield shard_index, shard

    def init_thread(self) -> None:
        """Select the device in a thread that encodes."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _validate(self, loader: DataLoader[DecodedBatch]) -> Iterator[DecodedBatch]:
        """Yield the batches.

        Raises:
            UserError: If an image could not be read, if an image cannot be used and is not to be
                skipped, or if a worker process died.
        """
        other_processes = set(multiprocessing.active_children())
        batches = iter(loader)
        workers = set(multiprocessing.active_children()) - other_processes
        try:
            for batch in batches:
                if batch.read_error:
                    message = self._describe(batch.read_error, "could not be read")
                    raise UserError(f"{message}; fix the problem and rerun the same command")
                if batch.bad_images and not self.skip_bad:
                    message = self._describe(batch.bad_images[0], "cannot be used")
                    raise UserError(f"{message}; fix the file or pass --skip-bad")
                yield batch
        except RuntimeError as error:
            if not any(worker.exitcode for worker in workers):
                raise
            reason = str(error.__cause__ or error).splitlines()[0].rstrip(" .")
            raise UserError(
                f"a decoding process died ({reason}); rerun the same command with --num-workers 1 "
                "to use less memory"
            ) from None

    def _describe(self, failure: ImageFailure, problem: str) -> str:
        index, reason = failure
        return format_image_error("--source", self.source, index, reason, problem)

    def encode_batch(self, batch: DecodedBatch, with_moments: bool = True) -> EncodedBatch:
        """Encode a batch, or return it without moments."""
        moments = {}
        copy_done = None
        if with_moments and len(batch.pixels):
            pixels = batch.pixels.to(self.device, non_blocking=True)
            moments["moments"] = self._encode(pixels)
            if self.flip:
                moments["mirrored"] = self._encode(pixels.flip(-1))
            if self.device.type == "cuda":
                copy_done = torch.cuda.Event()
                copy_done.record(torch.cuda.current_stream(self.device))
        return EncodedBatch(batch, moments, copy_done)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S) to moments (B, 2C, h, w) in host memory.

        From a GPU, the moments are copied asynchronously.
        """
        dtype = DTYPES[self.settings["dtype"]]
        is_bf16 = self.precision == "bf16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
                values = self.vae.encode(pixels).to(dtype)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch-size {self.batch_size} exceeds the memory of {self.device}; pass a "
                "smaller value"
            ) from None
        is_on_gpu = self.device.type == "cuda"
        moments = torch.empty(values.shape, dtype=dtype, pin_memory=is_on_gpu)
        return moments.copy_(values, non_blocking=True)

    def _join(
        self,
        shard_index: int,
        batches: Iterator[EncodedBatch],
        progress: Callable[[int], None],
        images: NpyWriter | None,
    ) -> Shard:
        """Join the batches of a shard, and append their pixels to `images`."""
        channels, *size = self.manifest_fields["latent_shape"]
        remaining = len(image_range(self, shard_index))
        folders = ["moments", "mirrored"] if self.flip else ["moments"]
        shape = (remaining, 2 * channels, *size)
        arrays = {folder: np.empty(shape, self.settings["dtype"]) for folder in folders}
        labels = []
        skipped = []
        kinds: Counter[str] = Counter()
        num_encoded = 0
        for batch, moments, copy_done in batches:
            if copy_done:
                copy_done.synchronize()
            if moments:
                rows = slice(num_encoded, num_encoded + len(batch.pixels))
                for folder, array in arrays.items():
                    array[rows] = moments[folder].numpy()
                num_encoded = rows.stop
            if images:
                images.append(batch.pixels.numpy())
            labels.append(batch.labels)
            kinds.update(batch.kinds)
            for image_index, reason in batch.bad_images:
                file = self.source.names[image_index]
                skipped.append(
                    {"file": file, "shard": shard_file_name(shard_index), "reason": reason}
                )
            progress(batch.num_read)
            remaining -= batch.num_read
            if not remaining:
                # Do not wait for the first batch of the next shard: it may raise an error.
                break
        arrays = {folder: array[:num_encoded] for folder, array in arrays.items()}
        arrays["labels"] = np.concatenate(labels).astype(np.int64)
        return Shard(arrays, skipped, kinds, images)

    def make_preview(self) -> tuple[Image.Image, str]:
        """Draw a preview of images from across the source; moments have the dtype of the cache."""
        names = []
        images = []
        moments = []
        for image_index in spread_indices(self.num_images):
            try:
                pixels = self.reader.read(self.source, image_index).pixels
            except (BadImage, UnreadableImage):
                continue
            image = torch.from_numpy(pixels.copy())
            names.append(self.source.class_names[self.source.labels[image_index]])
            images.append(image)
            moments.append(self._encode(image[None].to(self.device)))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return make_preview(names, images, moments, self.vae)
