"""Alignment heads, which map the tokens of one block to a target and are dropped after training.

docs/method.md explains their widths. Shapes: B batch, N tokens, D width.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.sit import SiT, init_linear


class Projector(nn.Sequential):
    """An MLP with SiLU between its layers: (B, N, width) -> (B, N, output_dim) in float32.

    If the last layer is small compared with the others (in SRA 2 it has 0.2% of the weights), it is
    computed in float32 even under autocast, so that the alignment loss does not compare rounded
    numbers.

    Args:
        width: Dimension of the input tokens.
        output_dim: Dimension of the output tokens.
        layers: Number of linear layers.
        hidden: Width of the hidden layers, 2 * width by default.
    """

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


HEADS: dict[str, type[nn.Module]] = {"mlp": Projector}


def make_head(spec: dict | None) -> nn.Module:
    """Build a head from its entry in config.json.

    The kind of the head is "mlp" if the entry does not contain it. An entry of None means that the
    method compares the tokens of the block without a projection.
    """
    if spec is None:
        return nn.Identity()
    head_class = HEADS[spec.get("kind", "mlp")]
    return head_class(spec["width"], spec["out"], spec["layers"], spec["hidden"])


class AlignedOutput(NamedTuple):
    """The output of an `AlignedSiT`. `projected` and `token_norm` are keyed by head name."""

    prediction: Tensor  # (B, C, H, W)
    projected: dict[str, Tensor]  # (B, N, output_dim)
    token_norm: dict[str, Tensor]  # (B,), mean norm of the head's input tokens; no gradient
    student_tokens: dict[int, Tensor]  # (B, N, D) by requested block


class AlignedSiT(nn.Module):
    """The backbone and the alignment heads in one module, which DDP can wrap as a whole.

    Args:
        backbone: The network that is sampled after training.
        heads: Alignment heads by name.
        blocks: For each head, the block (counted from 1) whose tokens it receives.
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
        idle_heads: Collection[str] = (),
        student_blocks: Collection[int] = (),
    ) -> AlignedOutput:
        """Run the backbone and the heads.

        Args:
            x_t: Noisy latents (B, C, H, W).
            t: Timesteps (B,).
            y: Labels (B,).
            idle_heads: Names of heads that do not run and receive a zero gradient.
            student_blocks: Further blocks whose tokens are returned.
        """
        names = [name for name in self.heads if name not in idle_heads]
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

        # DDP expects a gradient for every parameter, so give idle heads a zero gradient.
        for name in idle_heads:
            prediction = prediction + 0 * sum(p.sum() for p in self.heads[name].parameters())
        return AlignedOutput(
            prediction, projected, token_norm, {block: tokens[block] for block in student_blocks}
        )
