"""Find memorised training images, which are close to samples in the feature space of a network.

If a model copies training images, some of its samples are closer to a training image than training
images are to each other. Distances are Euclidean.
Shapes: n training images, q queries, F features per image, k neighbours, B images per block.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.cli import UserError
from evaluations.extractors import extract_features, load_extractor
from evaluations.fashion import FASHION_RESOLUTION
from evaluations.features import FeatureNetwork
from evaluations.image_batches import Images, ImageSubset, evenly_spaced_indices, open_images
from evaluations.metrics import Device

NEIGHBOURS_PER_SAMPLE = 5
MAX_QUERIES = 2000  # maximum number of compared samples per set, and of probes
BLOCK = 2048  # training images whose features are in memory at a time
NUM_SHOWN = 16  # number of evenly spaced samples to show with their neighbours
NUM_CLOSEST = 4  # number of samples closest to a training image to show with their neighbours


class Neighbour(NamedTuple):
    """A training image (H, W, 3) and its distance to a sample."""

    train_index: int
    distance: float
    image: np.ndarray


class NearestMatch(NamedTuple):
    """A sample (H, W, 3) and the training images nearest to it, nearest first."""

    sample_index: int
    image: np.ndarray
    neighbours: list[Neighbour]


class MemorisationCheck(NamedTuple):
    """Result of the memorisation check for one set of samples.

    Attributes:
        evenly_spaced: Samples evenly spaced over the set.
        closest: The measured samples that are closest to a training image.
        num_samples: Number of measured samples.
        close_fraction: Fraction of the measured samples that are closer to a training image than
            `first_percentile`.
        num_probes: Number of training images (probes) that were measured in the same way.
        num_train_images: Number of training images that were searched.
        median_distance: Median distance of the probes to their nearest other training image.
        first_percentile: First percentile of these distances.
    """

    evenly_spaced: list[NearestMatch]
    closest: list[NearestMatch]
    num_samples: int
    close_fraction: float
    num_probes: int
    num_train_images: int
    median_distance: float
    first_percentile: float


def find_nearest(
    blocks: Iterable[np.ndarray],
    queries: np.ndarray,
    self_indices: np.ndarray,
    k: int,
    device: Device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest features to each query.

    Distances are computed in float64, because the squared norms of near copies cancel.

    Args:
        blocks: Consecutive blocks of features, (B, F).
        queries: Queries, (q, F).
        self_indices: Index of the query itself among the features, which is excluded, or -1 if the
            features do not contain the query, (q,).
        k: Number of neighbours.
        device: Device that computes distances.

    Returns:
        Distances and indices of the neighbours, (q, k), nearest first.
    """
    query = torch.from_numpy(queries).to(device, torch.float64)
    excluded = torch.from_numpy(self_indices).to(device)[:, None]
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=device)
    best_indices = torch.full((len(queries), k), -1, dtype=torch.long, device=device)
    start = 0
    for block in blocks:
        features = torch.from_numpy(block).to(device, torch.float64)
        query_norms = query.square().sum(1)[:, None]
        squares = query_norms - 2 * query @ features.T + features.square().sum(1)
        indices = torch.arange(start, start + len(features), device=device).expand_as(squares)
        squares = squares.clamp(min=0).masked_fill(indices == excluded, torch.inf)
        best, order = torch.cat((best, squares), 1).topk(k, 1, largest=False)
        best_indices = torch.cat((best_indices, indices), 1).gather(1, order)
        start += len(features)
    return best.sqrt().cpu().numpy(), best_indices.cpu().numpy()


@dataclass(frozen=True)
class MemorisationSearch:
    """Compares sets of samples with training images, which are read once for all sets.

    Attributes:
        train: The training images.
        network: Network whose features are compared.
        batch_size: Images per forward pass.
        device: Device of the network.
    """

    train: Images
    network: FeatureNetwork
    batch_size: int
    device: Device

    def check(self, samples: dict[str, Images]) -> dict[str, MemorisationCheck]:
        """Return the result for each set. The samples must have the size of the training images."""
        # Compute the features of some samples of each set, and of some training images.
        sample_indices = [_select_indices(images) for images in samples.values()]
        probes = evenly_spaced_indices(self.train.count, MAX_QUERIES)
        queries = [
            self._features(images, indices, name)
            for (name, images), indices in zip(samples.items(), sample_indices)
        ]
        queries.append(self._features(self.train, probes, "training images"))

        # Find the training images that are nearest to these samples and probes.
        count = self.train.count
        blocks = (
            self._features(
                self.train,
                np.arange(start, min(start + BLOCK, count)),
                f"training images from {start:,} of {count:,}",
            )
            for start in range(0, count, BLOCK)
        )
        no_index = [np.full_like(indices, -1) for indices in sample_indices]
        distances, neighbours = find_nearest(
            blocks,
            np.concatenate(queries),
            np.concatenate([*no_index, probes]),
            NEIGHBOURS_PER_SAMPLE,
            self.device,
        )
        ends = np.cumsum([len(indices) for indices in sample_indices])
        *sample_distances, probe_distances = np.split(distances, ends)

        # Compare the distances of samples with those between training images.
        baseline = probe_distances[:, 0]
        results = zip(samples, sample_indices, sample_distances, np.split(neighbours, ends))
        return {
            name: self._summarise(samples[name], indices, nearest, nearest_indices, baseline)
            for name, indices, nearest, nearest_indices in results
        }

    def _summarise(
        self,
        samples: Images,
        indices: np.ndarray,
        distances: np.ndarray,
        neighbours: np.ndarray,
        baseline: np.ndarray,
    ) -> MemorisationCheck:
        """Return the result for one set of samples.

        Args:
            samples: The set.
            indices: Indices of the measured samples, (q,) ascending.
            distances: Distances to the neighbours of the samples, (q, k).
            neighbours: Indices of the neighbours, (q, k).
            baseline: Distances of the probes to the nearest other training image.
        """

        def match(row: int) -> NearestMatch:
            nearest = [
                Neighbour(index, distance, _read_image(self.train, index))
                for index, distance in zip(neighbours[row], distances[row])
            ]
            return NearestMatch(indices[row], _read_image(samples, indices[row]), nearest)

        shown_rows = np.searchsorted(indices, evenly_spaced_indices(samples.count, NUM_SHOWN))
        closest_rows = np.argsort(distances[:, 0], kind="stable")[:NUM_CLOSEST]
        first_percentile = np.percentile(baseline, 1)
        return MemorisationCheck(
            evenly_spaced=[match(row) for row in shown_rows],
            closest=[match(row) for row in closest_rows],
            num_samples=len(indices),
            close_fraction=(distances[:, 0] < first_percentile).mean(),
            num_probes=len(baseline),
            num_train_images=self.train.count,
            median_distance=np.median(baseline),
            first_percentile=first_percentile,
        )

    def _features(self, images: Images, indices: np.ndarray, description: str) -> np.ndarray:
        subset = ImageSubset(images, indices)
        features = extract_features(
            {"network": self.network}, subset, self.batch_size, description, self.device
        )
        return features["network"].pool


def _select_indices(images: Images) -> np.ndarray:
    """Return the indices of the samples to measure, which include those to show."""
    indices = evenly_spaced_indices(images.count, MAX_QUERIES)
    return np.union1d(indices, evenly_spaced_indices(images.count, NUM_SHOWN))


def _read_image(images: Images, index: int) -> np.ndarray:
    """Return one image, (H, W, 3)."""
    return images.read_batch(index, index + 1)[0].transpose(1, 2, 0)


def check_memorisation(
    samples: dict[str, Images],
    path: Path,
    features: str | None,
    weights: Path | None,
    batch_size: int,
    device: Device,
) -> dict[str, MemorisationCheck]:
    """Compare sets of samples with the training images of --nearest.

    The sets may differ in image size.

    Args:
        samples: Sets of samples by name.
        path: The training images.
        features: Name of the feature network. By default the bundled classifier for images of its
            size, and Inception for others.
        weights: File with the Inception weights. By default the one in the torch hub cache.
        batch_size: Images per forward pass.
        device: Device of the network.

    Returns:
        The result for each set of samples, by name.

    Raises:
        UserError: If the training images do not match the samples, or the network cannot be loaded.
    """
    checks: dict[str, MemorisationCheck] = {}
    for size in dict.fromkeys(images.size for images in samples.values()):
        group = {name: images for name, images in samples.items() if images.size == size}
        first_name = next(iter(group))
        height, width = size
        if height != width:
            raise UserError(
                f"--nearest needs square samples, but {first_name} has {width}x{height}: "
                "remove --nearest"
            )
        train = open_images(path, width, "--nearest", NEIGHBOURS_PER_SAMPLE)
        default_features = "fashion" if width == FASHION_RESOLUTION else "inception"
        network = load_extractor(features or default_features, weights, size, device, first_name)
        checks |= MemorisationSearch(train, network, batch_size, device).check(group)
    return checks
