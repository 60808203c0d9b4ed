"""Batches a second from the latent cache, against one .npy file an image (the layout of REPA's preprocessing), in one run.

    python -m benchmarks.data_loading --dest /somewhere/on/the/disk/to/test --json loading.json

Random moments of ImageNet's shape, 8x32x32, in as many shards as ImageNet has at the default size (157). Every row is a torch
DataLoader that hands out batches in random order. `npy`: float32 files, read and stacked image by image (REPA's own loader
reads a PNG beside each, which is left out). `cache`: train.py's stream, float16. `memory`: the same after --cache-in-ram.
`copy` is the floor: one contiguous copy of a batch. Cold rows drop the files from the system's page cache before each timing;
what lies below it (a RAID's or a host's cache) is out of reach.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.measure import (
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    time_in_turn,
)
from common import cli
from common.files import write_array
from dataset import TrainingStream
from latents.cache import LatentCache, Manifest, write_manifest

CPU = torch.device("cpu")
SHAPE = (8, 32, 32)


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.data_loading", "--dest PATH")

    add = parser.add_argument
    add(
        "--dest",
        type=Path,
        required=True,
        help="folder to write to, and to empty afterwards, on the disk that is timed",
    )
    add(
        "--images",
        type=cli.positive_int,
        default=40_000,
        help="images; 32 KB each as .npy, 16 KB in the cache",
    )
    add("--shards", type=cli.positive_int, default=157, help="of the cache")
    add("--batch-size", type=cli.positive_int, default=256, help="images a batch")
    add("--batches", type=cli.positive_int, default=40, help="batches of one timing")
    add(
        "--rounds",
        type=cli.positive_int,
        default=15,
        help="timings of each, of which the median counts",
    )
    add(
        "--num-workers",
        type=cli.positive_int,
        default=2,
        help="loader processes of the rows that have some",
    )
    add("--json", type=Path, help="file for the result")

    return parser.parse_args()


class Files(Dataset):
    """One .npy an image, and the labels in a list."""

    def __init__(self, folder: Path, count: int):
        self.paths = [
            str(folder / f"{i // 1000:05d}" / f"img-mean-std-{i:08d}.npy") for i in range(count)
        ]
        self.labels = np.arange(count) % 1000

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.load(self.paths[i])), torch.tensor(self.labels[i])


def write(dest: Path, count: int, shards: int) -> None:
    """Both layouts of the same moments."""
    rng, cuts = np.random.default_rng(0), np.linspace(0, count, shards + 1).astype(int)
    entries = []
    for k, (start, stop) in enumerate(zip(tqdm(cuts[:-1], desc="writing"), cuts[1:])):
        moments = rng.standard_normal((stop - start, *SHAPE), np.float32)
        file = f"{k:05d}.npy"
        entries.append({"file": file, "count": int(stop - start)})
        write_array(dest / "cache/moments" / file, moments.astype(np.float16))
        write_array(dest / "cache/labels" / file, np.arange(start, stop) % 1000)
        for i, image in zip(range(start, stop), moments):
            path = dest / "npy" / f"{i // 1000:05d}" / f"img-mean-std-{i:08d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, image)
    write_manifest(
        dest / "cache",
        Manifest(
            source="synthetic",
            count=count,
            num_classes=1000,
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
            shards=entries,
        ),
    )
    os.sync()


def evict(folder: Path, cache: LatentCache | None = None) -> None:
    """Out of the page cache, as far as the system lets a user; first out of the maps of `cache`, or they hold it there."""
    for reader in cache.open_shards.values() if cache else ():
        reader.drop_pages()
    for path in folder.rglob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Timed:
    """Calling it takes the next `batches` batches of a loader that goes on and on."""

    def __init__(self, batches: int, loader: Callable[[], DataLoader]):
        self.batches, self.loader, self.iterator = batches, loader, iter(())

    def __call__(self) -> None:
        for _ in range(self.batches):
            if next(self.iterator, None) is None:
                self.iterator = self.endless()
                next(self.iterator)

    def endless(self) -> Iterator:
        """Epoch after epoch."""
        while True:
            yield from self.loader()


def main() -> None:
    args = parse()
    root = args.dest / "benchmark-data-loading"
    write(root, args.images, args.shards)
    cache, in_memory, files = (
        LatentCache(root / "cache"),
        LatentCache(root / "cache"),
        Files(root / "npy", args.images),
    )
    in_memory.load_into_ram()

    def npy(workers: int) -> Timed:
        def loader() -> DataLoader:
            return DataLoader(
                files, args.batch_size, shuffle=True, num_workers=workers, drop_last=True
            )

        return Timed(args.batches, loader)

    def stream(data: LatentCache, workers: int) -> Timed:
        return Timed(
            args.batches,
            lambda: TrainingStream(data, 0, args.batch_size).read_batches(0, 10**6, workers, False),
        )

    source, target = (np.zeros((args.batch_size, *SHAPE), np.float16) for _ in range(2))

    def copy() -> None:
        for _ in range(args.batches):
            np.copyto(target, source)

    warm = {
        "npy": npy(0),
        "cache": stream(cache, 0),
        "memory": stream(in_memory, 0),
        f"npy, {args.num_workers} workers": npy(args.num_workers),
        f"cache, {args.num_workers} workers": stream(cache, args.num_workers),
        "copy": copy,
    }
    try:
        for folder in (root / "npy", root / "cache"):
            for path in folder.rglob("*.npy"):
                path.read_bytes()
        seconds, _ = time_in_turn(warm, CPU, args.rounds, 1, 1)
        for action in warm.values():  # ends the workers, whose maps would keep the files in memory
            if isinstance(action, Timed):
                action.iterator = iter(())

        def cold(action: Timed, *what: Path | LatentCache) -> Callable[[], None]:
            return lambda: (evict(*what), action())

        few = max(1, args.batches // 10)
        cold_npy, cold_cache = npy(0), stream(cache, 0)  # whose maps are open by now
        cold_npy.batches = cold_cache.batches = few
        rows = {
            "npy, cold": (cold_npy, root / "npy"),
            "cache, cold": (cold_cache, root / "cache", cache),
        }
        actions = {name: cold(*row) for name, row in rows.items()}
        actions |= {f"evict {name}": partial(evict, *row[1:]) for name, row in rows.items()}
        times, _ = time_in_turn(actions, CPU, args.rounds, 1, 1)
    finally:
        shutil.rmtree(root)
    per_call = dict.fromkeys(warm, args.batches) | dict.fromkeys(rows, few)
    seconds |= {name: [a - b for a, b in zip(times[name], times[f"evict {name}"])] for name in rows}
    results = {
        name: {
            "batch_s": median_and_quartiles([value / per_call[name] for value in values]),
            "samples_per_s": args.batch_size
            * per_call[name]
            / median_and_quartiles(values)["median"],
        }
        for name, values in seconds.items()
    }
    workers = f", {args.num_workers} workers"
    pairs = (
        ("npy", "cache"),
        ("npy", "memory"),
        (f"npy{workers}", f"cache{workers}"),
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
