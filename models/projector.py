"""Alignment heads: they map the tokens of one block to a target and are dropped after training.

docs/method.md explains the widths. B batch, N tokens, D width.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.sit import SiT, init_linear


class Projector(nn.Sequential):
    """An MLP: linear layers with SiLU between them, (B, N, width) -> (B, N, out) in float32.

    A last layer that is small compared with the others (SRA 2's has 0.2% of the head's weights) is
    computed in float32 under any autocast, so that the alignment loss does not compare rounded
    numbers.

    Args:
        width: Dimension of the input tokens.
        out: Dimension of the output tokens.
        layers: Number of linear layers.
        hidden: Width between the layers, 2 * width by default.
    """

    def __init__(self, width: int, out: int, layers: int = 5, hidden: int | None = None):
        hidden = hidden or 2 * width
        sizes = [width, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            modules += [nn.Linear(size_in, size_out), nn.SiLU()]
        super().__init__(*modules[:-1])
        self.apply(init_linear)
        self.has_small_output = 8 * out <= sizes[-2]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, width) to (B, N, out), float32."""
        *hidden, last = self
        for layer in hidden:
            tokens = layer(tokens)
        if not self.has_small_output:
            return last(tokens).float()
        with torch.autocast(tokens.device.type, enabled=False):
            return last(tokens.float())


HEADS: dict[str, type[nn.Module]] = {"mlp": Projector}


def make_head(spec: dict | None) -> nn.Module:
    """Build a head from its entry in config.json: its kind ("mlp" if absent) and its arguments.

    None means that there is no head: the block's tokens are compared without a projection.
    """
    if spec is None:
        return nn.Identity()
    arguments = dict(spec)
    return HEADS[arguments.pop("kind", "mlp")](**arguments)


class AlignedOutput(NamedTuple):
    """The output of an `AlignedSiT`. The dicts have the names of the heads as keys."""

    prediction: Tensor  # (B, C, H, W)
    projected: dict[str, Tensor]  # (B, N, out)
    token_norm: dict[str, Tensor]  # (B,), mean norm of the block's tokens, without gradient
    student_tokens: dict[int, Tensor]  # (B, N, D) after each requested block


class AlignedSiT(nn.Module):
    """The backbone and the alignment heads as one module, so that DDP sees one forward pass.

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
            idle_heads: Names of heads that do not run; their gradient is zero.
            student_blocks: Blocks whose tokens to return as well.
        """
        names = [name for name in self.heads if name not in idle_heads]
        wanted = [*(self.blocks[name] for name in names), *student_blocks]
        prediction = self.backbone(x_t, t, y, return_blocks=wanted)
        tokens: dict[int, Tensor] = {}
        if wanted:
            prediction, tokens = prediction

        projected = {}
        token_norm = {}
        for name in names:
            head_input = tokens[self.blocks[name]]
            projected[name] = self.heads[name](head_input)
            norm = torch.linalg.vector_norm(head_input.detach(), dim=-1, dtype=torch.float32)
            token_norm[name] = norm.mean(1)

        # DDP waits for a gradient of every parameter: give those of idle heads a zero gradient.
        for name in idle_heads:
            prediction = prediction + 0 * sum(p.sum() for p in self.heads[name].parameters())
        return AlignedOutput(
            prediction, projected, token_norm, {block: tokens[block] for block in student_blocks}
        )
