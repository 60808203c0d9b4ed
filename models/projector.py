"""Alignment heads, which project the tokens of a block and are removed after training.

docs/method.md explains the widths of the heads. Shapes: B batch, N tokens, D width.

Besides the standard library, this module imports only torch, so that the file can be copied into
other projects (docs/use-elsewhere.md).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn


def latent_tokens(latents: Tensor, patch: int) -> Tensor:
    """Split latents into patches, in the order of the output layer of SiT.

    Args:
        latents: (B, C, H, W).
        patch: Patch size p.

    Returns:
        (B, N, p * p * C).
    """
    b, c, h, w = latents.shape
    grid = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


class Projector(nn.Sequential):
    """An MLP with SiLU between the layers: (B, N, width) -> (B, N, output_dim) in float32.

    In SRA 2, the last layer has only 0.2% of the weights. Such a small last layer is computed in
    float32 even under autocast, so that the alignment loss does not compare rounded numbers.

    Args:
        width: Dimension of the input tokens.
        output_dim: Dimension of the output tokens.
        layers: Number of linear layers.
        hidden: Width of the hidden layers. The default is 2 * width.
    """

    options: ClassVar[tuple[str, ...]] = ("layers", "hidden")  # keys of its entry in config.json

    def __init__(self, width: int, output_dim: int, layers: int = 5, hidden: int | None = None):
        hidden = hidden or 2 * width
        sizes = [width, *[hidden] * (layers - 1), output_dim]
        modules: list[nn.Module] = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            modules += [nn.Linear(size_in, size_out), nn.SiLU()]
        super().__init__(*modules[:-1])
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.has_small_output = 8 * output_dim <= sizes[-2]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, width) to (B, N, output_dim), float32."""
        *hidden, last = self
        for layer in hidden:
            tokens = layer(tokens)
        if not self.has_small_output:
            return last(tokens).float()
        with torch.autocast(tokens.device.type, enabled=False):
            return last(tokens.float())


class ConvHead(nn.Module):
    """A convolution over the token grid: (B, N, width) -> (B, N, output_dim) in float32.

    This is the head of iREPA (arXiv:2512.10794), whose formula has kernel size 3. As there, the
    weights have PyTorch's default initialization, and the grid is padded with zeros.

    Args:
        width: Dimension of the input tokens.
        output_dim: Dimension of the output tokens.
        kernel_size: Side of the kernel in tokens, an odd number.
    """

    options: ClassVar[tuple[str, ...]] = ("kernel_size",)

    def __init__(self, width: int, output_dim: int, kernel_size: int = 3):
        super().__init__()
        assert kernel_size % 2, kernel_size
        self.conv = nn.Conv2d(width, output_dim, kernel_size, padding=kernel_size // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, width) of a square grid to (B, N, output_dim), float32."""
        side = math.isqrt(tokens.shape[1])
        grid = tokens.mT.unflatten(2, (side, side))
        return self.conv(grid).flatten(2).mT.float()


HEADS: dict[str, type[Projector] | type[ConvHead]] = {"mlp": Projector, "conv": ConvHead}


def make_head(spec: dict | None) -> nn.Module:
    """Build a head from an entry in config.json.

    The kind of the head is "mlp" if the entry does not contain a kind. An entry of None means that
    the method compares the tokens of the block without a projection.
    """
    if spec is None:
        return nn.Identity()
    head_class = HEADS[spec.get("kind", "mlp")]
    options = {name: spec[name] for name in head_class.options}
    return head_class(spec["width"], spec["out"], **options)
