"""The training images nearest to samples, and whether samples are nearer to them than training images are to each other.

Distances are Euclidean, between an extractor's features: n training images, q queries, F features an image, k neighbours.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.cli import UserError
from evaluations.extractors import extract_all, load_extractor
from evaluations.image_batches import Images, ImageSubset, open_images

NEIGHBOURS_PER_SAMPLE = 5
MOST = 2000  # samples, and training images measured against the others
BLOCK = 2048  # training images whose features are in memory at once


class NearestMatch(NamedTuple):
    """A sample and what lies nearest to it; pictures (H, W, 3)."""

    sample_index: int
    image: np.ndarray
    neighbours: list[
        tuple[int, float, np.ndarray]
    ]  # number, distance and picture of a training image, nearest first


class MemorisationCheck(NamedTuple):
    """What was found of one set of samples."""

    evenly_spaced: list[NearestMatch]  # evenly over the samples
    closest: list[
        NearestMatch
    ]  # those of all that were measured whose nearest training image is closest
    num_samples: int  # samples
    close_fraction: float  # share of them closer to a training image than `percentile`
    num_probes: int  # training images whose nearest other one was looked for, in `images`
    num_train_images: int
    median_distance: float  # distance of a training image to its nearest other one
    first_percentile: float  # the first, of the same


def evenly_spaced_indices(count: int, most: int) -> np.ndarray:
    """At most `most` numbers below `count`, evenly spread, both ends among them, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def find_nearest(
    blocks: Iterable[np.ndarray],
    queries: np.ndarray,
    own: np.ndarray,
    k: int,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of all features in blocks (B, F) to queries (q, F): distances and numbers (q, k), nearest first. own (q,):
    the number that is the query itself, and does not count; -1 for none. In float64: for near copies, like numbers cancel.
    """
    wanted = torch.from_numpy(queries).to(device, torch.float64)
    itself = torch.from_numpy(own).to(device)[:, None]
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=device)
    which = torch.full((len(queries), k), -1, dtype=torch.long, device=device)
    seen = 0
    for block in blocks:
        features = torch.from_numpy(block).to(device, torch.float64)
        squares = (
            wanted.square().sum(1)[:, None] - 2 * wanted @ features.T + features.square().sum(1)
        )
        number = torch.arange(seen, seen + len(features), device=device).expand_as(squares)
        squares = squares.clamp(min=0).masked_fill(number == itself, torch.inf)
        best, order = torch.cat((best, squares), 1).topk(k, 1, largest=False)
        which = torch.cat((which, number), 1).gather(1, order)
        seen += len(features)
    return best.sqrt().cpu().numpy(), which.cpu().numpy()


def check(
    samples: dict[str, Images],
    train: Images,
    network: nn.Module,
    batch_size: int,
    device: torch.device | str,
    shown: int = 16,
    suspects: int = 4,
) -> dict[str, MemorisationCheck]:
    """Each set of samples against all training images, which are read once, whatever the number of sets."""

    def features(images: Images, numbers: np.ndarray, desc: str) -> np.ndarray:
        return extract_all({"": network}, ImageSubset(images, numbers), batch_size, desc, device)[
            ""
        ].pool

    chosen = {
        name: np.union1d(
            evenly_spaced_indices(each.count, MOST), evenly_spaced_indices(each.count, shown)
        )
        for name, each in samples.items()
    }
    probes = evenly_spaced_indices(train.count, MOST)
    queries = [features(samples[name], numbers, name) for name, numbers in chosen.items()]
    queries.append(features(train, probes, "training images"))
    own = np.concatenate([np.full(sum(map(len, chosen.values())), -1), probes])

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, train.count, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, train.count))
            yield features(train, numbers, f"training images from {start:,} of {train.count:,}")

    distance, number = find_nearest(
        blocks(), np.concatenate(queries), own, NEIGHBOURS_PER_SAMPLE, device
    )
    among = distance[-len(probes) :, 0]
    limit = float(np.percentile(among, 1))
    checks, start = {}, 0
    for name, numbers in chosen.items():
        mine, theirs = (array[start : start + len(numbers)] for array in (distance, number))
        start += len(numbers)
        places = np.searchsorted(numbers, evenly_spaced_indices(samples[name].count, shown))
        closest = np.argsort(mine[:, 0], kind="stable")[:suspects]
        spread, near = (
            [_match(samples[name], train, numbers[i], mine[i], theirs[i]) for i in rows]
            for rows in (places, closest)
        )
        share = float((mine[:, 0] < limit).mean())
        checks[name] = MemorisationCheck(
            spread,
            near,
            len(numbers),
            share,
            len(probes),
            train.count,
            float(np.median(among)),
            limit,
        )
    return checks


def _match(
    samples: Images, train: Images, number: int, distances: np.ndarray, numbers: np.ndarray
) -> NearestMatch:
    found = [(int(i), float(distance), one(train, i)) for i, distance in zip(numbers, distances)]
    return NearestMatch(int(number), one(samples, number), found)


def one(images: Images, i: int) -> np.ndarray:
    """Image i: (H, W, 3)."""
    return images.read_batch(i, i + 1)[0].transpose(1, 2, 0)


def check_memorisation(
    samples: dict[str, Images],
    path: Path,
    features: str | None,
    weights: Path | None,
    batch_size: int,
    device: torch.device | str,
) -> dict[str, MemorisationCheck]:
    """Sets of samples of several sizes against the training images of --nearest. features None: the shipped classifier for
    images of its size, otherwise Inception. Raises UserError.
    """
    checks: dict[str, MemorisationCheck] = {}
    for size in dict.fromkeys(each.size for each in samples.values()):
        group = {name: each for name, each in samples.items() if each.size == size}
        if size[0] != size[1]:
            raise UserError(
                f"--nearest needs square samples, those of {next(iter(group))} are {size[1]}x{size[0]}"
            )
        train = open_images(path, size[0], "--nearest")
        if train.size != size or train.count <= NEIGHBOURS_PER_SAMPLE:
            raise UserError(
                f"--nearest {path} holds {train.count} images of {train.size[1]}x{train.size[0]}; more than {NEIGHBOURS_PER_SAMPLE} of "
                f"{size[1]}x{size[0]} are needed, as the samples are"
            )
        name = features or ("fashion" if size == (32, 32) else "inception")
        network = load_extractor(name, weights, size, device, next(iter(group)), "--features")
        checks |= check(group, train, network, batch_size, device)
    return checks
