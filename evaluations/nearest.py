"""The training images nearest to samples, and whether samples are nearer to them than training images are to each other.

Distances are Euclidean, between an extractor's features: n training images, q queries, F features an image, k neighbours."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from cli import UserError
from evaluations.features import extract, load_extractor
from preprocessing.images import read_or_name
from preprocessing.sources import open_source

NEIGHBOURS = 5
MOST = 2000  # samples, and training images measured against the others
BLOCK = 2048  # training images whose features are in memory at once


class Pictures:
    """Numbered images of one size: of an .npz, read from the file as they are wanted, or of a folder tree or archive."""

    def __init__(self, path: Path, flag: str, side: int | None = None):
        """`side`: pixels to crop a folder's or archive's images to. Raises UserError naming `flag`."""
        self.path, self.flag, self.source = path, flag, None
        if path.suffix == ".npz":
            self._read_header()
        else:
            self.source = open_source(path, flag)
            self.count, self.size = len(self.source), (side, side)

    def _read_header(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                self.start = file.tell()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.flag} {self.path} cannot be read as .npz of images ({error})") from None
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
            raise UserError(f"{self.flag} {self.path}: arr_0 must be uint8 of shape (n, H, W, 3), it is {dtype} {shape}")
        self.count, self.size = shape[0], shape[1:3]

    def read(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """The images of these numbers, ascending, as (3, H, W) uint8."""
        if self.source is not None:
            for i in numbers:
                yield read_or_name(self.source, int(i), self.size[0], self.flag)
            return
        height, width = self.size
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            for i in numbers:
                file.seek(self.start + int(i) * height * width * 3)
                pixels = np.frombuffer(file.read(height * width * 3), np.uint8)
                yield pixels.reshape(height, width, 3).transpose(2, 0, 1)

    def batches(self, numbers: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Likewise, (B, 3, H, W)."""
        images = self.read(numbers)
        for start in range(0, len(numbers), size):
            yield np.stack([next(images) for _ in numbers[start : start + size]])


class Match(NamedTuple):
    """A sample and what lies nearest to it; pictures (H, W, 3)."""

    number: int
    image: np.ndarray
    neighbours: list[tuple[int, float, np.ndarray]]  # number, distance and picture of a training image, nearest first


class Check(NamedTuple):
    """What was found of one set of samples."""

    spread: list[Match]  # evenly over the samples
    closest: list[Match]  # those of all that were measured whose nearest training image is closest
    measured: int  # samples
    close: float  # share of them closer to a training image than `percentile`
    among: int  # training images whose nearest other one was looked for, in `images`
    images: int
    median: float  # distance of a training image to its nearest other one
    percentile: float  # the first, of the same


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` numbers below `count`, evenly spread, both ends among them, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def nearest(
    blocks: Iterable[np.ndarray], queries: np.ndarray, own: np.ndarray, k: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of all features in blocks (B, F) to queries (q, F): distances and numbers (q, k), nearest first. own (q,):
    the number that is the query itself, and does not count; -1 for none. In float64: for near copies, like numbers cancel."""
    wanted = torch.from_numpy(queries).to(device, torch.float64)
    itself = torch.from_numpy(own).to(device)[:, None]
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=device)
    which = torch.full((len(queries), k), -1, dtype=torch.long, device=device)
    seen = 0
    for block in blocks:
        features = torch.from_numpy(block).to(device, torch.float64)
        squares = wanted.square().sum(1)[:, None] - 2 * wanted @ features.T + features.square().sum(1)
        number = torch.arange(seen, seen + len(features), device=device).expand_as(squares)
        squares = squares.clamp(min=0).masked_fill(number == itself, torch.inf)
        best, order = torch.cat((best, squares), 1).topk(k, 1, largest=False)
        which = torch.cat((which, number), 1).gather(1, order)
        seen += len(features)
    return best.sqrt().cpu().numpy(), which.cpu().numpy()


def check(
    samples: dict[str, Pictures], train: Pictures, network: nn.Module, batch_size: int, device: torch.device | str,
    shown: int = 16, suspects: int = 4,
) -> dict[str, Check]:  # fmt: skip
    """Each set of samples against all training images, which are read once, whatever the number of sets."""

    def features(pictures: Pictures, numbers: np.ndarray, desc: str) -> np.ndarray:
        return extract(network, pictures.batches(numbers, batch_size), len(numbers), desc, device).pool

    chosen = {name: np.union1d(evenly(each.count, MOST), evenly(each.count, shown)) for name, each in samples.items()}
    probes = evenly(train.count, MOST)
    queries = [features(samples[name], numbers, name) for name, numbers in chosen.items()]
    queries.append(features(train, probes, "training images"))
    own = np.concatenate([np.full(sum(map(len, chosen.values())), -1), probes])

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, train.count, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, train.count))
            yield features(train, numbers, f"training images from {start:,} of {train.count:,}")

    distance, number = nearest(blocks(), np.concatenate(queries), own, NEIGHBOURS, device)
    among = distance[-len(probes) :, 0]
    limit = float(np.percentile(among, 1))
    checks, start = {}, 0
    for name, numbers in chosen.items():
        mine, theirs = (array[start : start + len(numbers)] for array in (distance, number))
        start += len(numbers)
        places = np.searchsorted(numbers, evenly(samples[name].count, shown))
        closest = np.argsort(mine[:, 0], kind="stable")[:suspects]
        spread, near = (
            [_match(samples[name], train, numbers[i], mine[i], theirs[i]) for i in rows] for rows in (places, closest)
        )
        share = float((mine[:, 0] < limit).mean())
        checks[name] = Check(
            spread, near, len(numbers), share, len(probes), train.count, float(np.median(among)), limit
        )  # fmt: skip
    return checks


def _match(samples: Pictures, train: Pictures, number: int, distances: np.ndarray, numbers: np.ndarray) -> Match:
    found = []
    for i, distance in zip(numbers, distances):
        found.append((int(i), float(distance), next(train.read([i])).transpose(1, 2, 0)))
    return Match(int(number), next(samples.read([number])).transpose(1, 2, 0), found)


def check_all(
    samples: dict[str, Pictures], path: Path, features: str | None, weights: Path | None, batch_size: int,
    device: torch.device | str,
) -> dict[str, Check]:  # fmt: skip
    """Sets of samples of several sizes against the training images of --nearest. features None: the shipped classifier for
    images of its size, otherwise Inception. Raises UserError."""
    checks: dict[str, Check] = {}
    for size in dict.fromkeys(each.size for each in samples.values()):
        group = {name: each for name, each in samples.items() if each.size == size}
        if size[0] != size[1]:
            raise UserError(f"--nearest needs square samples, those of {next(iter(group))} are {size[1]}x{size[0]}")
        train = Pictures(path, "--nearest", size[0])
        if train.size != size or train.count <= NEIGHBOURS:
            raise UserError(
                f"--nearest {path} holds {train.count} images of {train.size[1]}x{train.size[0]}; more than {NEIGHBOURS} of "
                f"{size[1]}x{size[0]} are needed, as the samples are"
            )
        name = features or ("fashion" if size == (32, 32) else "inception")
        network = load_extractor(name, weights, size, device, next(str(each.path) for each in group.values()), "--features")
        checks |= check(group, train, network, batch_size, device)
    return checks
