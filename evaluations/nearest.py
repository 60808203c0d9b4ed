"""Find the training images nearest to samples in the feature space of a network.

If a model copies training images, some of its samples are closer to a training image than training
images are to each other. Distances are Euclidean.
Shapes: q queries, F features per image, k neighbours, B images per block, H x W pixels per image.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.cli import UserError
from common.evenly_spaced import make_evenly_spaced_indices
from evaluations.extractors import extract_features, load_extractor
from evaluations.fashion import FASHION_RESOLUTION
from evaluations.features import FeatureNetwork
from evaluations.image_batches import Images, ImageSubset, open_images
from evaluations.metrics import Device

NEIGHBOURS_PER_SAMPLE = 5
MAX_QUERIES = 2000  # maximum number of measured samples per set, and of probes
BLOCK_SIZE = 2048  # number of training images whose features are in memory at a time
NUM_EVENLY_SPACED = 16  # number of evenly spaced samples in the report
NUM_CLOSEST = 4  # number of samples in the report that are closest to a training image


class Neighbour(NamedTuple):
    """A training image, (H, W, 3), and its distance to a sample."""

    train_index: int
    distance: float
    image: np.ndarray


class NearestMatch(NamedTuple):
    """A sample, (H, W, 3), and the training images nearest to the sample, nearest first."""

    sample_index: int
    image: np.ndarray
    neighbours: list[Neighbour]


class MemorizationCheck(NamedTuple):
    """Result of the memorization check for one set of samples.

    Attributes:
        evenly_spaced: Evenly spaced samples of the set.
        closest: The measured samples that are closest to a training image.
        num_samples: Number of measured samples.
        close_fraction: Fraction of the measured samples that are closer to a training image than
            `first_percentile`.
        num_probes: Number of probes. A probe is a training image that is compared with the other
            training images.
        num_train_images: Number of training images that were searched.
        median_distance: Median distance of a probe to the nearest other training image.
        first_percentile: First percentile of the distances of the probes.
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

    Distances are computed in float64, because the squared norms of near copies almost cancel.

    Args:
        blocks: Consecutive blocks of features, (B, F).
        queries: Features of the queries, (q, F).
        self_indices: Index of each query in the blocks, (q,), or -1 if the blocks do not contain
            the query. A query is not a neighbour of itself.
        k: Number of neighbours.
        device: Device that computes distances.

    Returns:
        Distances and indices of the neighbours, each (q, k), nearest first.
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
class MemorizationSearch:
    """Compares sets of samples with training images. The training images are read once.

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

    def check(self, samples: dict[str, Images]) -> dict[str, MemorizationCheck]:
        """Check each set of samples. The samples must be the same size as the training images."""
        # Compute the features of the measured samples of each set, and of the probes.
        sample_indices = [_select_indices(images) for images in samples.values()]
        probes = make_evenly_spaced_indices(self.train.count, MAX_QUERIES)
        queries = [
            self._extract_features(images, indices, name)
            for (name, images), indices in zip(samples.items(), sample_indices)
        ]
        queries.append(self._extract_features(self.train, probes, "training images"))

        # Find the training images that are nearest to these samples and probes.
        count = self.train.count
        blocks = (
            self._extract_features(
                self.train,
                np.arange(start, min(start + BLOCK_SIZE, count)),
                f"training images from {start:,} of {count:,}",
            )
            for start in range(0, count, BLOCK_SIZE)
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

        # Compare the distances of the samples with the distances of the probes.
        baseline = probe_distances[:, 0]
        results = zip(samples, sample_indices, sample_distances, np.split(neighbours, ends))
        return {
            name: self._summarize(samples[name], indices, nearest, nearest_indices, baseline)
            for name, indices, nearest, nearest_indices in results
        }

    def _summarize(
        self,
        samples: Images,
        indices: np.ndarray,
        distances: np.ndarray,
        neighbours: np.ndarray,
        baseline: np.ndarray,
    ) -> MemorizationCheck:
        """Return the result for one set of samples.

        Args:
            samples: The set of samples.
            indices: Indices of the measured samples, (q,), in ascending order.
            distances: Distances of the measured samples to their neighbours, (q, k).
            neighbours: Indices of the neighbours, (q, k).
            baseline: Distance of each probe to the nearest other training image.
        """

        def read_match(row: int) -> NearestMatch:
            nearest = [
                Neighbour(index, distance, _read_image(self.train, index))
                for index, distance in zip(neighbours[row], distances[row])
            ]
            return NearestMatch(indices[row], _read_image(samples, indices[row]), nearest)

        evenly_spaced = make_evenly_spaced_indices(samples.count, NUM_EVENLY_SPACED)
        closest_rows = np.argsort(distances[:, 0], kind="stable")[:NUM_CLOSEST]
        first_percentile = np.percentile(baseline, 1)
        return MemorizationCheck(
            evenly_spaced=[read_match(row) for row in np.searchsorted(indices, evenly_spaced)],
            closest=[read_match(row) for row in closest_rows],
            num_samples=len(indices),
            close_fraction=(distances[:, 0] < first_percentile).mean(),
            num_probes=len(baseline),
            num_train_images=self.train.count,
            median_distance=np.median(baseline),
            first_percentile=first_percentile,
        )

    def _extract_features(self, images: Images, indices: np.ndarray, label: str) -> np.ndarray:
        """Return the features of the images at the given indices, (q, F)."""
        subset = ImageSubset(images, indices)
        features = extract_features(
            {"network": self.network}, subset, self.batch_size, label, self.device
        )
        return features["network"].pool


def _select_indices(images: Images) -> np.ndarray:
    """Return the indices of the samples to measure, which include the evenly spaced samples."""
    indices = make_evenly_spaced_indices(images.count, MAX_QUERIES)
    return np.union1d(indices, make_evenly_spaced_indices(images.count, NUM_EVENLY_SPACED))


def _read_image(images: Images, index: int) -> np.ndarray:
    """Read one image, (H, W, 3)."""
    return images.read_batch(index, index + 1)[0].transpose(1, 2, 0)


def check_memorization(
    samples: dict[str, Images],
    path: Path,
    features: str | None,
    weights: Path | None,
    batch_size: int,
    device: Device,
) -> dict[str, MemorizationCheck]:
    """Compare sets of samples with the training images of --nearest.

    The sets may differ in image size.

    Args:
        samples: Sets of samples by name.
        path: Path of the training images.
        features: Name of the feature network. By default, the bundled classifier for 32x32 images,
            and Inception for other images.
        weights: File with the Inception weights. By default, the file in the torch hub cache.
        batch_size: Images per forward pass.
        device: Device of the network.

    Returns:
        The result for each set of samples, by name.

    Raises:
        UserError: If the training images do not match the samples, or the network cannot be loaded.
    """
    checks: dict[str, MemorizationCheck] = {}
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
        checks |= MemorizationSearch(train, network, batch_size, device).check(group)
    return checks
