"""A SiT with alignment heads, which project the tokens of its blocks.

Shapes: B batch, C channels, H and W latent height and width, N tokens, D width.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.sit import SiT


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
            # The tokens of the backbone and of convolutions are transposed views. For those,
            # compiled losses with contiguous targets have wrong gradients (PyTorch 2.11, CPU).
            projected[name] = self.heads[name](head_input).contiguous()
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
