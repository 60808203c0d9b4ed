"""Images -> moments: decoded in worker processes, encoded batch by batch, copied back while the next batch is computed.

A shard is always cut into the same batches and each batch runs the same kernels, so the bytes do not depend on how many
processes, threads or attempts it took. B images of a batch, S their side, C latent channels, h w latent side.
"""

import itertools
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from preprocessing.sources import open_source

DTYPES = {"float16": torch.float16, "float32": torch.float32}
PRECISIONS = ("fp32", "tf32", "bf16")
A, B = TypeVar("A"), TypeVar("B")


@dataclass(frozen=True)
class EncodingSettings:
    """What is asked for: encode_latents' flags of the same names, but for those that say where and how fast."""

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


@dataclass
class DecodedBatch:
    """A batch as a worker process hands it over."""

    shard_index: int
    num_read: int  # images, good and bad
    pixels: Tensor  # (B, 3, S, S) uint8, of the good ones
    labels: np.ndarray
    bad_images: list[tuple[int, str]]  # number and reason
    kinds: Counter
    read_error: tuple[int, str] | None = (
        None  # an image that could not be read, good or bad, and why
    )
    is_first_in_shard: bool = False  # whether it is its shard's first

    def pin_memory(self) -> "DecodedBatch":
        """For the loader, which left to itself would copy what is in here, and add the Counter to itself."""
        return replace(self, pixels=self.pixels.pin_memory())


class EncodedBatch(NamedTuple):
    """The same with moments for pixels, in host memory."""

    shard_index: int
    num_read: int
    moments: dict[str, Tensor]  # by folder: (B, 2C, h, w)
    labels: np.ndarray
    bad_images: list[tuple[int, str]]
    kinds: Counter
    copy_done: torch.cuda.Event | None
    pixels: np.ndarray | None  # (B, 3, S, S) uint8, where they are kept


class Batches(Dataset):
    """Item k is batch k, decoded: what the worker processes do."""

    def __init__(self, source, reader: SquareReader, batches: list[tuple[int, range]]):
        self.source, self.reader, self.batches = source, reader, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> DecodedBatch:
        shard, numbers = self.batches[k]
        pixels, good, bad, kinds = [], [], [], Counter()
        for i in numbers:
            try:
                picture = self.reader.read(self.source, i)
            except BadImage as error:
                bad.append((i, str(error)))
                continue
            except UnreadableImage as error:
                return DecodedBatch(
                    shard, 0, torch.empty(0), np.empty(0), [], kinds, (i, str(error))
                )
            pixels.append(picture.pixels)
            kinds.update(picture.kinds)
            good.append(i)
        side = self.reader.side
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, side, side), np.uint8)
        labels, is_first_in_shard = (
            self.source.labels[good],
            k == 0 or self.batches[k - 1][0] != shard,
        )
        return DecodedBatch(
            shard,
            len(numbers),
            torch.from_numpy(stacked),
            labels,
            bad,
            kinds,
            is_first_in_shard=is_first_in_shard,
        )


def absolute_if_exists(path: str | None) -> str | None:
    """A path as it is found from any folder; what is none (a hub id, a pattern) stays what it is."""
    return os.path.abspath(path) if path and os.path.exists(path) else path


def unchanged(batch: DecodedBatch) -> DecodedBatch:
    """In place of torch's conversion, which makes tensors of arrays and adds a Counter to itself."""
    return batch


def in_worker(_: int) -> None:
    """Worker processes leave Ctrl-C to the one that started them, and each is one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], ahead: int
) -> Iterator[B]:
    """map(function, items) on the pool's threads, at most `ahead` items before the one that is taken. If `items` fails, what
    came before is finished first.
    """
    waiting: deque = deque()
    items, failure, more = iter(items), None, True
    while more or waiting:
        try:
            waiting.append(pool.submit(function, next(items)))
        except StopIteration:
            more = False
        except UserError as error:
            failure, more = error, False
        if waiting and (len(waiting) > ahead or not more):
            yield waiting.popleft().result()
    if failure:
        raise failure


class EncodingJob:
    """The job (preprocessing.build.Job) that encodes images."""

    def __init__(self, settings: EncodingSettings, device: str, num_workers: int, world: World):
        """Opens source and VAE. Raises UserError."""
        self.description = f"encoding {Path(settings.source).name}"
        self.source = open_source(
            Path(settings.source), labels=Path(settings.labels) if settings.labels else None
        )
        self.device = torch.device(device)
        if self.device.index is not None and world.num_local_processes > 1:
            raise UserError(
                f"--device {device} would put {world.num_local_processes} processes on one GPU: cuda gives each its own"
            )
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        if self.device.type == "cuda":
            torch.cuda.set_device(
                self.device
            )  # for the loader's thread, too, or it would hold memory of the first
        if settings.precision == "tf32" and self.device.type == "cpu":
            raise UserError("--precision tf32 is a GPU's; on the CPU there are fp32 and bf16")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            settings.precision == "tf32"
        )
        try:
            self.vae = Autoencoder(settings.vae, self.device)
        except FieldError as error:
            raise UserError(f"--vae {error.reason}") from None
        if settings.resolution % self.vae.downsampling_factor:
            raise UserError(
                f"--resolution {settings.resolution} is no multiple of {self.vae.downsampling_factor}, the factor of --vae {settings.vae}"
            )
        cores = max(1, world.cores // world.num_local_processes)
        self.num_threads, self.num_workers = 1, min(cores, 16) if num_workers < 0 else num_workers
        if (
            self.device.type == "cpu"
        ):  # whole batches side by side, each on one thread, or its bits would depend on how many
            torch.set_num_threads(1)
            self.num_threads = cores
        self.batch_size = settings.batch_size or default_batch_size(
            settings.resolution, self.device
        )
        self.settings = asdict(settings) | {
            "batch_size": self.batch_size,
            "made_by": "encode_latents",
        }
        self.settings |= {
            name: absolute_if_exists(self.settings[name]) for name in ("source", "labels", "vae")
        }
        self.precision, self.dtype, self.flip = (
            settings.precision,
            DTYPES[settings.dtype],
            settings.flip,
        )
        self.skip_bad, self.shard_size, self.keep_images = (
            settings.skip_bad,
            settings.shard_size,
            settings.keep_images,
        )
        self.pixels = (3, settings.resolution, settings.resolution)
        self.reader = SquareReader(
            settings.resolution, settings.crop, settings.background, settings.seed
        )
        self.num_images = min(settings.limit or len(self.source), len(self.source))
        side = settings.resolution // self.vae.downsampling_factor
        random = settings.crop != "center"
        self.plan: dict[str, Any] = {
            "images": self.num_images,
            "resolution": settings.resolution,
            "crop": settings.crop,
            "seed": settings.seed if random else None,
            "background": settings.background,
            "flip": settings.flip,
            "vae_fingerprint": self.vae.fingerprint(),
            "precision": settings.precision,
            "dtype": settings.dtype,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "keep_images": settings.keep_images,
            "names_and_labels": self.source.digest(self.num_images),
        }
        self.manifest_fields: dict[str, Any] = {
            "source": settings.source,
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "resolution": settings.resolution,
            "crop": f"random, seed {settings.seed}" if random else "center",
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
        """(number, shard) of each, in this order. only_images: of the moments only those of a shard's first batch."""

        def encode(batch: DecodedBatch) -> EncodedBatch:
            return self.encode_batch(batch, not only_images or batch.is_first_in_shard)

        batches = []
        for shard in shard_indices:
            images = image_range(self, shard)
            batches += [
                (shard, images[start : start + self.batch_size])
                for start in range(0, len(images), self.batch_size)
            ]
        loader = DataLoader(
            Batches(self.source, self.reader, batches),
            batch_size=None,
            num_workers=min(self.num_workers, len(batches)),
            worker_init_fn=in_worker,
            collate_fn=unchanged,
            pin_memory=self.device.type == "cuda",
        )
        with ThreadPoolExecutor(self.num_threads, initializer=self.init_thread) as pool:
            encoded = map_in_order(pool, encode, self._checked(loader), self.num_threads)
            for shard, group in itertools.groupby(encoded, key=lambda batch: batch.shard_index):
                images = (
                    NpyWriter(dest / "images" / shard_file_name(shard), np.uint8, self.pixels)
                    if self.keep_images
                    else None
                )
                with discard_on_error(images):
                    joined = self._joined(shard, group, progress, images)
                yield shard, joined

    def init_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _checked(self, loader: DataLoader) -> Iterator[DecodedBatch]:
        """The batches. Raises UserError for a bad image, unless bad ones are skipped, and for a worker that was killed."""
        try:
            for batch in loader:
                if batch.read_error:
                    line = format_image_error(
                        "--source", self.source, *batch.read_error, "could not be read"
                    )
                    raise UserError(f"{line}: when that is mended, run the same command again")
                if batch.bad_images and not self.skip_bad:
                    line = format_image_error("--source", self.source, *batch.bad_images[0])
                    raise UserError(f"{line}; mend it or pass --skip-bad")
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"a process that decodes images ended ({reason}): with less in memory, --num-workers 1, run it again"
            ) from None

    def encode_batch(self, batch: DecodedBatch, moments_too: bool = True) -> EncodedBatch:
        moments, copy_done, on_gpu, sides = {}, None, self.device.type == "cuda", {}
        if moments_too:
            pixels = batch.pixels.to(self.device, non_blocking=True)
            sides = {"moments": pixels} | ({"mirrored": pixels.flip(-1)} if self.flip else {})
        for name, images in sides.items():
            if len(images):
                try:
                    with torch.autocast(
                        self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
                    ):
                        values = self.vae.encode(images).to(self.dtype)
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"--batch-size {self.batch_size} is more than {self.device} has memory for: give a smaller one"
                    ) from None
                moments[name] = torch.empty(values.shape, dtype=self.dtype, pin_memory=on_gpu)
                moments[name].copy_(values, non_blocking=True)
        if on_gpu and moments:
            copy_done = torch.cuda.Event()
            copy_done.record(torch.cuda.current_stream(self.device))
        kept = batch.pixels.numpy() if self.keep_images else None
        return EncodedBatch(
            batch.shard_index,
            batch.num_read,
            moments,
            batch.labels,
            batch.bad_images,
            batch.kinds,
            copy_done,
            kept,
        )

    def _joined(
        self,
        shard: int,
        batches: Iterator[EncodedBatch],
        progress: Callable[[int], None],
        images: NpyWriter | None,
    ) -> Shard:
        latent = self.manifest_fields["latent_shape"]
        shape = (len(image_range(self, shard)), 2 * latent[0], *latent[1:])
        arrays = {
            name: np.empty(shape, self.settings["dtype"])
            for name in ("moments", "mirrored")[: 1 + self.flip]
        }
        labels, skipped, kinds, filled, left = [], [], Counter(), Counter(), shape[0]
        for batch in batches:
            if batch.copy_done:
                batch.copy_done.synchronize()
            for name, moments in batch.moments.items():
                arrays[name][filled[name] : filled[name] + len(moments)] = moments.numpy()
                filled[name] += len(moments)
            if images:
                images.append(batch.pixels)
            labels.append(batch.labels)
            kinds.update(batch.kinds)
            skipped += [
                {"file": self.source.names[i], "shard": shard_file_name(shard), "reason": reason}
                for i, reason in batch.bad_images
            ]
            progress(batch.num_read)
            left -= batch.num_read
            if not left:  # or the next batch would be waited for, which may never come
                break
        arrays = {name: array[: filled[name]] for name, array in arrays.items()}
        return Shard(
            arrays | {"labels": np.concatenate(labels).astype(np.int64)}, skipped, kinds, images
        )

    def make_preview(self) -> tuple[Image.Image, str]:
        """Images spread over the source beside what the VAE makes of them, through the cache's own dtype."""
        good = []
        for i in spread_indices(self.num_images):
            try:
                good.append((i, torch.from_numpy(self.reader.read(self.source, i).pixels.copy())))
            except (BadImage, UnreadableImage):
                continue
        names = [self.source.class_names[self.source.labels[i]] for i, _ in good]
        encoded = [
            self.encode_batch(DecodedBatch(0, 1, pixels[None], np.zeros(1), [], Counter()))
            for _, pixels in good
        ]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        moments = [batch.moments["moments"] for batch in encoded]
        return make_preview(names, [pixels for _, pixels in good], moments, self.vae)


def default_batch_size(resolution: int, device: torch.device) -> int:
    """Images a forward pass: on a GPU as many as 64 of 256 pixels, on the CPU, where each thread has its own, as 4; no more
    than 64.
    """
    most = (64 if device.type == "cuda" else 4) * 256**2
    return max(1, min(64, most // resolution**2))
