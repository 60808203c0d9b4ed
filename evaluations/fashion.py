"""Define the bundled feature network, a small garment classifier trained on Fashion-MNIST.

The classifier replaces Inception on machines that cannot download weights. The Frechet distance of
its features is called FD-fashion and never FID, because the two have different scales.
Shapes: B images per batch.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import sha256
from evaluations.features import FeatureNetwork, Features

FASHION_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "fashion-mnist"
FASHION_WEIGHTS = FASHION_ASSETS / "classifier.safetensors"
FASHION_RESOLUTION = 32


class GarmentClassifier(FeatureNetwork):
    """A classifier with five convolutions, global average pooling and one linear layer.

    It maps images (B, 3, 32, 32) with values in [0, 255] to `pool`, (B, 128), and `scores`, the
    logits (B, 10).
    """

    num_features = 128
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _make_convolution(3, 32),
            _make_convolution(32, 64, stride=2),
            _make_convolution(64, 64),
            _make_convolution(64, 96, stride=2),
            _make_convolution(96, self.num_features),
        )
        self.head = nn.Linear(self.num_features, self.num_classes)

    def extract(self, images: Tensor) -> Features[Tensor]:
        """Return the features and logits of a batch.

        Raises:
            ValueError: If the images have another size.
        """
        if images.shape[1:] != (3, FASHION_RESOLUTION, FASHION_RESOLUTION):
            shape = "x".join(map(str, images.shape[1:]))
            raise ValueError(
                f"--features fashion needs 3x{FASHION_RESOLUTION}x{FASHION_RESOLUTION} images, "
                f"got {shape}; use --features inception for other images"
            )
        pool = self.body(images.float() / 127.5 - 1).mean((2, 3))
        return Features(pool, scores=self.head(pool))


def _make_convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def load_classifier(path: Path = FASHION_WEIGHTS) -> GarmentClassifier:
    """Load the bundled classifier in eval mode, and convert its float16 weights to float32."""
    model = GarmentClassifier()
    model.weights_sha256 = sha256(path)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
