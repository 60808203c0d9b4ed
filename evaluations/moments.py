"""Mean and covariance of features that are never all in memory. B of a batch, n in all, F features an image."""

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics import Statistics


class Moments:
    """Running mean (F,) and scatter (F, F), float64, merged as Chan, Golub and LeVeque 1979 do: no difference of large sums."""

    def __init__(self) -> None:
        self.n, self.mean, self.scatter = 0, None, None

    def add(self, features: Tensor) -> None:
        """(B, F), on any device; they stay there."""
        x = features.double()
        mean = x.mean(0)
        self._merge(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "Moments") -> None:
        """Those of other images."""
        if other.n:
            self._merge(other.n, other.mean, other.scatter)

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.n:
            self.n, self.mean, self.scatter = n, mean, scatter
            return
        total, delta = self.n + n, mean - self.mean
        self.scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def cpu(self) -> "Moments":
        """A copy in host memory."""
        copy = Moments()
        copy.n = self.n
        if self.n:
            copy.mean, copy.scatter = self.mean.cpu(), self.scatter.cpu()
        return copy

    def statistics(self) -> Statistics:
        """With n - 1 in the denominator, as numpy's cov."""
        return Statistics(np.asarray(self.mean), np.asarray(self.scatter) / (self.n - 1))
