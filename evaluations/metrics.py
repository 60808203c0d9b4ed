"""Compute the metrics of ADM's evaluator (Dhariwal & Nichol 2021).

The original is evaluations/evaluator.py of openai/guided-diffusion.
Shapes: n and m images, F features per image, K classes. Features are float32 NumPy arrays. Means,
covariances and all values that are computed from them are float64. Computations run on `device`,
and results are returned in host memory.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.tf32 import no_tf32

MANIFOLD_NEIGHBOURS = 3  # number of nearest neighbours for precision and recall
ROWS = 4096  # number of rows of features that are converted to float64 at a time
TILE_SIZE = 2048  # number of rows and columns of a block of the distance matrix
ADM_TILE_SIZE = 10_000  # tile size of ADM's evaluator (row_batch_size)

Device = torch.device | str


class Statistics(NamedTuple):
    """Mean and covariance of features in float64, as stored in ADM's .npz.

    Attributes:
        mu: Mean, (F,).
        sigma: Covariance with n - 1 in the denominator, (F, F).
    """

    mu: np.ndarray
    sigma: np.ndarray


class PrecisionRecall(NamedTuple):
    """Precision and recall, both in [0, 1]."""

    precision: float
    recall: float


def compute_statistics(features: np.ndarray, device: Device = "cpu") -> Statistics:
    """Compute mean and covariance of features in the same way as ADM's compute_statistics.

    The features are converted to float64 a few rows at a time, once for the mean and once for the
    covariance.

    Args:
        features: Features, (n, F).
        device: Device that computes the covariance.
    """
    n, size = features.shape
    starts = range(0, n, ROWS)
    mu = sum(features[i : i + ROWS].sum(0, dtype=np.float64) for i in starts) / n
    sigma = torch.zeros(size, size, dtype=torch.float64, device=device)
    for i in starts:
        sigma += _compute_gram_matrix(torch.from_numpy(features[i : i + ROWS] - mu).to(device))
    return Statistics(mu, sigma.div_(n - 1).cpu().numpy())


def frechet_distance(a: Statistics, b: Statistics, device: Device = "cpu") -> float:
    """Compute |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson & Landau 1982).

    For Inception features, the distance is the FID.

    For every R with R R^T = S_a, the symmetric matrix R^T S_b R has the eigenvalues of S_a S_b. Its
    eigenvalues are computed instead of a general matrix square root, which would need complex
    numbers and an epsilon on the diagonal. If one of the matrices is singular, that matrix is
    factorized, and its null space is excluded, because the square roots of rounding errors in the
    null space would not be small.
    """
    mu_a, sigma_a = _to_tensors(a, device)
    mu_b, sigma_b = _to_tensors(b, device)
    factor, is_singular = _factorize(sigma_a)
    other = sigma_b
    if not is_singular and torch.linalg.cholesky_ex(sigma_b).info:
        factor, _ = _factorize(sigma_b)
        other = sigma_a
    eigenvalues = torch.linalg.eigvalsh(factor.T @ other @ factor)
    trace = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mu_a - mu_b).square().sum() + sigma_a.trace() + sigma_b.trace() - 2 * trace
    return distance.clamp(min=0).item()  # a rounding error may be negative


def frechet_influence(
    features: np.ndarray, statistics: Statistics, reference: Statistics, device: Device = "cpu"
) -> np.ndarray:
    """Compute the derivative of the Frechet distance with respect to the weight of each row.

    The gradient of the distance is 2 (mu - mu_r) for mu and I - T for S, where
    T = R (R^T S R)^(-1/2) R^T with R R^T = S_r is the optimal transport map, the only symmetric
    T >= 0 with T S T = S_r (Dowson & Landau 1982; Takatsu 2011). An increase of the weight of a row
    x moves mu along x - mu, and S along (x - mu)(x - mu)^T - S. In directions in which the rows do
    not vary, the eigenvalues of R^T S R are replaced by their rounding error.

    Args:
        features: Features of the samples, (n, F).
        statistics: Mean and covariance of the features.
        reference: Mean and covariance of the reference.
        device: Device that computes the derivative.

    Returns:
        The derivatives, (n,), with mean 0.
    """
    n = len(features)
    mu, sigma = _to_tensors(statistics, device)
    mu_r, sigma_r = _to_tensors(reference, device)
    factor, _ = _factorize(sigma_r)
    values, vectors = _eigh(factor.T @ sigma @ factor)
    values = values.clamp(min=_estimate_rounding_error(values))
    half_map = factor @ vectors * values**-0.25  # T = half_map half_map^T
    derivatives = []
    for i in range(0, n, ROWS):
        x = torch.from_numpy(features[i : i + ROWS] - statistics.mu).to(device)
        mean_term = 2 * x @ (mu - mu_r)
        covariance_term = x.square().sum(1) - (x @ half_map).square().sum(1)
        derivatives.append(mean_term + covariance_term * n / (n - 1))
    influence = torch.cat(derivatives)
    return (influence - influence.mean()).cpu().numpy()


def frechet_interval(
    features: np.ndarray,
    reference: Statistics,
    level: float = 0.95,
    replicates: int = 1000,
    device: Device = "cpu",
) -> tuple[float, float] | None:
    """Compute a bootstrap percentile interval of the Frechet distance (Efron 1979), to first order.

    A replicate is the distance plus the mean of `frechet_influence` over n rows drawn with
    replacement. The interval reflects how the distance varies between sets of n images of the same
    model. The interval does not include the bias, which increases the distance of finitely many
    images by about the same amount in every replicate (Chong & Forsyth 2020), or the effect of the
    finite size of the reference. As the distance approaches 0, the first-order term and therefore
    the width of the interval vanish.

    Args:
        features: Features of the samples, (n, F).
        reference: Mean and covariance of the reference.
        level: Coverage of the interval.
        replicates: Number of bootstrap replicates.
        device: Device that computes the distance and the influence.

    Returns:
        Lower and upper end of the interval, or None if n <= F, where the covariance is singular.
    """
    n, size = features.shape
    if n <= size:
        return None
    statistics = compute_statistics(features, device)
    distance = frechet_distance(statistics, reference, device)
    influence = frechet_influence(features, statistics, reference, device)
    rng = np.random.default_rng(0)
    distances = [distance + influence[rng.integers(n, size=n)].mean() for _ in range(replicates)]
    low, high = np.quantile(distances, [(1 - level) / 2, (1 + level) / 2]).clip(min=0)
    return float(low), float(high)


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Compute exp E[KL(p(y|x) | p(y))] (Salimans et al. 2016), averaged over consecutive splits.

    As in compute_inception_score of ADM, rows keep their order, and a last split that is not full
    has the same weight as the others. A probability of 0 contributes 0, whereas ADM's score is nan.

    Args:
        probabilities: Class probabilities, (n, K).
        split_size: Number of rows per split.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], np.float64)
        log_p = np.log(p.clip(1e-300))
        log_mean = np.log(p.mean(0, keepdims=True).clip(1e-300))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    neighbours: int = MANIFOLD_NEIGHBOURS,
    tile_size: int | None = None,
    device: Device = "cpu",
    fp16: bool = False,
) -> PrecisionRecall:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the fraction of samples inside the manifold of the reference; recall is the
    fraction of the reference inside the manifold of the samples. A manifold is the union of closed
    balls around its features, each with the distance to the k-th nearest other feature as radius.

    Args:
        reference: Features of the reference, (n, F).
        samples: Features of the samples, (m, F).
        neighbours: Number k of nearest neighbours.
        tile_size: Number of rows and columns of a block of distances. With `fp16`, all distances of
            a block that overflows are recomputed in float32. The default is 2048, or 10,000 as in
            ADM with `fp16`.
        device: Device that computes distances. Both sets and a few blocks of distances must fit
            into the memory of the device.
        fp16: Whether to compute distances in float16, as ADM does (manifold_radii and evaluate_pr).
            The distances are converted to float32 before they are compared.

    Raises:
        ValueError: If n or m is not above k.
    """
    if min(len(reference), len(samples)) <= neighbours:
        raise ValueError(
            f"{len(reference)} and {len(samples)} features are too few for {neighbours} nearest "
            "neighbours"
        )
    real = torch.tensor(reference, dtype=torch.float32, device=device)
    fake = torch.tensor(samples, dtype=torch.float32, device=device)
    default_tile_size = ADM_TILE_SIZE if fp16 else TILE_SIZE
    tile = tile_size or default_tile_size
    # Small distances are differences of large numbers, so TF32 would lose their digits.
    with no_tf32():
        real_radii = manifold_radii(real, neighbours, tile, fp16)
        fake_radii = manifold_radii(fake, neighbours, tile, fp16)
        is_real_covered = torch.zeros(len(real), dtype=torch.bool, device=device)
        is_fake_covered = torch.zeros(len(fake), dtype=torch.bool, device=device)
        for i in range(0, len(real), tile):
            for j in range(0, len(fake), tile):
                distances = _compute_squared_distances(real[i : i + tile], fake[j : j + tile], fp16)
                in_fake_ball = distances <= fake_radii[j : j + tile]
                in_real_ball = distances <= real_radii[i : i + tile, None]
                is_real_covered[i : i + tile] |= in_fake_ball.any(1)
                is_fake_covered[j : j + tile] |= in_real_ball.any(0)
    return PrecisionRecall(
        precision=is_fake_covered.double().mean().item(),
        recall=is_real_covered.double().mean().item(),
    )


def manifold_radii(features: Tensor, neighbours: int, tile_size: int, fp16: bool) -> Tensor:
    """Compute the squared distance of each feature to its k-th nearest other feature.

    Args:
        features: Features, (n, F) float32.
        neighbours: Number k of nearest neighbours.
        tile_size: Number of rows and columns of a block of distances.
        fp16: Whether to compute distances in float16.

    Returns:
        The squared distances, (n,) float32.
    """
    radii = []
    for rows in features.split(tile_size):
        # The k + 1 smallest distances, including the distance of a feature to itself.
        nearest = rows.new_empty(len(rows), 0)
        for columns in features.split(tile_size):
            nearest = torch.cat([nearest, _compute_squared_distances(rows, columns, fp16)], 1)
            num_nearest = min(neighbours + 1, nearest.shape[1])
            nearest = nearest.topk(num_nearest, largest=False).values
        radii.append(nearest.max(1).values)
    return torch.cat(radii)


def _to_tensors(statistics: Statistics, device: Device) -> tuple[Tensor, Tensor]:
    """Convert mean and covariance to float64 tensors on `device`."""
    mu, sigma = (torch.tensor(x, dtype=torch.float64, device=device) for x in statistics)
    return mu, sigma


def _compute_gram_matrix(x: Tensor) -> Tensor:
    """Return x^T x. On the CPU, NumPy computes the product, because NumPy exploits the symmetry."""
    if x.is_cuda:
        return x.T @ x
    return torch.from_numpy(x.numpy().T @ x.numpy())


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues in ascending order, and the eigenvectors.

    On the CPU, NumPy is used, because NumPy's LAPACK computes eigenvectors in half the time.
    """
    if symmetric.is_cuda:
        return torch.linalg.eigh(symmetric)
    values, vectors = np.linalg.eigh(symmetric.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _estimate_rounding_error(eigenvalues: Tensor) -> Tensor:
    """Return the size of rounding errors in ascending eigenvalues (F,)."""
    return eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def _factorize(sigma: Tensor) -> tuple[Tensor, bool]:
    """Return R (F, rank) with R R^T = sigma, and whether sigma is singular.

    R is the Cholesky factor. For a singular matrix, R consists of scaled eigenvectors, except those
    whose eigenvalues do not exceed the rounding error.
    """
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor, False
    values, vectors = _eigh(sigma)
    is_significant = values > _estimate_rounding_error(values)
    return vectors[:, is_significant] * values[is_significant].sqrt(), True


def _compute_squared_distances(a: Tensor, b: Tensor, fp16: bool) -> Tensor:
    """Return the squared distances between float32 features (n, F) and (m, F) as (n, m) float32.

    The formula is that of ADM's _batch_pairwise_distances: |a|^2 - 2 a b + |b|^2, clipped at 0.
    With `fp16`, the distances are computed in float16. If one of them overflows, all are recomputed
    in float32 (DistanceBlock of ADM).
    """
    if fp16:
        distances = _compute_squared_distances(a.half(), b.half(), fp16=False)
        if distances.isfinite().all():
            return distances.float()
    products = (a @ b.T).mul_(-2)
    return products.add_(a.square().sum(1)[:, None]).add_(b.square().sum(1)).clamp_(min=0)
