"""The offline feature extractor: a small garment classifier trained on Fashion-MNIST.

It stands in for Inception where no weights can be downloaded. Its Frechet distance is called FD-fashion, never FID:
the two are different numbers on different scales.
B batch, F = 128 features, K = 10 classes.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import sha256
from evaluations.metrics import no_tf32

WEIGHTS = (
    Path(__file__).resolve().parent.parent / "assets" / "fashion-mnist" / "classifier.safetensors"
)
FASHION_RESOLUTION = 32


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class GarmentClassifier(nn.Module):
    """Five convolutions, global average pooling, one linear layer.

    forward: (B, 3, 32, 32) in [0, 255] -> features (B, 128), logits (B, 10).
    """

    features = 128

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(
            _conv(3, 32),
            _conv(32, 64, 2),
            _conv(64, 64),
            _conv(64, 96, 2),
            _conv(96, self.features),
        )
        self.head = nn.Linear(self.features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (3, FASHION_RESOLUTION, FASHION_RESOLUTION):
            raise ValueError(
                f"--features fashion needs 3x{FASHION_RESOLUTION}x{FASHION_RESOLUTION} images, got {'x'.join(map(str, images.shape[1:]))}; "
                "use --features inception for other images"
            )
        with torch.autocast(images.device.type, enabled=False), no_tf32():
            features = self.body(images.float() / 127.5 - 1).mean((2, 3))
            return features, self.head(features)


def load_classifier(path: Path = WEIGHTS) -> GarmentClassifier:
    """The shipped classifier in eval mode, float32 (stored as float16)."""
    model = GarmentClassifier()
    model.weights_sha256 = sha256(path)
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    )
    return model.eval().requires_grad_(False)
