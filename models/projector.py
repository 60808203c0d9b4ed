"""The head of SRA 2: an MLP on one block's tokens, dropped after training (arXiv:2601.17830; widths in docs/method.md).
B batch, N tokens, D width."""

import torch
from torch import Tensor, nn

from models.sit import SiT, init_linear


class Projector(nn.Sequential):
    """`layers` linear layers with SiLU between: width -> hidden -> ... -> hidden -> out. (B, N, width) -> (B, N, out).

    What comes out is float32 under any autocast: the last layer, 0.2% of the head, is computed in it, so that the alignment
    loss compares no rounded numbers."""

    def __init__(self, width: int, out: int, layers: int = 5, hidden: int | None = None):
        hidden = hidden or 2 * width
        sizes = [width, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for size_in, size_out in zip(sizes, sizes[1:]):
            modules += [nn.Linear(size_in, size_out), nn.SiLU()]
        super().__init__(*modules[:-1])
        self.apply(init_linear)

    def forward(self, tokens: Tensor) -> Tensor:
        *hidden, last = self
        for layer in hidden:
            tokens = layer(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return last(tokens.float())


class AlignedSiT(nn.Module):
    """Backbone and head as one module, so that DDP sees one forward.

    (x_t, t, y) -> velocity, the projected tokens (B, N, out) of block `block`, and the mean length (B,) of that block's own
    tokens, a gauge without gradient. The last two are None without a head."""

    def __init__(self, backbone: SiT, head: Projector | None, block: int):
        super().__init__()
        self.backbone, self.head, self.block = backbone, head, block

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.head is None:
            return self.backbone(x_t, t, y), None, None
        velocity, kept = self.backbone(x_t, t, y, return_blocks=(self.block,))
        tokens = kept[self.block]
        return velocity, self.head(tokens), torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float32).mean(1)
