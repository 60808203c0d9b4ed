"""Add SRA 2 to a plain PyTorch training loop, with a network that is not part of this repository.

    python -m examples.plain_pytorch --out model.pt

The lines between "SRA 2" and "end of SRA 2" are all that the loop needs in addition
(docs/use-elsewhere.md). The network is small and the data are random, so the script takes seconds
on a CPU. Shapes: B batch, C channels, H and W latent height and width, N tokens, D width.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interpolant import INTERPOLANTS, interpolate
from loss import alignment_loss, denoising_loss
from models.projector import Projector, latent_tokens

CHANNELS, SIZE, PATCH = 4, 8, 2
WIDTH, DEPTH, NUM_HEADS = 32, 4, 2
ALIGNED_BLOCK = 2  # counted from 1
ALIGNMENT_WEIGHT = 1.0
BATCH_SIZE = 32
EMA_DECAY = 0.99


class Transformer(nn.Module):
    """A transformer that predicts the velocity; replace it with your own."""

    def __init__(self) -> None:
        super().__init__()
        side = SIZE // PATCH
        self.embed = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(side * side, WIDTH))
        self.embed_time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, NUM_HEADS, 4 * WIDTH, dropout=0, batch_first=True, norm_first=True
            )
            for _ in range(DEPTH)
        )
        self.output = nn.ConvTranspose2d(WIDTH, CHANNELS, PATCH, stride=PATCH)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the velocity of noisy latents: (B, C, H, W) and (B,) -> (B, C, H, W)."""
        grid = self.embed(x_t)
        tokens = grid.flatten(2).transpose(1, 2) + self.position
        tokens = tokens + self.embed_time(t[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.output(tokens.transpose(1, 2).reshape(grid.shape))


class Losses(NamedTuple):
    """The losses of a training step."""

    denoising: float
    alignment: float


def train(steps: int, out: Path | None = None) -> list[Losses]:
    """Train, write the weights of the EMA to `out`, and return the losses of all steps."""
    torch.manual_seed(0)
    path = INTERPOLANTS["linear"]
    latents = torch.randn(256, CHANNELS, SIZE, SIZE)  # normalized latents of the images
    model = Transformer()
    ema = copy.deepcopy(model).requires_grad_(False)

    # SRA 2: a head, and a hook that stores the tokens after one block.
    head = Projector(WIDTH, PATCH * PATCH * CHANNELS)
    stored: dict[str, Tensor] = {}

    def store_tokens(block: nn.Module, inputs: tuple, output: Tensor) -> None:
        stored["tokens"] = output

    model.blocks[ALIGNED_BLOCK - 1].register_forward_hook(store_tokens)
    # end of SRA 2
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)

    losses = []
    for step in range(steps):
        x = latents[torch.randint(len(latents), (BATCH_SIZE,))]
        t = torch.rand(BATCH_SIZE)
        x_t, velocity = interpolate(path, x, torch.randn_like(x), t)
        denoising = denoising_loss(model(x_t, t), velocity).mean()

        # SRA 2: compare the projected tokens with the patches of the clean latents.
        projected = head(stored["tokens"])
        target = latent_tokens(x, PATCH)
        alignment = alignment_loss(projected, target, t).mean()
        loss = denoising + ALIGNMENT_WEIGHT * alignment
        # end of SRA 2

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for average, parameter in zip(ema.parameters(), model.parameters()):
            average.lerp_(parameter.detach(), 1 - EMA_DECAY)
        if step % 20 == 0:
            print(f"step {step}: denoising {denoising:.3f}, alignment {alignment:.3f}")
        losses.append(Losses(denoising.item(), alignment.item()))

    if out is not None:
        torch.save(ema.state_dict(), out)  # the head is not part of the network
    return losses


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="number of training steps")
    parser.add_argument("--out", type=Path, help="file for the weights of the EMA")
    args = parser.parse_args()
    train(args.steps, args.out)


if __name__ == "__main__":
    main()
