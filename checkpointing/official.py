"""Convert official state dicts to `models.sit.SiT`.

The state dicts come from the repositories of SiT (arXiv:2401.08740), REPA (arXiv:2410.06940) and
SRA (arXiv:2505.02831), and use the parameter names of models/sit.py. According to the code of these
repositories, they differ as follows:

- REPA and SRA also store alignment heads (`projectors`, `ap_head`).
- The output layer of SiT is twice as wide, because it also outputs a sigma that is not trained.
- In SiT, t = 0 is noise and t = 1 is data; REPA, SRA and this repository use the reverse.

The null class is the last row of the label table in all of them.
Shapes: D width, p patch size, C channels.
"""

import torch
from torch import Tensor

from models.sit import PRESETS, SiTConfig, TimestepEmbedder

HEAD_PREFIXES = {"repa": "projectors.", "sra": "ap_head."}
ORIGINS = ("sit", *HEAD_PREFIXES)

_OUTPUT_KEYS = ("final_layer.linear.weight", "final_layer.linear.bias")
_TIME_KEY = "t_embedder.mlp.0.weight"
_LABEL_KEY = "y_embedder.embedding_table.weight"
_PATCH_KEY = "x_embedder.proj.weight"


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the key prefixes that DistributedDataParallel and torch.compile add."""
    return {
        key.removeprefix("module.").removeprefix("_orig_mod."): value
        for key, value in state.items()
    }


def infer_config(state: dict[str, Tensor]) -> tuple[str, SiTConfig]:
    """Infer the preset and the config from the shapes in a state dict without prefixes.

    Raises:
        ValueError: If no preset matches the state dict. The message is a predicate; the caller
            prepends the file name.
    """
    for key in (_PATCH_KEY, "pos_embed", _LABEL_KEY, _OUTPUT_KEYS[0]):
        if key not in state:
            raise ValueError(f"does not contain a SiT: {key} is missing")
    if any(".q_norm." in key for key in state):
        raise ValueError("was trained with --qk-norm, which this repository does not support")
    width, channels, patch, _ = state[_PATCH_KEY].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for name, preset in PRESETS.items():
        if (preset["depth"], preset["width"], preset["patch"]) == (depth, width, patch):
            config = SiTConfig(
                **preset,
                latent_size=round(state["pos_embed"].shape[1] ** 0.5) * patch,
                channels=channels,
                num_classes=len(state[_LABEL_KEY]) - 1,
            )
            return name, config
    raise ValueError(
        f"has {depth} blocks of width {width} and patch size {patch}, unlike any preset of --model"
    )


def has_learned_sigma(state: dict[str, Tensor], config: SiTConfig) -> bool:
    """Return whether the output layer is twice as wide as the velocity."""
    return len(state[_OUTPUT_KEYS[0]]) == 2 * config.patch**2 * config.channels


def infer_origin(state: dict[str, Tensor], config: SiTConfig) -> str | None:
    """Infer the repository that trained a state dict without prefixes; None if it is ambiguous."""
    for origin, prefix in HEAD_PREFIXES.items():
        if any(key.startswith(prefix) for key in state):
            return origin
    return "sit" if has_learned_sigma(state, config) else None


def convert_state_dict(
    state: dict[str, Tensor], config: SiTConfig, origin: str
) -> dict[str, Tensor]:
    """Convert a state dict without prefixes to one that `SiT(config)` loads strictly.

    Alignment heads and the learned sigma are dropped, and the time convention of SiT is reversed.
    """
    heads = tuple(HEAD_PREFIXES.values())
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    if has_learned_sigma(state, config):
        # Every position of a patch has 2C output channels, and the last C channels are the sigma.
        for key in _OUTPUT_KEYS:
            channels = state[key].unflatten(0, (config.patch**2, 2 * config.channels))
            state[key] = channels[:, : config.channels].flatten(0, 1)
    return reverse_time(state) if origin == "sit" else state


def reverse_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a network v(x, t) to those of -v(x, 1 - t).

    cos w(1 - t) and sin w(1 - t) are cos wt and sin wt reflected at the angle w. The reflection is
    absorbed into the first layer (D, 256) of the timestep embedder, and the sign into the output
    layer.
    """
    weight = state[_TIME_KEY]
    cos, sin = weight.double().chunk(2, 1)
    omega = TimestepEmbedder(1, 2 * cos.shape[1]).omega.double()
    reflected_cos = cos * omega.cos() + sin * omega.sin()
    reflected_sin = cos * omega.sin() - sin * omega.cos()
    reflected = torch.cat((reflected_cos, reflected_sin), 1).to(weight.dtype)
    negated_output = {key: -state[key] for key in _OUTPUT_KEYS}
    return {**state, **negated_output, _TIME_KEY: reflected}
