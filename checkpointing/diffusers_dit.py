"""Convert a SiT to a DiTTransformer2DModel of diffusers by converting its weights.

The two implementations differ in two ways. First, every block in diffusers embeds the timestep and
the class, so each block receives a copy of the embedding weights. Second, the sinusoidal features
in diffusers have the frequencies 10000^(-i/127) instead of 10000^(-i/128), and are computed from
the timestep of the schedulers, 1000 t. The first layer of the embedder absorbs the linear map from
these features to those of SiT (`frequency_map`).
Shapes: D width, B batch.
"""

import math
from typing import Any, TypeAlias

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.sit import SiT, TimestepEmbedder

DiffusersObject: TypeAlias = Any  # lazy imports in diffusers hide the types of its classes

TIMESTEPS = 1000  # the timestep in diffusers is TIMESTEPS * t
# Largest accepted difference, relative to the largest velocity. float32 rounding causes 1e-6 to
# 1e-5, and unconverted frequencies cause 1e-3.
TOLERANCE = 1e-4


def make_scheduler() -> DiffusersObject:
    """Return a scheduler for Euler steps from noise at timestep TIMESTEPS to data at 0.

    With `sigmas=(1, 1 - 1/n, ..., 1/n)`, the steps equal those of the Euler solver in samplers.py.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=1.0)


def frequency_map(num_features: int = 256) -> Tensor:
    """Return the linear map M from diffusers features to SiT features.

    For t in [0, 1], f_SiT(t) = M f_diffusers(TIMESTEPS t) with an error of at most 3e-9.

    The map cannot be exact, because sines of different frequencies are linearly independent. On
    [0, 1], however, the SiT features have frequencies of at most 1. They are so smooth that linear
    combinations of a dozen functions equal them to float64 precision. A least-squares fit at
    Chebyshev points, without singular values below 1e-9, has an error below float32 rounding and no
    coefficient above 0.1.

    Args:
        num_features: Number of features, a cosine and a sine per frequency.

    Returns:
        M, (num_features, num_features) float64.
    """
    half = num_features // 2
    nodes = torch.arange(400, dtype=torch.float64)
    t = (1 - torch.cos(math.pi * (nodes + 0.5) / len(nodes))) / 2
    # Compute the frequencies in float32, so that they are rounded as in diffusers.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - 1)
    diffusers_omega = torch.exp(exponents) * TIMESTEPS

    def features(omega: Tensor) -> Tensor:
        angle = t[:, None] * omega.double()
        return torch.cat((angle.cos(), angle.sin()), 1)

    sit_features = features(TimestepEmbedder(1, num_features).omega)
    return (torch.linalg.pinv(features(diffusers_omega), rtol=1e-9) @ sit_features).T


def to_diffusers(model: SiT) -> DiffusersObject:
    """Convert a SiT to a DiTTransformer2DModel in eval mode.

    Its output for (x, TIMESTEPS * t, y) equals model(x, t, y) up to `relative_difference`.
    """
    config = model.config
    dit: DiffusersObject = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        num_layers=config.depth,
        sample_size=config.latent_size,
        patch_size=config.patch,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    dit.load_state_dict(_convert_weights(model.state_dict(), config.depth))
    return dit.eval().requires_grad_(False)


def _convert_weights(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename the weights, split the qkv projections, and copy the embedders to every block."""
    time = state["t_embedder.mlp.0.weight"]
    mapped_time = time.double() @ frequency_map(time.shape[1])
    embedders = {
        "timestep_embedder.linear_1.weight": mapped_time.to(time.dtype),
        "timestep_embedder.linear_1.bias": state["t_embedder.mlp.0.bias"],
        "timestep_embedder.linear_2.weight": state["t_embedder.mlp.2.weight"],
        "timestep_embedder.linear_2.bias": state["t_embedder.mlp.2.bias"],
        "class_embedder.embedding_table.weight": state["y_embedder.embedding_table.weight"],
    }
    converted = {}
    for kind in ("weight", "bias"):
        converted[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        converted[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        converted[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
    for k in range(depth):
        source = f"blocks.{k}"
        target = f"transformer_blocks.{k}"
        for name, value in embedders.items():
            converted[f"{target}.norm1.emb.{name}"] = value
        for kind in ("weight", "bias"):
            converted[f"{target}.norm1.linear.{kind}"] = state[
                f"{source}.adaLN_modulation.1.{kind}"
            ]
            for letter, part in zip("qkv", state[f"{source}.attn.qkv.{kind}"].chunk(3)):
                converted[f"{target}.attn1.to_{letter}.{kind}"] = part
            converted[f"{target}.attn1.to_out.0.{kind}"] = state[f"{source}.attn.proj.{kind}"]
            converted[f"{target}.ff.net.0.proj.{kind}"] = state[f"{source}.mlp.fc1.{kind}"]
            converted[f"{target}.ff.net.2.{kind}"] = state[f"{source}.mlp.fc2.{kind}"]
    return converted


@torch.no_grad()
def relative_difference(model: SiT, dit: DiffusersObject) -> float:
    """Return the largest difference between the velocities, relative to the largest velocity.

    The noisy latents and classes are random, and one class is the null class. The timesteps include
    0 and 1.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (4, config.channels, config.latent_size, config.latent_size)
    x = torch.randn(shape, generator=generator)
    t = torch.linspace(0, 1, 4)
    y = torch.randint(config.num_classes, (4,), generator=generator)
    y[-2] = config.num_classes
    expected = model(x, t, y)
    actual = dit(x, t * TIMESTEPS, y).sample
    return ((expected - actual).abs().max() / expected.abs().max()).item()
