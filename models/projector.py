"""The heads of alignment: an MLP on one block's tokens, dropped after training (widths: docs/method.md).
B batch, N tokens, D width.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from models.sit import SiT, init_linear


class Projector(nn.Sequential):
    """`layers` linear layers with SiLU between: width -> hidden -> ... -> hidden -> out. (B, N, width) -> (B, N, out).

    What comes out is float32 under any autocast. A last layer that is small beside the others (SRA 2's is 0.2% of the head) is
    computed in it too, so that the alignment loss compares no rounded numbers.
    """

    def __init__(self, width: int, out: int, layers: int = 5, hidden: int | None = None):
        hidden = hidden or 2 * width
        sizes = [width, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            modules += [nn.Linear(size_in, size_out), nn.SiLU()]
        super().__init__(*modules[:-1])
        self.apply(init_linear)
        self.small = 8 * out <= sizes[-2]

    def forward(self, tokens: Tensor) -> Tensor:
        *hidden, last = self
        for layer in hidden:
            tokens = layer(tokens)
        if not self.small:
            return last(tokens).float()
        with torch.autocast(tokens.device.type, enabled=False):
            return last(tokens.float())


class AlignedSiT(nn.Module):
    """Backbone and a head for each method of alignment as one module, so that DDP sees one forward."""

    def __init__(
        self,
        backbone: SiT,
        heads: dict[str, Projector] | None = None,
        blocks: dict[str, int] | None = None,
    ):
        """By a method's name: its head, and the block whose tokens that gets."""
        super().__init__()
        self.backbone, self.heads, self.blocks = backbone, nn.ModuleDict(heads or {}), blocks or {}

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, idle: Collection[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """-> what the backbone predicts; by a method's name the projected tokens (B, N, out), and the mean length (B,) of its
        block's own tokens, a gauge without gradient. Heads that are `idle` do not run, and their gradient is zero.
        """
        names = [name for name in self.heads if name not in idle]
        kept: dict[int, Tensor] = {}
        pred = self.backbone(x_t, t, y, return_blocks=[self.blocks[name] for name in names])
        if names:
            pred, kept = pred
        lengths = {
            k: torch.linalg.vector_norm(h.detach(), dim=-1, dtype=torch.float32).mean(1)
            for k, h in kept.items()
        }
        projected = {name: self.heads[name](kept[self.blocks[name]]) for name in names}
        for name in idle:  # DDP waits for the gradient of every parameter that has one
            pred = pred + 0 * sum(parameter.sum() for parameter in self.heads[name].parameters())
        return pred, projected, {name: lengths[self.blocks[name]] for name in names}
