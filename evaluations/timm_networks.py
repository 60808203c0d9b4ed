"""Compute features with any timm network, including the features of FD-DINOv2.

FD-DINOv2 follows the code of its authors (Stein et al. 2023, arXiv:2306.04675).
Shapes: B images per batch, F features per image, S x S pixels in the network's input.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import UserError
from evaluations.features import FeatureNetwork, Features
from models.errors import FieldError
from models.weights import load_network, timm_name, weights_fingerprint

NON_TIMM_NETWORKS = ("inception", "fashion")  # names of --features that are not timm models
DINOV2_RESOLUTION = 224  # as in FD-DINOv2; the last training stage of DINOv2 used 518


class TimmFeatures(FeatureNetwork):
    """Maps uint8 images (B, 3, H, W) to the input of the network's classifier, `pool` (B, F).

    Images are resized to S x S as PIL does (bicubic, antialiased, rounded), and normalized with the
    mean and the standard deviation of the network. `weights_sha256` is a hash of the weights, the
    architecture, S, the mean and the standard deviation.

    Args:
        name: Name of the network: a short name of models/weights.py or a timm name.
        weights: File with the weights. By default, the weights are downloaded from the hub.
        flag: Flag that selected the network, for error messages.

    Raises:
        UserError: If timm has no network with this name, or the weights cannot be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: Path | None = None, flag: str = "--features"):
        import timm

        super().__init__()
        try:
            architecture = timm_name(name, NON_TIMM_NETWORKS)
            self.network = load_network(name, weights)
        except FieldError as error:
            source = "--encoder-weights" if error.field == "weights" else flag
            raise UserError(f"{source} {error.reason}") from None
        config = timm.data.resolve_data_config(model=self.network)
        self.resolution = config["input_size"][-1]
        if "dinov2" in architecture:
            self.resolution = DINOV2_RESOLUTION
            resize_position_embedding(self.network, DINOV2_RESOLUTION)
        settings = json.dumps([architecture, self.resolution, config["mean"], config["std"]])
        identity = settings + weights_fingerprint(self.network)
        self.weights_sha256 = hashlib.sha256(identity.encode()).hexdigest()
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features[Tensor]:
        """Return the features of a batch."""
        pixels = resize_bicubic(images, self.resolution) / 255
        return Features(self.network((pixels - self.mean) / self.std))


def resize_bicubic(images: Tensor, resolution: int) -> Tensor:
    """Resize images with the bicubic filter of PIL, to within one grey level.

    As in PIL before version 13, the width is resized first, and values are rounded and clipped
    after each axis.

    Args:
        images: uint8 images, (B, 3, H, W).
        resolution: Width and height of the result.

    Returns:
        Integer grey levels as float32, (B, 3, resolution, resolution).
    """
    x = images.float()
    # Resize the width first, then the height.
    for size in ((images.shape[-2], resolution), (resolution, resolution)):
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x


def resize_position_embedding(network: Any, resolution: int) -> None:
    """Resize the position embedding of a DINOv2 network in place, as the DINOv2 code does.

    The DINOv2 code interpolates bicubically without antialiasing, with a scale factor of
    (n + 0.1) / m from m to n patches per side (facebookresearch/dinov2, vision_transformer.py).
    The results of timm's method differ slightly.

    Args:
        network: A vision transformer of timm. The type is Any, because timm has no annotations.
        resolution: Width of the network's input in pixels.
    """
    old_size = network.patch_embed.grid_size[0]
    new_size = resolution // network.patch_embed.patch_size[0]
    positions = network.pos_embed.detach()
    prefix = positions[:, : -(old_size**2)]
    grid = positions[:, -(old_size**2) :]
    grid = grid.unflatten(1, (old_size, old_size)).permute(0, 3, 1, 2)
    factor = (new_size + 0.1) / old_size
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert grid.shape[-1] == new_size, (grid.shape, new_size)
    network.set_input_size(img_size=resolution)
    resized = torch.cat((prefix, grid.flatten(2).transpose(1, 2)), 1)
    network.pos_embed = nn.Parameter(resized, requires_grad=False)
