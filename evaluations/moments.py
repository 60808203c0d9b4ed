"""Mean and covariance of features that are never all in memory.

B features per batch, n in total, each of size F.
"""

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics import Statistics


class RunningMoments:
    """Running mean and scatter matrix in float64.

    Batches are merged with the formulas of Chan, Golub and LeVeque (1979), which avoid differences
    of large sums.

    Attributes:
        count: Number of features added.
        mean: Their mean, (F,). Undefined while `count` is 0.
        scatter: Sum of the outer products of their deviations from the mean, (F, F), likewise.
    """

    mean: Tensor
    scatter: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: Tensor) -> None:
        """Add a batch of features, (B, F). The moments stay on the device of the first batch."""
        x = features.double()
        mean = x.mean(0)
        self._merge(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "RunningMoments") -> None:
        """Add all features that `other` was computed from."""
        if other.count:
            self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count = count
            self.mean = mean
            self.scatter = scatter
            return
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def cpu(self) -> "RunningMoments":
        """Return a copy in host memory."""
        copy = RunningMoments()
        copy.count = self.count
        if self.count:
            copy.mean = self.mean.cpu()
            copy.scatter = self.scatter.cpu()
        return copy

    def compute_statistics(self) -> Statistics:
        """Return mean and covariance, with n - 1 in the denominator as in numpy.cov."""
        return Statistics(np.asarray(self.mean), np.asarray(self.scatter) / (self.count - 1))
