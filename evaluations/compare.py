"""Compute the metrics of samples against a reference, and name them as papers do."""

from collections.abc import Iterable

import numpy as np

from evaluations.features import NumpyFeatures
from evaluations.metrics import (
    Device,
    compute_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from evaluations.reference_features import ReferenceFeatures
from evaluations.timm_networks import NON_TIMM_NETWORKS

# Keys of metrics.json that contain results. Every other key identifies the evaluation.
RESULT_KEYS = ("metrics", "intervals", "by_count", "warning")
# Numbers of samples at which the Frechet distance is computed in addition to all samples.
SUBSET_COUNTS = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
STANDARD_COUNT = 50_000  # number of samples that papers use
FRECHET_NAMES = {"inception": "FID", "fashion": "FD-fashion", "dinov2-l": "FD-DINOv2"}


def frechet_name(network: str) -> str:
    """Return the name of a network's Frechet distance, which is FID only for Inception."""
    return FRECHET_NAMES.get(network, f"FD-{network}")


def list_metric_names(network: str) -> list[str]:
    """Return the names of the metrics that `compute_metrics` returns for the features of a network.

    The names identify metrics that an older metrics.json lacks.
    """
    names = [frechet_name(network)]
    if network == "inception":
        names += ["sFID", "inception_score"]
    if network == "fashion":
        names.append("class_agreement")
    suffix = "" if network in NON_TIMM_NETWORKS else f"-{network}"
    return [*names, f"precision{suffix}", f"recall{suffix}"]


def compute_metrics(
    samples: NumpyFeatures,
    labels: np.ndarray | None,
    reference: ReferenceFeatures,
    network: str,
    device: Device,
    fp16_distances: bool = False,
) -> dict[str, float | None]:
    """Compute all metrics that are defined for the features of one network.

    Args:
        samples: Features of the samples.
        labels: Classes of the samples, (n,), or None if they are unknown.
        reference: Features or statistics of the reference from the same network.
        network: Name of the network.
        device: Device that computes the metrics.
        fp16_distances: Whether precision and recall use float16 distances, as ADM's evaluator does.

    Returns:
        Metrics by name. A metric is None if it needs labels or reference features that are not
        available.
    """
    distance = frechet_distance(compute_statistics(samples.pool, device), reference.pool, device)
    metrics: dict[str, float | None] = {frechet_name(network): distance}
    if network == "inception":
        assert samples.spatial is not None
        assert samples.scores is not None
        metrics["sFID"] = None
        if reference.spatial is not None:
            spatial_statistics = compute_statistics(samples.spatial, device)
            metrics["sFID"] = frechet_distance(spatial_statistics, reference.spatial, device)
        metrics["inception_score"] = inception_score(samples.scores)
    if network == "fashion":
        assert samples.scores is not None
        metrics["class_agreement"] = None
        if labels is not None:
            metrics["class_agreement"] = float((samples.scores.argmax(1) == labels).mean())
    suffix = "" if network in NON_TIMM_NETWORKS else f"-{network}"
    precision = recall = None
    if reference.features is not None:
        precision, recall = precision_recall(
            reference.features, samples.pool, device=device, fp16=fp16_distances
        )
    metrics[f"precision{suffix}"] = precision
    metrics[f"recall{suffix}"] = recall
    return metrics


def compute_distances_by_count(
    features: np.ndarray, reference: ReferenceFeatures, device: Device
) -> dict[str, float]:
    """Compute the Frechet distance of the first n samples for several n.

    n takes the values of SUBSET_COUNTS from a tenth of the number of samples to below this number.

    Args:
        features: Features of the samples, (n, F).
        reference: Features or statistics of the reference.
        device: Device that computes the distances.

    Returns:
        The distances by the number of samples.
    """
    count = len(features)
    return {
        str(n): frechet_distance(compute_statistics(features[:n], device), reference.pool, device)
        for n in SUBSET_COUNTS
        if count / 10 <= n < count
    }


def make_small_sample_warning(count: int, networks: Iterable[str]) -> str | None:
    """Return a warning if a Frechet distance is computed from fewer samples than papers use."""
    names = " and ".join(frechet_name(network) for network in networks if network != "fashion")
    if count >= STANDARD_COUNT or not names:
        return None
    return (
        f"{names}: values from {count:,} samples are biased upwards compared to "
        f"{STANDARD_COUNT:,} samples; compare them only with values from {count:,} samples"
    )
