"""A SiT as diffusers' DiTTransformer2DModel, by weights alone.

Two things are not the same there. Every block embeds time and class again, so those weights stand in each. And the features
of time have other frequencies, 10000^(-i/127) for our 10000^(-i/128), and are of 1000 t, the timestep of diffusers'
schedulers: the first layer of the embedder takes in the linear map from their features to ours (`frequency_map`).
D width, B batch.
"""

import math

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.sit import SiT, TimestepEmbedder

TIMESTEPS = 1000  # diffusers' timestep is TIMESTEPS t
TOLERANCE = 1e-4  # of the largest velocity. Rounding in float32 makes 1e-6 to 1e-5 of it, frequencies left as they are 1e-3


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps from noise at timestep TIMESTEPS to data at 0: samplers.ode, if told sigmas=(1, 1 - 1/n, ... 1/n)."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=1.0)


def frequency_map(frequencies: int = 256) -> Tensor:
    """M (frequencies, frequencies), float64: ours(t) = M theirs(TIMESTEPS t) for all t in [0, 1], to 3e-9.

    Not exactly: sines of different frequencies are independent. But on [0, 1] ours, of frequencies up to 1, are so smooth
    that a dozen functions span them to float64's precision. Least squares on Chebyshev points, without singular values below
    1e-9, has an error below float32's rounding and no coefficient above 0.1.
    """
    half = frequencies // 2
    nodes = torch.arange(400, dtype=torch.float64)
    t = (1 - torch.cos(math.pi * (nodes + 0.5) / len(nodes))) / 2
    omega = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - 1)
    )  # rounded as theirs are

    def features(omega: Tensor) -> Tensor:
        angle = t[:, None] * omega.double()
        return torch.cat((angle.cos(), angle.sin()), 1)

    return (
        torch.linalg.pinv(features(omega * TIMESTEPS), rtol=1e-9)
        @ features(TimestepEmbedder(1, frequencies).omega)
    ).T


def to_diffusers(model: SiT) -> DiTTransformer2DModel:
    """The same function of (x, TIMESTEPS t, y), in eval mode; how nearly, `difference` says."""
    config, state = model.config, model.state_dict()
    dit = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        num_layers=config.depth,
        sample_size=config.latent_size,
        patch_size=config.patch,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    time = state["t_embedder.mlp.0.weight"]
    embedders = {
        "timestep_embedder.linear_1.weight": (time.double() @ frequency_map(time.shape[1])).to(
            time.dtype
        ),
        "timestep_embedder.linear_1.bias": state["t_embedder.mlp.0.bias"],
        "timestep_embedder.linear_2.weight": state["t_embedder.mlp.2.weight"],
        "timestep_embedder.linear_2.bias": state["t_embedder.mlp.2.bias"],
        "class_embedder.embedding_table.weight": state["y_embedder.embedding_table.weight"],
    }
    theirs = {}
    for kind in ("weight", "bias"):
        theirs[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        theirs[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        theirs[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for k in range(config.depth):
            ours, block = f"blocks.{k}", f"transformer_blocks.{k}"
            theirs[f"{block}.norm1.linear.{kind}"] = state[f"{ours}.adaLN_modulation.1.{kind}"]
            for letter, part in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3)):
                theirs[f"{block}.attn1.to_{letter}.{kind}"] = part
            theirs[f"{block}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            theirs[f"{block}.ff.net.0.proj.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            theirs[f"{block}.ff.net.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
    theirs |= {
        f"transformer_blocks.{k}.norm1.emb.{name}": value
        for k in range(config.depth)
        for name, value in embedders.items()
    }
    dit.load_state_dict(theirs)
    return dit.eval().requires_grad_(False)


@torch.no_grad()
def difference(model: SiT, dit: DiTTransformer2DModel, batch: int = 4) -> float:
    """The largest difference of the two velocities on random inputs, as a share of the largest velocity. Times from 0 to 1,
    both included; the null class included.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        batch, config.channels, config.latent_size, config.latent_size, generator=generator
    )
    t = torch.linspace(0, 1, batch)
    y = torch.randint(config.num_classes, (batch,), generator=generator)
    y[-2] = config.num_classes
    ours = model(x, t, y)
    return ((ours - dit(x, t * TIMESTEPS, y).sample).abs().max() / ours.abs().max()).item()
