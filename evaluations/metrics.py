"""The numbers, as ADM's evaluator defines them (Dhariwal & Nichol 2021, guided-diffusion/evaluations/evaluator.py).

n and m images, F features an image, K classes. Features come in as float32 numpy arrays; whatever is made of their means and
covariances is float64. `device` is where the work is done; what comes back is in host memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MANIFOLD_NEIGHBOURS = 3  # of precision and recall
ROWS = 4096  # of features that are in float64 at a time
TILE, ADM_TILE = (
    2048,
    10_000,
)  # rows and columns of the distances that are in memory at a time; ADM's row_batch_size

Device = torch.device | str


class Statistics(NamedTuple):
    """Mean (F,) and covariance (F, F), float64, with n - 1 in the denominator: `mu` and `sigma` of ADM's .npz."""

    mu: np.ndarray
    sigma: np.ndarray


def _gram(x: Tensor) -> Tensor:
    """x^T x. On the CPU by numpy, which computes half of what is symmetric."""
    return x.T @ x if x.is_cuda else torch.from_numpy(x.numpy().T @ x.numpy())


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in rising order, and eigenvectors. On the CPU by numpy, whose LAPACK takes half as long for the vectors."""
    if symmetric.is_cuda:
        return tuple(torch.linalg.eigh(symmetric))
    return tuple(torch.from_numpy(part) for part in np.linalg.eigh(symmetric.numpy()))


def compute_statistics(features: np.ndarray, device: Device = "cpu") -> Statistics:
    """(n, F) -> Statistics: compute_statistics of ADM. The mean first, then the covariance around it, part by part."""
    n, size = features.shape
    starts = range(0, n, ROWS)
    mu = sum(features[i : i + ROWS].sum(0, dtype=np.float64) for i in starts) / n
    sigma = torch.zeros(size, size, dtype=torch.float64, device=device)
    for i in starts:
        sigma += _gram(torch.from_numpy(features[i : i + ROWS] - mu).to(device))
    return Statistics(mu, sigma.div_(n - 1).cpu().numpy())


def _root(sigma: Tensor) -> tuple[Tensor, bool]:
    """R (F, rank) with R R^T = sigma, and whether sigma is singular: Cholesky's factor, or else from the eigenvectors of the
    eigenvalues that are not rounding.
    """
    root, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return root, False
    values, vectors = _eigh(sigma)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt(), True


def frechet_distance(a: Statistics, b: Statistics, device: Device = "cpu") -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Dowson & Landau 1982; FID when the features are Inception's.

    S_a S_b and R^T S_b R share their eigenvalues for every R with R R^T = S_a, and the latter is symmetric: no general matrix
    square root, nothing complex, and no epsilon on the diagonal. If one is singular it is the one that is taken apart, without
    its null space, where rounding has square roots that are no longer small.
    """
    mu_a, s_a, mu_b, s_b = (torch.tensor(x, dtype=torch.float64, device=device) for x in (*a, *b))
    (root, singular), other = _root(s_a), s_b
    if not singular and torch.linalg.cholesky_ex(s_b).info:
        (root, _), other = _root(s_b), s_a
    trace = torch.linalg.eigvalsh(root.T @ other @ root).clamp(min=0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + s_a.trace() + s_b.trace() - 2 * trace).item()


def influence(
    features: np.ndarray, own: Statistics, reference: Statistics, device: Device = "cpu"
) -> np.ndarray:
    """How the Frechet distance to the reference moves, to first order, with the weight of each row: (n, F) -> (n,), mean 0.
    `own` are the features' own statistics.

    The distance's gradient is 2 (mu - mu_r) in mu and I - T in S, where T = R (R^T S R)^(-1/2) R^T with R R^T = S_r is the
    optimal transport map, the only symmetric T >= 0 with T S T = S_r (Dowson & Landau 1982; Takatsu 2011). More weight on a row
    x pulls mu along x - mu, and S along (x - mu)(x - mu)^T - S. Directions in which the rows do not vary count as still.
    """
    n = len(features)
    mu, sigma, mu_r, sigma_r = (
        torch.tensor(x, dtype=torch.float64, device=device) for x in (*own, *reference)
    )
    root, _ = _root(sigma_r)
    values, vectors = _eigh(root.T @ sigma @ root)
    values = values.clamp(
        min=values[-1] * len(values) * torch.finfo(values.dtype).eps
    )  # below is rounding
    half = root @ vectors * values**-0.25  # T is half half^T
    rows = []
    for i in range(0, n, ROWS):
        x = torch.from_numpy(features[i : i + ROWS] - own.mu).to(device)
        rows.append(
            2 * x @ (mu - mu_r) + (x.square().sum(1) - (x @ half).square().sum(1)) * n / (n - 1)
        )
    moves = torch.cat(rows)
    return (moves - moves.mean()).cpu().numpy()


def frechet_interval(
    features: np.ndarray,
    reference: Statistics,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
    device: Device = "cpu",
    own: Statistics | None = None,
) -> tuple[float, float] | None:
    """Percentile interval (Efron 1979) of the Frechet distance of (n, F) features, each replicate to first order: the distance
    plus the mean of `influence` over n rows drawn with replacement. None when n <= F: the covariance is singular.
    `own` spares computing the features' statistics again.

    It covers what another n images of the same model would change. It does not cover the bias: a finite n makes the distance
    too large (Chong & Forsyth 2020), every draw about alike. Nor does it know that the reference is finite too. As the distance
    goes to 0 its first order vanishes, and the interval with it.
    """
    n, size = features.shape
    if n <= size:
        return None
    own = own or compute_statistics(features, device)
    distance, rng = frechet_distance(own, reference, device), np.random.default_rng(seed)
    moves = influence(features, own, reference, device)
    drawn = [distance + moves[rng.integers(n, size=n)].mean() for _ in range(replicates)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """exp E[KL(p(y|x) | p(y))] over consecutive chunks of split_size, averaged (Salimans et al. 2016): (n, K) -> number.

    As compute_inception_score of ADM does: rows in their order, and a last chunk that is not full counts like the others. A
    probability of 0 adds 0 (in ADM, whose logarithms are float32's, it makes the score nan).
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], np.float64)
        log_p, log_mean = np.log(p.clip(1e-300)), np.log(p.mean(0, keepdims=True).clip(1e-300))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores))


@contextmanager
def no_tf32() -> Iterator[None]:
    """Float32 products and convolutions on GPUs with all their digits, whatever training has allowed."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def _squared_distances(a: Tensor, b: Tensor, fp16: bool) -> Tensor:
    """(n, F), (m, F) float32 -> (n, m) float32, by ADM's _batch_pairwise_distances: |a|^2 - 2 a b + |b|^2, at least 0.

    With `half` in float16, unless any of it overflows: then all of it again in float32 (DistanceBlock of ADM).
    """
    if fp16:
        distances = _squared_distances(a.half(), b.half(), False)
        if distances.isfinite().all():
            return distances.float()
    products = (a @ b.T).mul_(-2)
    return products.add_(a.square().sum(1)[:, None]).add_(b.square().sum(1)).clamp_(min=0)


def manifold_radii(features: Tensor, k: int, tile: int, fp16: bool) -> Tensor:
    """Squared distance of each feature to its k-th nearest other, float32: (n, F) -> (n,)."""
    radii = []
    for rows in features.split(tile):
        nearest = rows.new_empty(len(rows), 0)  # the k + 1 smallest so far, itself among them
        for columns in features.split(tile):
            nearest = torch.cat([nearest, _squared_distances(rows, columns, fp16)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest.max(1).values)
    return torch.cat(radii)


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = MANIFOLD_NEIGHBOURS,
    tile_size: int | None = None,
    device: Device = "cpu",
    fp16: bool = False,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of samples inside the reference's manifold, and
    the share of the reference inside the samples'. A manifold is the union of balls around its features out to the k-th
    nearest other, boundary included. (n, F), (m, F) -> numbers. Raises ValueError unless n and m are above k.

    `half` is ADM's way (manifold_radii and evaluate_pr): float16 distances, compared as float32, and float32 for a block that
    overflows. Memory on the device: both sets, and a few times block x block distances; block is 2048, with half ADM's 10,000,
    for there it says which distances fall back together.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(
            f"{len(reference)} and {len(samples)} features have no {k} neighbours each"
        )
    a, b = (
        torch.tensor(features, dtype=torch.float32, device=device)
        for features in (reference, samples)
    )
    tile = tile_size or (ADM_TILE if fp16 else TILE)
    with no_tf32():  # they are differences
        radii_a, radii_b = manifold_radii(a, k, tile, fp16), manifold_radii(b, k, tile, fp16)
        a_covered, b_covered = (
            torch.zeros(len(x), dtype=torch.bool, device=device) for x in (a, b)
        )
        for i in range(0, len(a), tile):
            for j in range(0, len(b), tile):
                distances = _squared_distances(a[i : i + tile], b[j : j + tile], fp16)
                a_covered[i : i + tile] |= (distances <= radii_b[j : j + tile]).any(1)
                b_covered[j : j + tile] |= (distances <= radii_a[i : i + tile, None]).any(0)
    return b_covered.double().mean().item(), a_covered.double().mean().item()
