"""Time reading batches from the latent cache, and from one .npy file per image as REPA stores them.

    python -m benchmarks.data_loading --dest /somewhere/on/the/disk/to/test --json loading.json

The data are random moments of ImageNet's shape, 8x32x32, in as many shards as ImageNet has by
default (157). Every row is a torch DataLoader that returns batches in random order. `npy` reads
and stacks one float32 file per image (REPA's loader also reads a PNG per image, which is omitted
here). `cache` is the stream of train.py, in float16, and `memory` is the same after
--cache-in-ram. `copy` is the lower bound, one contiguous copy of a batch. Cold rows drop the files
from the page cache before each round; caches of a RAID controller or a host cannot be dropped.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.measure import (
    add_result_flags,
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    scratch_folder,
    time_in_turn,
)
from common import cli
from common.files import write_array
from dataset import TrainingStream
from latents.cache import LatentCache
from latents.manifest import Manifest, write_manifest

CPU = torch.device("cpu")
SHAPE = (8, 32, 32)
NUM_CLASSES = 1000


class NpyFiles(Dataset):
    """Moments in one .npy file per image, with the labels in memory."""

    def __init__(self, folder: Path, num_images: int):
        self.paths = [str(npy_path(folder, i)) for i in range(num_images)]
        self.labels = np.arange(num_images) % NUM_CLASSES

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return moments (8, 32, 32) float32 and the label of an image."""
        return torch.from_numpy(np.load(self.paths[index])), torch.tensor(self.labels[index])


def npy_path(folder: Path, index: int) -> Path:
    """Return the path of an image's file in REPA's layout."""
    return folder / f"{index // 1000:05d}" / f"img-mean-std-{index:08d}.npy"


def write_data(npy_folder: Path, cache_folder: Path, num_images: int, num_shards: int) -> None:
    """Write the same random moments as .npy files and as a latent cache."""
    rng = np.random.default_rng(0)
    bounds = np.linspace(0, num_images, num_shards + 1).astype(int)
    shards = []
    for k in tqdm(range(num_shards), desc="writing"):
        indices = np.arange(bounds[k], bounds[k + 1])
        moments = rng.standard_normal((len(indices), *SHAPE), np.float32)
        file = f"{k:05d}.npy"
        write_array(cache_folder / "moments" / file, moments.astype(np.float16))
        write_array(cache_folder / "labels" / file, indices % NUM_CLASSES)
        shards.append({"file": file, "count": len(indices)})
        for index, image in zip(indices, moments):
            path = npy_path(npy_folder, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, image)
    manifest = Manifest(
        source="synthetic",
        count=num_images,
        num_classes=NUM_CLASSES,
        class_names=[],
        resolution=256,
        crop="",
        vae="",
        vae_fingerprint="",
        scale=1.0,
        shift=0.0,
        latent_shape=[4, 32, 32],
        dtype="float16",
        mean=[],
        std=[],
        shards=shards,
    )
    write_manifest(cache_folder, manifest)
    os.sync()


def evict(folder: Path, cache: LatentCache | None = None) -> None:
    """Drop a folder's files from the page cache, as far as the kernel allows it without root.

    Args:
        folder: Folder with .npy files.
        cache: A cache that maps the files, which would keep them in memory.
    """
    if cache is not None:
        for reader in cache.open_shards.values():
            reader.drop_pages()
    for path in folder.rglob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class BatchReader:
    """Reads a number of batches per call, from a loader that starts again at its end.

    Args:
        make_loader: Starts the loader.
        num_batches: Number of batches per call.
    """

    def __init__(self, make_loader: Callable[[], Iterable], num_batches: int):
        self.make_loader = make_loader
        self.num_batches = num_batches
        self.iterator = self._repeat()

    def __call__(self) -> None:
        """Read the batches."""
        for _ in range(self.num_batches):
            next(self.iterator)

    def stop(self) -> None:
        """Stop the loader and its worker processes."""
        self.iterator = self._repeat()

    def _repeat(self) -> Iterator:
        while True:
            yield from self.make_loader()


def npy_reader(files: NpyFiles, batch_size: int, num_workers: int, num_batches: int) -> BatchReader:
    """Return a reader of random batches from .npy files."""
    make_loader = partial(
        DataLoader, files, batch_size, shuffle=True, num_workers=num_workers, drop_last=True
    )
    return BatchReader(make_loader, num_batches)


def cache_reader(
    cache: LatentCache, batch_size: int, num_workers: int, num_batches: int
) -> BatchReader:
    """Return a reader of the batches of a training run."""
    stream = TrainingStream(cache, 0, batch_size)
    make_loader = partial(stream.read_batches, 0, 10**6, num_workers, pin_memory=False)
    return BatchReader(make_loader, num_batches)


class ColdReader(NamedTuple):
    """A reader, and the function that drops its files from the page cache."""

    read: BatchReader
    evict: Callable[[], None]

    def evict_and_read(self) -> None:
        """Drop the files from the page cache and read."""
        self.evict()
        self.read()


def time_cold(readers: dict[str, ColdReader], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of reading from the disk per round, without those of the eviction."""
    actions: dict[str, Callable[[], object]] = {
        name: reader.evict_and_read for name, reader in readers.items()
    }
    actions |= {f"evict {name}": reader.evict for name, reader in readers.items()}
    seconds = time_in_turn(actions, CPU, rounds).seconds
    return {
        name: [total - eviction for total, eviction in zip(seconds[name], seconds[f"evict {name}"])]
        for name in readers
    }


def time_readers(
    npy_folder: Path, cache_folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time all ways of reading the data.

    Args:
        npy_folder: Folder of the .npy files.
        cache_folder: The latent cache.
        args: The flags.

    Returns:
        The seconds of each round, and the number of batches per round, both by name.
    """
    batch_size, num_batches, num_workers = args.batch_size, args.batches, args.num_workers
    files = NpyFiles(npy_folder, args.images)
    cache = LatentCache(cache_folder)
    cache_in_ram = LatentCache(cache_folder)
    cache_in_ram.load_into_ram()
    source = np.zeros((batch_size, *SHAPE), np.float16)
    target = np.zeros_like(source)

    def copy() -> None:
        for _ in range(num_batches):
            np.copyto(target, source)

    # Warm: all files are in the page cache.
    readers = {
        "npy": npy_reader(files, batch_size, 0, num_batches),
        "cache": cache_reader(cache, batch_size, 0, num_batches),
        "memory": cache_reader(cache_in_ram, batch_size, 0, num_batches),
        f"npy, {num_workers} workers": npy_reader(files, batch_size, num_workers, num_batches),
        f"cache, {num_workers} workers": cache_reader(cache, batch_size, num_workers, num_batches),
    }
    for folder in (npy_folder, cache_folder):
        for path in folder.rglob("*.npy"):
            path.read_bytes()
    warm_seconds = time_in_turn({**readers, "copy": copy}, CPU, args.rounds).seconds

    # Cold: fewer batches. The maps of worker processes would keep the files in memory.
    for reader in readers.values():
        reader.stop()
    num_cold = max(1, num_batches // 10)
    cold_readers = {
        "npy, cold": ColdReader(
            npy_reader(files, batch_size, 0, num_cold), partial(evict, npy_folder)
        ),
        "cache, cold": ColdReader(
            cache_reader(cache, batch_size, 0, num_cold), partial(evict, cache_folder, cache)
        ),
    }
    cold_seconds = time_cold(cold_readers, args.rounds)

    batches = dict.fromkeys(warm_seconds, num_batches) | dict.fromkeys(cold_seconds, num_cold)
    return warm_seconds | cold_seconds, batches


def make_parser() -> cli.Parser:
    """Return the parser of the flags."""
    parser = cli.Parser(__doc__, "python -m benchmarks.data_loading", "--dest PATH")
    parser.add_argument(
        "--dest",
        type=Path,
        required=True,
        help="folder on the disk to test, for temporary files",
    )
    parser.add_argument(
        "--images",
        type=cli.positive_int,
        default=40_000,
        help="number of images; an image is 32 KB as .npy and 16 KB in the cache",
    )
    parser.add_argument(
        "--shards", type=cli.positive_int, default=157, help="number of shards of the cache"
    )
    parser.add_argument("--batch-size", type=cli.positive_int, default=256, help="images per batch")
    parser.add_argument(
        "--batches", type=cli.positive_int, default=40, help="number of batches per timed round"
    )
    parser.add_argument(
        "--num-workers",
        type=cli.positive_int,
        default=2,
        help="number of loader processes in the rows with workers",
    )
    add_result_flags(parser, rounds=15)
    return parser


def main() -> None:
    """Run the benchmark."""
    args = make_parser().parse_args()
    with scratch_folder(args.dest / "benchmark-data-loading") as root:
        write_data(root / "npy", root / "cache", args.images, args.shards)
        seconds, num_batches = time_readers(root / "npy", root / "cache", args)

    results = {}
    for name, values in seconds.items():
        batch_s = median_and_quartiles([value / num_batches[name] for value in values])
        num_samples = args.batch_size * num_batches[name]
        results[name] = {
            "batch_s": batch_s,
            "samples_per_s": num_samples / median_and_quartiles(values)["median"],
        }
    pairs = (
        ("npy", "cache"),
        ("npy", "memory"),
        (f"npy, {args.num_workers} workers", f"cache, {args.num_workers} workers"),
        ("npy, cold", "cache, cold"),
    )
    report(
        {
            "benchmark": "data_loading",
            "machine": describe_machine(CPU),
            "images": args.images,
            "shards": args.shards,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "batches": args.batches,
            "results": results,
            "ratios": {f"{a}/{b}": ratio_per_round(seconds[a], seconds[b]) for a, b in pairs},
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
