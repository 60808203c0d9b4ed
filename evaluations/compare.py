"""Metrics of samples against a reference, under the names that papers use."""

from typing import NamedTuple

import numpy as np
import torch

from evaluations.features import Features
from evaluations.metrics import (
    compute_statistics,
    frechet_distance,
    frechet_interval,
    inception_score,
    precision_recall,
)
from evaluations.reference_features import ReferenceFeatures

# Keys of metrics.json that hold results. Every other key identifies the evaluation.
RESULT_KEYS = ("metrics", "intervals", "by_count", "warning")
SUBSET_COUNTS = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
STANDARD_COUNT = 50_000  # samples that papers evaluate
FRECHET_NAMES = {"inception": "FID", "fashion": "FD-fashion", "dinov2-l": "FD-DINOv2"}


class FrechetUncertainty(NamedTuple):
    """How far a Frechet distance may be from that of other or fewer samples.

    Attributes:
        interval: Lower and upper end of the 95% bootstrap interval. None if the covariance of the
            samples is singular.
        by_count: The distance of the first samples, by their number.
    """

    interval: tuple[float, float] | None
    by_count: dict[str, float]


def frechet_name(network: str) -> str:
    """Return the name of a network's Frechet distance, which is FID only for Inception."""
    return FRECHET_NAMES.get(network, f"FD-{network}")


def compute_metrics(
    samples: Features[np.ndarray],
    labels: np.ndarray | None,
    reference: ReferenceFeatures,
    network: str,
    device: torch.device | str,
    fp16_distances: bool = False,
) -> dict[str, float | None]:
    """Compute all metrics that a network's features of one set of samples allow.

    Args:
        samples: Features of the samples.
        labels: Classes of the samples, (n,), for class_agreement.
        reference: Features or statistics of the reference, of the same network.
        network: Name of the network.
        device: Where the metrics are computed.
        fp16_distances: Whether precision and recall use float16 distances, as ADM's evaluator does.

    Returns:
        Metrics by name. Those that need missing labels or missing parts of the reference are None.
    """
    distance = frechet_distance(compute_statistics(samples.pool, device), reference.pool, device)
    metrics: dict[str, float | None] = {frechet_name(network): distance}
    if network == "inception":
        assert samples.spatial is not None
        assert samples.scores is not None
        metrics["sFID"] = None
        if reference.spatial is not None:
            spatial = compute_statistics(samples.spatial, device)
            metrics["sFID"] = frechet_distance(spatial, reference.spatial, device)
        metrics["inception_score"] = inception_score(samples.scores)
    if network == "fashion":
        assert samples.scores is not None
        metrics["class_agreement"] = None
        if labels is not None:
            metrics["class_agreement"] = float((samples.scores.argmax(1) == labels).mean())
    suffix = "" if network in ("inception", "fashion") else f"-{network}"
    precision = recall = None
    if reference.features is not None:
        precision, recall = precision_recall(
            reference.features, samples.pool, device=device, fp16=fp16_distances
        )
    metrics[f"precision{suffix}"] = precision
    metrics[f"recall{suffix}"] = recall
    return metrics


def frechet_uncertainty(
    samples: Features[np.ndarray], reference: ReferenceFeatures, device: torch.device | str
) -> FrechetUncertainty:
    """Compute the bootstrap interval of the Frechet distance, and the distance of fewer samples.

    The numbers of samples are those in SUBSET_COUNTS that are at least a tenth of all.
    """
    count = len(samples.pool)
    by_count = {}
    for n in SUBSET_COUNTS:
        if count / 10 <= n < count:
            statistics = compute_statistics(samples.pool[:n], device)
            by_count[str(n)] = frechet_distance(statistics, reference.pool, device)
    statistics = compute_statistics(samples.pool, device)
    interval = frechet_interval(samples.pool, reference.pool, device=device, statistics=statistics)
    return FrechetUncertainty(interval, by_count)


def small_sample_warning(count: int, networks: list[str]) -> str | None:
    """Return a warning if published distances are computed from fewer samples than in papers."""
    if count >= STANDARD_COUNT or set(networks) == {"fashion"}:
        return None
    names = " and ".join(frechet_name(network) for network in networks if network != "fashion")
    return (
        f"{names} of {count:,} samples is biased upwards compared to {STANDARD_COUNT:,} samples; "
        f"compare it only with values of {count:,} samples"
    )
