"""Networks of the SiT (arXiv:2401.08740), REPA (arXiv:2410.06940) and SRA (arXiv:2505.02831) repositories as ours.

What differs, read off their code: each keeps its parameters under the names of models/sit.py, REPA and SRA with a head more
(`projectors`, `ap_head`). SiT's output layer is twice as wide, velocity and then a sigma that nothing trains, and its time
runs from noise at 0 to data at 1; REPA's and SRA's time is ours. The null class is the label table's last row.
D width, p patch size, C channels.
"""

import torch
from torch import Tensor

from models.sit import PRESETS, SiTConfig, TimestepEmbedder

HEADS = {"repa": "projectors.", "sra": "ap_head."}
ORIGINS = ("sit", *HEADS)


def strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of DistributedDataParallel and torch.compile."""
    return {
        key.removeprefix("module.").removeprefix("_orig_mod."): value
        for key, value in state.items()
    }


def read_shapes(state: dict[str, Tensor]) -> tuple[str, SiTConfig]:
    """The preset that a state dict without prefix has the shapes of, and its config. Raises ValueError if there is none."""
    needed = (
        "x_embedder.proj.weight",
        "pos_embed",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    )
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"holds no SiT: there is no {missing[0]}")
    if any(".q_norm." in key for key in state):
        raise ValueError("was trained with --qk-norm, which this repository's SiT does not have")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for name, preset in PRESETS.items():
        if (preset["depth"], preset["width"], preset["patch"]) == (depth, width, patch):
            side = round(state["pos_embed"].shape[1] ** 0.5) * patch
            return name, SiTConfig(
                **preset,
                latent_size=side,
                channels=channels,
                num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            )
    raise ValueError(
        f"has {depth} blocks of width {width} and patches of {patch}, as no SiT that --model knows"
    )


def learns_sigma(state: dict[str, Tensor], config: SiTConfig) -> bool:
    """Whether the output layer is twice as wide as the velocity."""
    return len(state["final_layer.linear.weight"]) == 2 * config.patch**2 * config.channels


def read_origin(state: dict[str, Tensor], config: SiTConfig) -> str | None:
    """The repository that a state dict without prefix is from; None if nothing in it tells."""
    for origin, head in HEADS.items():
        if any(key.startswith(head) for key in state):
            return origin
    return "sit" if learns_sigma(state, config) else None


def official_state_dict(
    state: dict[str, Tensor], config: SiTConfig, origin: str
) -> dict[str, Tensor]:
    """A state dict of one of the repositories -> one that SiT(config) loads strictly, in our time.

    Drops DDP's prefix, the heads, and the half of the output layer that holds SiT's learned sigma: of the 2C channels of
    each pixel of a patch, the last C.
    """
    state = {
        key: value
        for key, value in strip_prefix(state).items()
        if not key.startswith(tuple(HEADS.values()))
    }
    if learns_sigma(state, config):
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[key] = (
                state[key]
                .unflatten(0, (config.patch**2, 2 * config.channels))[:, : config.channels]
                .flatten(0, 1)
            )
    return turn_time(state) if origin == "sit" else state


def turn_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of -v(x, 1 - t) from those of v(x, t), so that what comes out is a SiT like any other.

    cos w(1-t) and sin w(1-t) are cos wt and sin wt reflected by the angle w, which the time embedder's first layer (D, 256)
    takes in; the output layer takes the sign.
    """
    cos, sin = state["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    omega = TimestepEmbedder(1, 2 * cos.shape[1]).omega.double()
    turned = torch.cat(
        (cos * omega.cos() + sin * omega.sin(), cos * omega.sin() - sin * omega.cos()), 1
    )
    output = {key: -state[key] for key in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return {
        **state,
        **output,
        "t_embedder.mlp.0.weight": turned.to(state["t_embedder.mlp.0.weight"].dtype),
    }
