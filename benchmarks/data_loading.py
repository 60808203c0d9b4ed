"""Time reading batches from the latent cache, and from one .npy file per image as in REPA.

    python -m benchmarks.data_loading --dest /somewhere/on/the/disk/to/test --json loading.json

The data are random moments with the shape of ImageNet moments, 8x32x32, split into 157 shards, the
default for ImageNet. An image takes 32 KB as .npy and 16 KB in the cache. Every row except `copy`
is a torch DataLoader that returns batches in random order. `npy` reads and stacks one float32 file
per image (the loader of REPA also reads a PNG per image, which is omitted here). `cache` is the
float16 stream of train.py, and `memory` is the same stream with --cache-in-ram. `copy` is the time
of one contiguous copy of a batch, which is a lower bound. For the rows with `cold`, the files are
dropped from the page cache before each round. The caches of a RAID controller or of a
virtualization host cannot be dropped.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import (
    Action,
    compare_times,
    make_parser,
    median_and_quartiles,
    report,
    scratch_folder,
    time_interleaved,
)
from benchmarks.variants import make_synthetic_manifest
from common import cli
from common.files import write_array
from common.progress import ProgressBar
from dataset import TrainingStream
from latents.cache import LatentCache
from latents.manifest import write_manifest

CPU = torch.device("cpu")
SHAPE = (8, 32, 32)  # shape of the moments of an image
NUM_CLASSES = 1000


class NpyFiles(Dataset):
    """A data set with one .npy file of moments per image, and with labels in memory."""

    def __init__(self, folder: Path, num_images: int):
        self.paths = [str(make_npy_path(folder, i)) for i in range(num_images)]
        self.labels = np.arange(num_images) % NUM_CLASSES

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the moments (8, 32, 32) float32 and the label of an image."""
        return torch.from_numpy(np.load(self.paths[index])), torch.tensor(self.labels[index])


def make_npy_path(folder: Path, index: int) -> Path:
    """Return the path of an image's file in the folder layout of REPA."""
    return folder / f"{index // 1000:05d}" / f"img-mean-std-{index:08d}.npy"


def write_data(npy_folder: Path, cache_folder: Path, num_images: int, num_shards: int) -> None:
    """Write the same random moments as .npy files and as a latent cache."""
    rng = np.random.default_rng(0)
    shards = []
    shard_indices = np.array_split(np.arange(num_images), num_shards)
    for k, indices in enumerate(ProgressBar(shard_indices, desc="writing")):
        moments = rng.standard_normal((len(indices), *SHAPE), np.float32)
        file = f"{k:05d}.npy"
        write_array(cache_folder / "moments" / file, moments.astype(np.float16))
        write_array(cache_folder / "labels" / file, indices % NUM_CLASSES)
        shards.append({"file": file, "count": len(indices)})
        for index, image in zip(indices, moments):
            path = make_npy_path(npy_folder, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, image)
    manifest = replace(make_synthetic_manifest(), count=num_images, images=False, shards=shards)
    write_manifest(cache_folder, manifest)
    os.sync()


def drop_page_cache(folder: Path) -> None:
    """Drop files from the page cache, as far as the kernel permits without root privileges.

    Args:
        folder: Folder with all .npy files, including the files of the latent cache.
    """
    for path in folder.rglob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_reader(make_loader: Callable[..., Iterable]) -> Action:
    """Return a function that reads the next batch, and that restarts an exhausted loader."""

    def iterate_forever() -> Iterator:
        while True:
            yield from make_loader()

    return partial(next, iterate_forever())


def time_readers(root: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Measure the seconds per batch for each way of reading the data, one value per round.

    Args:
        root: Folder with the .npy files in npy/ and the latent cache in cache/.
        args: The flags of the benchmark.
    """
    files = NpyFiles(root / "npy", args.images)
    cache = LatentCache(root / "cache")
    cache_in_ram = LatentCache(root / "cache")
    cache_in_ram.load_into_ram()
    source = np.zeros((args.batch_size, *SHAPE), np.float16)

    def make_npy_reader(num_workers: int = 0) -> Action:
        load = partial(DataLoader, files, args.batch_size, num_workers=num_workers)
        return make_reader(partial(load, shuffle=True, drop_last=True))

    def make_cache_reader(cache: LatentCache, num_workers: int = 0) -> Action:
        stream = TrainingStream(cache, 0, args.batch_size)
        return make_reader(partial(stream.read_batches, 0, 10**6, num_workers, pin_memory=False))

    # Warm: all files are in the page cache.
    warm: dict[str, Action] = {
        "npy": make_npy_reader(),
        "cache": make_cache_reader(cache),
        "memory": make_cache_reader(cache_in_ram),
        f"npy, {args.num_workers} workers": make_npy_reader(args.num_workers),
        f"cache, {args.num_workers} workers": make_cache_reader(cache, args.num_workers),
        "copy": partial(np.copyto, np.zeros_like(source), source),
    }
    for path in root.rglob("*.npy"):
        path.read_bytes()
    seconds = time_interleaved(warm, CPU, args.rounds, args.batches).seconds
    # Stop the worker processes before the cold measurements.
    warm.clear()

    # Cold: drop the files from the page cache before each round, and time fewer batches per round.
    cold = {"npy, cold": make_npy_reader(), "cache, cold": make_cache_reader(cache)}
    num_batches = max(1, args.batches // 10)
    prepare = partial(drop_page_cache, root)
    return seconds | time_interleaved(cold, CPU, args.rounds, num_batches, prepare=prepare).seconds


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "data_loading", "dest", images=40_000, batch_size=256, rounds=15)
    parser.add_argument(
        "--shards", type=cli.positive_int, default=157, help="number of shards of the cache"
    )
    parser.add_argument(
        "--batches", type=cli.positive_int, default=40, help="number of batches per timed round"
    )
    parser.add_argument(
        "--num-workers",
        type=cli.positive_int,
        default=2,
        help="number of DataLoader workers for the rows with workers",
    )
    args = parser.parse_args()
    with scratch_folder(args.dest / "benchmark-data-loading") as root:
        write_data(root / "npy", root / "cache", args.images, args.shards)
        seconds = time_readers(root, args)

    results = {}
    for name, values in seconds.items():
        batch_seconds = median_and_quartiles(values)
        results[name] = {
            "batch_s": batch_seconds,
            "samples_per_s": args.batch_size / batch_seconds["median"],
        }
    pairs = (
        ("npy", "cache"),
        ("npy", "memory"),
        (f"npy, {args.num_workers} workers", f"cache, {args.num_workers} workers"),
        ("npy, cold", "cache, cold"),
    )
    report(
        args,
        CPU,
        ("images", "shards", "batch_size", "rounds", "batches"),
        results=results,
        ratios=compare_times(seconds, pairs),
    )


if __name__ == "__main__":
    cli.run(main)
