"""Any timm network as a space to compare images in; FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) as its authors take it.

B batch, F features, S the network's side in pixels.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import UserError
from evaluations.metrics import no_tf32
from models.encoder import load_network, timm_name, weights_fingerprint
from models.errors import FieldError

OTHERS = ("inception", "fashion")  # what --features knows besides timm's
DINOV2_SIDE = 224  # of FD-DINOv2; the networks themselves were last trained at 518


class TimmFeatures(nn.Module):
    """(B, 3, H, W) uint8 -> what the classifier would see, (B, F). Images are resized to S x S as PIL does it (bicubic,
    antialiased, rounded) and normalised with the network's own mean and standard deviation. In fp32 whatever surrounds it.
    `weights_sha256` is of the weights, the architecture, S, mean and standard deviation.
    """

    def __init__(
        self,
        name: str,
        weights: Path | None = None,
        pretrained: bool = True,
        flag: str = "--features",
    ):
        """name: short, as models/encoder.py has it, or timm's; weights: timm's file, else the hub's. Raises UserError."""
        import timm

        super().__init__()
        try:
            wanted = timm_name(name, OTHERS)
            self.network = load_network(name, weights, pretrained, OTHERS)
        except FieldError as error:
            source = "--encoder-weights" if error.field == "weights" else flag
            raise UserError(f"{source} {error.reason}") from None
        config = timm.data.resolve_data_config(model=self.network)
        self.side = config["input_size"][-1]
        if "dinov2" in wanted:
            self.side = DINOV2_SIDE
            resize_positions(self.network, DINOV2_SIDE)
        settings = json.dumps([wanted, self.side, config["mean"], config["std"]])
        self.weights_sha256 = hashlib.sha256(
            (settings + weights_fingerprint(self.network)).encode()
        ).hexdigest()
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor]:
        with torch.autocast(images.device.type, enabled=False), no_tf32():
            return (self.network((resize(images, self.side) / 255 - self.mean) / self.std),)


def resize(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, side, side) float32 of whole grey levels: PIL's bicubic to within one of them, since it
    rounds and clips after each axis as PIL does.
    """
    x = images.float()
    for size in ((images.shape[-2], side), (side, side)):
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x


def resize_positions(network: nn.Module, side: int) -> None:
    """DINOv2's own way to another side, in place: bicubic without antialiasing, by a factor of (n + 0.1) / m for n patches
    where there were m (facebookresearch/dinov2, vision_transformer.py). timm's own differs a little.
    """
    old = network.patch_embed.grid_size[0]
    new = side // network.patch_embed.patch_size[0]
    positions = network.pos_embed.detach()
    first, grid = positions[:, : -(old**2)], positions[:, -(old**2) :]
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    factor = (new + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert grid.shape[-1] == new, (grid.shape, new)
    network.set_input_size(img_size=side)
    network.pos_embed = nn.Parameter(
        torch.cat((first, grid.flatten(2).transpose(1, 2)), 1), requires_grad=False
    )
