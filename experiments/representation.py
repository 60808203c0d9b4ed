"""Measure representations with a linear probe and CKNNA, and map tokens to colours by PCA.

Shapes: n images or tokens, feature dimension D, K classes, k neighbours. All computations use
float64.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10  # k, as in REPA (arXiv:2410.06940)
ROWS_PER_CHUNK = 2048  # rows of the matrix of inner products that are in memory at once


class Probe(NamedTuple):
    """Softmax regression on standardized features."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (n, K) of features (n, D)."""
        return (features.double() - self.mean) / self.std @ self.weight.T + self.bias


def fit_probe(features: Tensor, labels: Tensor, num_classes: int) -> Probe:
    """Fit a linear probe with L-BFGS, starting at zero.

    The probe is the unique minimum of the mean cross-entropy + |weight|^2 / (2 n). Like the
    objective of LogisticRegression(C=1) in scikit-learn, this does not penalize the bias.
    The optimization ends when no partial derivative exceeds 1e-5. The weights of constant features
    are zero.

    Args:
        features: Inputs of the probe, (n, D).
        labels: Class indices, (n,).
        num_classes: Number of classes, K.
    """
    x = features.double()
    mean = x.mean(0)
    std = x.std(0, correction=0)
    varies = std > 1e-12 * (1 + mean.abs())
    std = torch.where(varies, std, torch.inf)
    x = (x - mean) / std
    weight = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=2000,
        max_eval=4000,
        tolerance_grad=1e-5,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        cross_entropy = F.cross_entropy(F.linear(x, weight, bias), labels)
        loss = cross_entropy + 0.5 / len(x) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(compute_loss)
    return Probe(mean, std, weight.detach(), bias.detach())


def compute_wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion (Wilson 1927).

    The interval is a subset of [0, 1] and is never empty.
    """
    z = 1.96  # 97.5% quantile of the normal distribution
    scale = count + z * z
    centre = (successes + z * z / 2) / scale
    variance = successes * (count - successes) / count + z * z / 4
    half_width = z / scale * math.sqrt(variance)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


class Neighbours(NamedTuple):
    """For each of n rows, the k other rows with the largest inner products."""

    products: Tensor  # inner products, (n, k)
    indices: Tensor  # row indices of the neighbours, (n, k)


def find_neighbours(features: Tensor, k: int = NEIGHBOURS) -> Neighbours:
    """Return the neighbours of each row of features (n, D).

    Rows are first scaled to unit length, as in the implementation by the authors of CKNNA.
    """
    unit = F.normalize(features.double(), dim=1)
    chunks = []
    for start in range(0, len(unit), ROWS_PER_CHUNK):
        chunk = unit[start : start + ROWS_PER_CHUNK] @ unit.T
        chunk.diagonal(start).fill_(-torch.inf)
        chunks.append(chunk.topk(k, 1))
    return Neighbours(*map(torch.cat, zip(*chunks)))


def compute_local_hsic(a: Neighbours, b: Neighbours) -> float:
    """Return the unbiased HSIC (Song et al. 2012, eq. 5) of two local kernels K and L, (n, n).

    Entry (i, j) of the kernels is zero unless j is a neighbour of i in both spaces. At most n k
    entries are nonzero, and only these are stored.
    """
    n = len(a.indices)

    # List the nonzero entries (i, j).
    is_common = a.indices[:, :, None] == b.indices[:, None, :]
    i, rank_in_a, rank_in_b = is_common.nonzero(as_tuple=True)
    if not len(i):
        return 0.0
    j = a.indices[i, rank_in_a]
    k_ij = a.products[i, rank_in_a]
    l_ij = b.products[i, rank_in_b]

    # Compute the trace of K L, the sum of K_ij L_ji. Entry (j, i) may be zero if (i, j) is not.
    positions, order = (i * n + j).sort()
    transposed = j * n + i
    candidate = torch.searchsorted(positions, transposed).clamp(max=len(positions) - 1)
    exists = positions[candidate] == transposed
    trace = (k_ij * l_ij[order[candidate]])[exists].sum()

    # Compute the sum of all entries of K L.
    zeros = torch.zeros(n, dtype=k_ij.dtype, device=k_ij.device)
    total = zeros.index_add(0, j, k_ij) @ zeros.index_add(0, i, l_ij)

    independent = k_ij.sum() * l_ij.sum() / ((n - 1) * (n - 2))
    return ((trace + independent - 2 * total / (n - 2)) / (n * (n - 3))).item()


def compute_cknna(a: Neighbours, b: Neighbours) -> float:
    """Return the centred kernel nearest-neighbour alignment of two spaces.

    The definition is in the appendix of Huh et al. 2024 (arXiv:2405.07987): inner-product kernels,
    common neighbours, and the unbiased HSIC. This function omits the 1e-6 that the authors'
    metrics.py adds to the denominator. The value depends on n, so compare only values for the same
    images.

    Returns:
        A value in about [-1, 1]: 1 for equal spaces, about k / n for independent spaces, and NaN if
        the local HSIC of a space with itself is zero.
    """
    scale = compute_local_hsic(a, a) * compute_local_hsic(b, b)
    return compute_local_hsic(a, b) / math.sqrt(scale) if scale > 0 else math.nan


class ColourBasis(NamedTuple):
    """Three principal components, and the range of scores that is mapped to colours."""

    mean: Tensor  # (D,)
    axes: Tensor  # orthonormal columns, (D, 3); zero if D < 3
    low: Tensor  # (3,)
    high: Tensor  # (3,)
    share: float  # fraction of the variance that the components explain

    def scores(self, tokens: Tensor) -> Tensor:
        """Return the scores (..., 3) of tokens (..., D)."""
        return (tokens.double() - self.mean) @ self.axes

    def colours(self, tokens: Tensor) -> Tensor:
        """Return the colours (..., 3) in [0, 1] of tokens (..., D).

        Scores are scaled such that `low` becomes 0 and `high` becomes 1.
        """
        width = (self.high - self.low).clamp(min=1e-12)
        return ((self.scores(tokens) - self.low) / width).clamp(0, 1)


def fit_colours(tokens: Tensor, reference_scores: Tensor | None = None) -> ColourBasis:
    """Return the principal components of tokens.

    Args:
        tokens: The tokens, (n, D).
        reference_scores: Scores that determine the signs of the components, (n, 3). Each component
            correlates positively with its reference scores, so that the colours of similar maps
            agree.
    """
    x = tokens.double()
    mean = x.mean(0)
    _, singular_values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    axes = F.pad(rows[:3].T, (0, max(0, 3 - len(rows))))
    scores = (x - mean) @ axes
    if reference_scores is not None:
        signs = torch.where((scores * reference_scores).sum(0) < 0, -1.0, 1.0)
        axes = axes * signs
        scores = scores * signs
    variance = singular_values.square()
    share = variance[:3].sum() / variance.sum().clamp(min=1e-300)
    return ColourBasis(mean, axes, scores.amin(0), scores.amax(0), share.item())
