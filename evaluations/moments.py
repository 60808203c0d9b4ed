"""Compute mean and covariance of features that do not fit into memory.

Shapes: B images per batch, F features per image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics import Statistics

ZERO = torch.tensor(0.0)


@dataclass
class RunningMoments:
    """Running mean and scatter matrix in float64.

    Batches are merged with the formulas of Chan, Golub and LeVeque (1979), which avoid differences
    of large sums. `mean` and `scatter` are scalars if `count` is 0.

    Attributes:
        count: Number of images that have been added.
        mean: Mean of the features, (F,), on the device of the first batch.
        scatter: Sum of the outer products of the deviations from the mean, (F, F).
    """

    count: int = 0
    mean: Tensor = ZERO
    scatter: Tensor = ZERO

    def add(self, features: Tensor) -> None:
        """Add a batch of features, (B, F)."""
        x = features.double()
        mean = x.mean(0)
        self.merge(RunningMoments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: "RunningMoments") -> None:
        """Add the features that have been added to `other`."""
        total = self.count + other.count
        delta = other.mean - self.mean
        correction = torch.outer(delta, delta) * (self.count * other.count / total)
        self.scatter = self.scatter + (other.scatter + correction)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def cpu(self) -> "RunningMoments":
        """Return a copy in host memory."""
        return RunningMoments(self.count, self.mean.cpu(), self.scatter.cpu())

    def compute_statistics(self) -> Statistics:
        """Return mean and covariance, with n - 1 in the denominator as in numpy.cov."""
        return Statistics(np.asarray(self.mean), np.asarray(self.scatter) / (self.count - 1))
