"""Alignment heads, which project the tokens of a block and are removed after training.

docs/method.md explains the widths of the heads. Shapes: B batch, N tokens, D width.
"""

import math
from collections.abc import Collection
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.sit import SiT, init_linear


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

    options: ClassVar[tuple[str, ...]] = ("layers", "hidden")  # in the entry in config.json

    def __init__(self, width: int, output_dim: int, layers: int = 5, hidden: int | None = None):
        hidden = hidden or 2 * width
        sizes = [width, *[hidden] * (layers - 1), output_dim]
        modules: list[nn.Module] = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            modules += [nn.Linear(size_in, size_out), nn.SiLU()]
        super().__init__(*modules[:-1])
        self.apply(init_linear)
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

    This is the head of iREPA (arXiv:2512.10794), whose formula has kernel size 3. Like there, the
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


class AlignedOutput(NamedTuple):
    """The output of an `AlignedSiT`."""

    prediction: Tensor  # (B, C, H, W)
    projected: dict[str, Tensor]  # name of the head -> output tokens, (B, N, output_dim)
    # Name of the head -> mean norm of the input tokens, (B,), without gradient.
    token_norm: dict[str, Tensor]
    # Requested block -> tokens, (B, N, D), without gradient.
    student_tokens: dict[int, Tensor]


class AlignedSiT(nn.Module):
    """A module that contains the backbone and the alignment heads, so that DDP can wrap both.

    Args:
        backbone: The network that is sampled after training.
        heads: Name of each head -> the head.
        blocks: Name of each head -> the block whose tokens the head receives, counted from 1.
    """

    def __init__(
        self,
        backbone: SiT,
        heads: dict[str, nn.Module],
        blocks: dict[str, int],
    ):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.blocks = blocks

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        y: Tensor,
        active_heads: Collection[str] | None = None,
        student_blocks: Collection[int] = (),
    ) -> AlignedOutput:
        """Run the backbone and the heads.

        Args:
            x_t: Noisy latents (B, C, H, W).
            t: Timesteps (B,).
            y: Labels (B,).
            active_heads: Names of the heads to run; by default, all heads. The others receive a
                zero gradient.
            student_blocks: Blocks whose tokens are returned as `student_tokens`.
        """
        names = list(self.heads) if active_heads is None else list(active_heads)
        requested_blocks = [*(self.blocks[name] for name in names), *student_blocks]
        prediction = self.backbone(x_t, t, y, return_blocks=requested_blocks)
        tokens: dict[int, Tensor] = {}
        if requested_blocks:
            prediction, tokens = prediction

        projected = {}
        token_norm = {}
        for name in names:
            head_input = tokens[self.blocks[name]]
            projected[name] = self.heads[name](head_input)
            norm = torch.linalg.vector_norm(head_input.detach(), dim=-1, dtype=torch.float32)
            token_norm[name] = norm.mean(1)

        # Give inactive heads a zero gradient, because DDP expects a gradient for every parameter.
        inactive_sums = [
            parameter.sum()
            for name, head in self.heads.items()
            for parameter in head.parameters()
            if name not in names and parameter.requires_grad
        ]
        if inactive_sums:
            prediction = prediction + 0 * sum(inactive_sums)
        student_tokens = {block: tokens[block].detach() for block in student_blocks}
        return AlignedOutput(prediction, projected, token_norm, student_tokens)
