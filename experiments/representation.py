"""What a representation is worth: a linear probe, CKNNA, and principal components as colours. Tensors in, numbers out.

n images or tokens, D features, K classes, k neighbours. Whatever is solved for or summed up is float64.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10  # REPA's k (arXiv:2410.06940)
ROWS = 2048  # of the inner products that are in memory at a time


class Probe(NamedTuple):
    """Softmax regression on standardised features."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    def logits(self, features: Tensor) -> Tensor:
        """(n, D) -> (n, K)."""
        return (features.double() - self.mean) / self.std @ self.weight.T + self.bias


def fit_probe(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float = 1.0, most: int = 2000
) -> Probe:
    """The one minimum of the mean cross-entropy + penalty / (2 n) |weight|^2 over features (n, D), labels (n,), by L-BFGS from
    zero: scikit-learn's LogisticRegression(C=1 / penalty), and like it without a penalty on the bias.

    Ends where no partial derivative is above 1e-5, or after `most` iterations. A feature that never changes stays at 0.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.inf)
    x = (x - mean) / std
    weight = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=most,
        max_eval=2 * most,
        tolerance_grad=1e-5,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = (
            F.cross_entropy(F.linear(x, weight, bias), labels)
            + penalty / (2 * len(x)) * weight.square().sum()
        )
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return Probe(mean, std, weight.detach(), bias.detach())


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (1927) of a share, `hits` of n: of 95% for z = 1.96. Stays within [0, 1], and is never empty."""
    centre, half = (
        (hits + z * z / 2) / (n + z * z),
        z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4),
    )
    return max(0.0, centre - half), min(1.0, centre + half)


class Neighbours(NamedTuple):
    """Of each of n rows the k other rows with the largest inner products: those, and which; (n, k)."""

    product: Tensor
    index: Tensor


def neighbours(features: Tensor, k: int = NEIGHBOURS) -> Neighbours:
    """(n, D), each row scaled to length 1 first, as the authors of CKNNA do. Holds ROWS of the n x n products at a time."""
    unit = F.normalize(features.double(), dim=1)
    assert len(unit) > k, (len(unit), k)
    found = []
    for start in range(0, len(unit), ROWS):
        products = unit[start : start + ROWS] @ unit.T
        products.diagonal(start).fill_(-torch.inf)
        found.append(products.topk(k, 1))
    return Neighbours(
        torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
    )


def local_hsic(a: Neighbours, b: Neighbours) -> float:
    """The unbiased HSIC (Song et al. 2012, eq. 5) of two kernels (n, n) that are 0 but where j is a neighbour of i in both.

    Such kernels have at most n k entries, and are never made whole: K_ij and L_ij are lists of those.
    """
    n = len(a.index)
    i, in_a, in_b = (a.index[:, :, None] == b.index[:, None, :]).nonzero(as_tuple=True)
    j, k_ij, l_ij = a.index[i, in_a], a.product[i, in_a], b.product[i, in_b]
    if not len(i):
        return 0.0
    place, order = (i * n + j).sort()  # "j is a neighbour of i" does not say that i is one of j
    mirror = j * n + i
    at = torch.searchsorted(place, mirror).clamp(max=len(place) - 1)
    trace = (k_ij * l_ij[order[at]])[place[at] == mirror].sum()  # of K L
    column_k, row_l = (torch.zeros(n, dtype=k_ij.dtype, device=k_ij.device) for _ in range(2))
    total = column_k.index_add_(0, j, k_ij) @ row_l.index_add_(0, i, l_ij)  # of all entries of K L
    return (
        (trace + k_ij.sum() * l_ij.sum() / ((n - 1) * (n - 2)) - 2 * total / (n - 2))
        / (n * (n - 3))
    ).item()


def cknna(a: Neighbours, b: Neighbours) -> float:
    """Centred kernel nearest-neighbour alignment (Huh et al. 2024, arXiv:2405.07987, appendix), in [-1, 1] or nearly: 1 for
    the same space, about k / n for two that know nothing of each other. NaN where either space agrees with itself in nothing.

    As their metrics.py: kernels of inner products, neighbours of either space met, the unbiased HSIC; but for the 1e-6 that
    it adds to the denominator. Depends on n: compare only values of the same images.
    """
    scale = local_hsic(a, a) * local_hsic(b, b)
    return local_hsic(a, b) / math.sqrt(scale) if scale > 0 else math.nan


class Basis(NamedTuple):
    """Three principal components, and the range that becomes a colour's."""

    mean: Tensor  # (D,)
    axes: Tensor  # (D, 3), orthonormal; 0 for those that D does not have
    low: Tensor  # (3,)
    high: Tensor  # (3,)
    share: float  # of the variance that is along them

    def scores(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., 3)."""
        return (tokens.double() - self.mean) @ self.axes

    def colours(self, tokens: Tensor) -> Tensor:
        """(..., D) -> red, green, blue in [0, 1], (..., 3): each component's least value is 0, its greatest 1."""
        return ((self.scores(tokens) - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(
            0, 1
        )


def principal(tokens: Tensor, like: Tensor | None = None) -> Basis:
    """Of tokens (n, D). A component's sign is free: it is the one with which the scores go up where those of `like` (n, 3) do,
    so that maps drawn one after the other differ in colour only where they differ.
    """
    x = tokens.double()
    mean = x.mean(0)
    _, values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    axes = F.pad(rows[:3].T, (0, max(0, 3 - len(rows))))
    scores = (x - mean) @ axes
    if like is not None:
        sign = torch.where((scores * like).sum(0) < 0, -1.0, 1.0)
        axes, scores = axes * sign, scores * sign
    share = values[:3].square().sum() / values.square().sum().clamp(min=1e-300)
    return Basis(mean, axes, scores.amin(0), scores.amax(0), share.item())
