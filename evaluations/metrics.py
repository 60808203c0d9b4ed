"""The numbers, as ADM's evaluator defines them (Dhariwal & Nichol 2021, guided-diffusion/evaluations/evaluator.py).

n images, F features an image, K classes. Features come in as float32 numpy arrays; statistics are float64."""

from typing import NamedTuple

import numpy as np
import torch

NEIGHBOURS = 3  # of precision and recall


class Statistics(NamedTuple):
    """Mean (F,) and covariance (F, F), float64, with n - 1 in the denominator."""

    mu: np.ndarray
    sigma: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """(n, F) -> Statistics, in float64."""
    features = np.asarray(features, np.float64)
    return Statistics(features.mean(0), np.cov(features, rowvar=False))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Dowson & Landau 1982; FID when the features are Inception's.

    tr (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of R S_b R with R R = S_a. Both eigenproblems are
    symmetric, so there is no general matrix square root, nothing complex, and no epsilon on the diagonal for singular S."""
    values, vectors = np.linalg.eigh(a.sigma)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.sigma @ root)
    trace = np.sqrt(np.clip(product, 0, None)).sum()
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace)


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """exp E[KL(p(y|x) | p(y))] over consecutive chunks of split_size, averaged (Salimans et al. 2016): (n, K) -> number."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], np.float64)
        log_p, log_mean = np.log(p.clip(1e-300)), np.log(p.mean(0, keepdims=True).clip(1e-300))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores))


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)[None]).clamp(min=0)


def _radii(features: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """Squared distance of each feature to its k-th nearest other: (n, F) -> (n,)."""
    rows = [_squared_distances(part, features).kthvalue(k + 1, 1).values for part in features.split(block)]
    return torch.cat(rows)


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS, block: int = 2048, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of samples inside the reference's manifold, and
    the share of the reference inside the samples'. A manifold is the union of balls around its features out to the k-th
    nearest other, boundary included. (n, F), (m, F) -> numbers; memory for block x max(n, m) distances on
    the device."""
    a, b = (torch.from_numpy(np.asarray(features, np.float32)).to(device) for features in (reference, samples))
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # they are differences
    try:
        radius_a, radius_b = _radii(a, k, block), _radii(b, k, block)
        b_covered = torch.zeros(len(b), dtype=torch.bool, device=device)
        a_covered = []
        for start in range(0, len(a), block):
            distance = _squared_distances(a[start : start + block], b)
            b_covered |= (distance <= radius_a[start : start + block, None]).any(0)
            a_covered.append((distance <= radius_b).any(1))
        return b_covered.float().mean().item(), torch.cat(a_covered).float().mean().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
