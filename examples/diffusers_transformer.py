"""Add SRA 2 to a training loop of diffusers, for a DiT or a Stable Diffusion 3 transformer.

    python -m examples.diffusers_transformer --transformer sd3 --out transformer
    accelerate launch --num_processes 8 -m examples.diffusers_transformer

The lines between "SRA 2" and "end of SRA 2" are all that the loop needs in addition
(docs/use-elsewhere.md). The network is small and the data are random, so the script takes seconds
on a CPU. Shapes: B batch, C channels, H and W latent height and width, N tokens, D width.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from loss import alignment_loss, denoising_loss
from models.projector import Projector, latent_tokens

TRANSFORMERS = ("dit", "sd3")
CHANNELS, SIZE, PATCH = 4, 8, 2
NUM_IMAGES, BATCH_SIZE = 256, 32
NUM_CLASSES = 10
TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 5, 24, 16
ALIGNED_BLOCK = 2  # counted from 1
ALIGNMENT_WEIGHT = 1.0


def make_transformer(kind: str) -> Any:
    """Build a small transformer of diffusers with random weights."""
    shape: dict[str, Any] = {
        "sample_size": SIZE,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
    }
    if kind == "dit":
        return DiTTransformer2DModel(**shape, num_embeds_ada_norm=NUM_CLASSES)
    return SD3Transformer2DModel(
        **shape,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,  # the width of the transformer
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=SIZE // PATCH,
    )


class RandomImages(Dataset):
    """Random images: normalized latents, and the label or the embeddings of the text."""

    def __init__(self, kind: str):
        latents = torch.randn(NUM_IMAGES, CHANNELS, SIZE, SIZE)
        if kind == "dit":
            labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,))
            self.tensors = {"latents": latents, "class_labels": labels}
        else:
            self.tensors = {
                "latents": latents,
                "encoder_hidden_states": torch.randn(NUM_IMAGES, TEXT_TOKENS, TEXT_WIDTH),
                "pooled_projections": torch.randn(NUM_IMAGES, POOLED_WIDTH),
            }

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def check_token_order(embed: Callable[[Tensor], Tensor], latents: Tensor, patch: int) -> None:
    """Check that token i of a transformer is patch i of `latent_tokens`.

    Args:
        embed: The patch embedding, (B, C, H, W) -> (B, N, D).
        latents: Any latents, (1, C, H, W).
        patch: Patch size.

    Raises:
        ValueError: If the order differs.
    """
    # Change each patch in turn, and find the token that changes.
    positions = torch.arange(latents[0, 0].numel()).reshape(1, 1, *latents.shape[2:])
    pixels_of_tokens = latent_tokens(positions, patch)[0]  # (N, p * p)
    changed = latents.repeat(len(pixels_of_tokens), 1, 1, 1)
    for i, pixels in enumerate(pixels_of_tokens):
        changed[i].flatten(1)[:, pixels] += 1
    difference = (embed(changed) - embed(latents)).abs().sum(-1)  # (N, N)
    order = difference.argmax(1).tolist()
    if order != list(range(len(order))):
        raise ValueError(f"the patches of latent_tokens are the tokens {order} of the transformer")


class Losses(NamedTuple):
    """The losses of a training step."""

    denoising: float
    alignment: float


def train(kind: str, steps: int, out: Path | None = None) -> list[Losses]:
    """Train, write the weights of the EMA to `out`, and return the losses of all steps."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    transformer = make_transformer(kind)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    loader = DataLoader(RandomImages(kind), BATCH_SIZE, shuffle=True, drop_last=True)

    # SRA 2: a head, and a hook that stores the tokens after one block.
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    head = Projector(width, PATCH * PATCH * CHANNELS)
    stored: dict[str, Tensor] = {}

    def store_tokens(block: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        # The blocks of Stable Diffusion 3 return the tokens of the text and those of the image.
        stored["tokens"] = output[1] if isinstance(output, tuple) else output

    transformer.transformer_blocks[ALIGNED_BLOCK - 1].register_forward_hook(store_tokens)
    check_token_order(transformer.pos_embed, torch.zeros(1, CHANNELS, SIZE, SIZE), PATCH)
    # end of SRA 2

    parameters = [*transformer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    ema = EMAModel(transformer.parameters(), decay=0.99)  # without the head
    transformer, head, optimizer, loader = accelerator.prepare(transformer, head, optimizer, loader)
    ema.to(accelerator.device)
    torch.manual_seed(accelerator.process_index)  # each process draws its own noise

    losses: list[Losses] = []
    while len(losses) < steps:
        for batch in loader:
            # Add noise as the scheduler does: sigma is 0 for images and 1 for noise.
            latents = batch.pop("latents")
            noise = torch.randn_like(latents)
            step_indices = torch.randint(len(scheduler.timesteps), (len(latents),))
            timesteps = scheduler.timesteps[step_indices].to(latents.device)
            sigmas = scheduler.sigmas[step_indices].to(latents.device)
            sigma = sigmas[:, None, None, None]
            noisy = (1 - sigma) * latents + sigma * noise
            prediction = transformer(noisy, timestep=timesteps, **batch).sample
            denoising = denoising_loss(prediction, noise - latents).mean()

            # SRA 2: compare the projected tokens with the patches of the clean latents.
            projected = head(stored["tokens"])
            target = latent_tokens(latents, PATCH)
            alignment = alignment_loss(projected, target, sigmas).mean()
            loss = denoising + ALIGNMENT_WEIGHT * alignment
            # end of SRA 2

            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            ema.step(transformer.parameters())
            if len(losses) % 20 == 0:
                values = f"denoising {denoising:.3f}, alignment {alignment:.3f}"
                accelerator.print(f"step {len(losses)}: {values}")
            losses.append(Losses(denoising.item(), alignment.item()))
            if len(losses) == steps:
                break

    if out is not None and accelerator.is_main_process:
        ema.copy_to(transformer.parameters())
        accelerator.unwrap_model(transformer).save_pretrained(out)  # without the head
    return losses


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformer", choices=TRANSFORMERS, default="dit")
    parser.add_argument("--steps", type=int, default=200, help="number of training steps")
    parser.add_argument("--out", type=Path, help="folder for the weights of the EMA")
    args = parser.parse_args()
    train(args.transformer, args.steps, args.out)


if __name__ == "__main__":
    main()
