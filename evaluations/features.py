"""Define the base class of feature networks, and the type of their outputs.

Shapes: B images per batch, n images in total, F features per image, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from common.tf32 import no_tf32

Array = TypeVar("Array")
OtherArray = TypeVar("OtherArray")


@dataclass(frozen=True)
class Features(Generic[Array]):
    """Outputs of a feature network for n images, as float32 tensors or NumPy arrays.

    Attributes:
        pool: Features, (n, F), which define the distance between images.
        spatial: Spatial features of Inception for sFID, (n, 2023). None for other networks.
        scores: Class probabilities or logits, (n, K). None for networks without a classifier.
    """

    pool: Array
    spatial: Array | None = None
    scores: Array | None = None

    def as_dict(self) -> dict[str, Array]:
        """Return the outputs that are not None, by name."""
        return {name: output for name, output in vars(self).items() if output is not None}

    def map(self, function: Callable[[Array], OtherArray]) -> "Features[OtherArray]":
        """Apply `function` to each output that is not None."""
        return Features(**{name: function(output) for name, output in self.as_dict().items()})


NumpyFeatures = Features[np.ndarray]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy a tensor on any device to a NumPy array in host memory."""
    return tensor.cpu().numpy()


class FeatureNetwork(nn.Module, ABC):
    """Base class of feature networks.

    Features that are computed during training, sampling and evaluation are compared with each
    other. They are therefore always computed in float32, regardless of the caller's autocast and
    TF32 settings.

    Attributes:
        weights_sha256: Hash of the weights and of all settings that determine the features.
    """

    weights_sha256: str

    def forward(self, images: Tensor) -> Features[Tensor]:
        """Return the features of images with values 0 to 255, (B, 3, H, W)."""
        with torch.autocast(images.device.type, enabled=False), no_tf32():
            return self.extract(images)

    @abstractmethod
    def extract(self, images: Tensor) -> Features[Tensor]:
        """Compute the result of `forward`, with autocast and TF32 disabled by the caller."""
