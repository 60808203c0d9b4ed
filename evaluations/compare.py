"""Features of samples against those of a reference: the numbers by the names they are known under."""

import numpy as np
import torch

from evaluations.extractors import Features
from evaluations.metrics import (
    compute_statistics,
    frechet_distance,
    frechet_interval,
    inception_score,
    precision_recall,
)
from evaluations.reference_features import ReferenceFeatures

COUNTS = (
    500,
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
)  # at which a distance is told, of those below the number of samples
RESULT_KEYS = (
    "metrics",
    "intervals",
    "by_count",
    "warning",
)  # of metrics.json; every other key identifies them
FULL = 50_000  # samples that papers compare
FRECHET = {"inception": "FID", "fashion": "FD-fashion", "dinov2-l": "FD-DINOv2"}


def frechet_name(network: str) -> str:
    """What the Frechet distance of a network's features is called: FID of Inception's alone."""
    return FRECHET.get(network, f"FD-{network}")


def compute_metrics(
    samples: Features,
    labels: np.ndarray | None,
    reference: ReferenceFeatures,
    network: str,
    device: torch.device | str,
    fp16_distances: bool = False,
) -> dict[str, float | None]:
    """The numbers of one set of samples; None where the reference, or missing labels (n,), cannot give one."""
    numbers = {
        frechet_name(network): frechet_distance(
            compute_statistics(samples.pool, device), reference.pool, device
        )
    }
    if network == "inception":
        spatial = reference.spatial and frechet_distance(
            compute_statistics(samples.spatial, device), reference.spatial, device
        )
        numbers |= {"sFID": spatial, "inception_score": inception_score(samples.scores)}
    if network == "fashion":
        numbers["class_agreement"] = (
            None if labels is None else float((samples.scores.argmax(1) == labels).mean())
        )
    pair = (None, None)
    if reference.features is not None:
        pair = precision_recall(
            reference.features, samples.pool, device=device, fp16=fp16_distances
        )
    suffix = "" if network in ("inception", "fashion") else f"-{network}"
    return numbers | {f"precision{suffix}": pair[0], f"recall{suffix}": pair[1]}


def spread(
    samples: Features, reference: ReferenceFeatures, network: str, device: torch.device | str
) -> dict[str, dict]:
    """How sure the Frechet distance is: a 95% bootstrap interval, and the same distance of fewer samples, the first ones."""
    name, count = frechet_name(network), len(samples.pool)
    counts = [n for n in COUNTS if count / 10 <= n < count]
    fewer = {
        str(n): frechet_distance(
            compute_statistics(samples.pool[:n], device), reference.pool, device
        )
        for n in counts
    }
    own = compute_statistics(samples.pool, device)
    interval = frechet_interval(samples.pool, reference.pool, device=device, own=own)
    return {
        "intervals": {} if interval is None else {name: list(interval)},
        "by_count": {name: fewer} if fewer else {},
    }


def warning(count: int, networks: list[str]) -> str | None:
    """What must be said of too few samples."""
    if count >= FULL or set(networks) == {"fashion"}:
        return None
    names = " and ".join(frechet_name(network) for network in networks if network != "fashion")
    return f"{names} of {count:,} samples lies above that of {FULL:,} and is comparable only with the same of {count:,}"
