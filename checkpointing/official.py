"""Read official checkpoints and convert their state dicts to `models.sit.SiT`.

Official checkpoints are the .pt files of the repositories of SiT (arXiv:2401.08740), REPA
(arXiv:2410.06940) and SRA (arXiv:2505.02831). They are pickles. Only tensors and
argparse.Namespace, in which these repositories store their settings, are loaded from them. The
state dicts may also be stored as .safetensors.

The state dicts use the parameter names of models/sit.py, with the names of wrappers such as
DistributedDataParallel in between. According to the code of the repositories, the state dicts
differ as follows:

- Early files of REPA (its flag --legacy) number the blocks after the aligned one from 0 again, as
  `decoder_blocks`.
- REPA and SRA also store alignment heads (`projectors`, `ap_head`).
- The output layer of SiT is twice as wide, because it also predicts a sigma that is not trained.
- With --qk-norm, attention normalizes queries and keys (`q_norm`, `k_norm`).
- In SiT, t = 0 is noise and t = 1 is data; REPA, SRA and this repository use the reverse.

In all three repositories, the null class is the last row of the label embedding table, unless the
network was trained without label dropout. Then, there are as many rows as classes.
Shapes: D width, p patch size, C channels.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpointing.storage import CheckpointError, load_tensors
from common.cli import UserError
from common.lfs import describe_lfs_pointer
from models.sit import PRESETS, SiTConfig, TimestepEmbedder

HEAD_PREFIXES = {"repa": "projectors.", "sra": "ap_head."}
ORIGINS = ("sit", *HEAD_PREFIXES)
# Interpolant names of the official repositories -> keys of interpolant.INTERPOLANTS.
OFFICIAL_PATHS = {
    "linear": "linear",
    "cosine": "cosine",
    "Linear": "linear",
    "GVP": "cosine",
    "VP": "vp",
}

IMAGENET_CLASSES = 1000

# Keys that hold the state dict of a .pt file. The first one that exists is used.
STATE_KEYS = ("ema", "model", "state_dict")
# Components that DistributedDataParallel, torch.compile, FSDP and activation checkpointing insert
# into parameter names.
WRAPPER_NAMES = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
}
MAX_LISTED_KEYS = 5  # keys of a file in an error message

_OUTPUT_KEYS = ("final_layer.linear.weight", "final_layer.linear.bias")
_TIME_KEY = "t_embedder.mlp.0.weight"
_LABEL_KEY = "y_embedder.embedding_table.weight"
_PATCH_KEY = "x_embedder.proj.weight"
_QK_NORM_KEY = "blocks.0.attn.q_norm.weight"


class OfficialFile(NamedTuple):
    """The content of a .pt or .safetensors file."""

    state: dict[str, Tensor]  # EMA weights, with the parameter names of models/sit.py
    settings: dict[str, Any]  # flags of the training run; empty if the file does not record them
    step: int | None  # None if the file does not record it


def read_official_file(path: Path) -> OfficialFile:
    """Read a .pt or .safetensors file without executing code in it.

    Raises:
        CheckpointError: If the file contains code, is damaged, or does not contain a state dict.
    """
    content: Any = load_tensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    state, settings, step = content, None, None
    if isinstance(content, dict):
        state = next((content[key] for key in STATE_KEYS if key in content), content)
        settings = content.get("args")
        step = content.get("steps")
    values = state.values() if isinstance(state, dict) else []
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise CheckpointError(
            f"{path} does not contain a state dict at the top level or under "
            f"{' or '.join(STATE_KEYS)}; it contains {_list_keys(content)}"
        )
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    if not isinstance(settings, dict):
        settings = {}
    return OfficialFile(_unify_names(path, state), settings, step)


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # the exception type depends on how the file is damaged
        if problem := describe_lfs_pointer(path):
            raise CheckpointError(problem) from None
        problem = "cannot be read as a .pt file: download it again"
        # torch names the forbidden function or class only in the message.
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = f"contains code ({match[1]}) and is not loaded"
        raise CheckpointError(f"{path} {problem}") from None


def _list_keys(content: Any) -> str:
    """Return the first keys of a dict, or the type of another object, for an error message."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in content]
    listed = ", ".join(keys[:MAX_LISTED_KEYS]) or "no keys"
    num_more = len(keys) - MAX_LISTED_KEYS
    return f"{listed} and {num_more} more" if num_more > 0 else listed


def _unify_names(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the names of wrappers from parameter names, and number all blocks consecutively."""
    split_names = [[part for part in key.split(".") if part not in WRAPPER_NAMES] for key in state]
    depth = len({parts[1] for parts in split_names if parts[0] == "blocks"})
    renamed = {}
    for parts, value in zip(split_names, state.values()):
        if parts[0] == "decoder_blocks":
            parts = ["blocks", str(depth + int(parts[1])), *parts[2:]]
        renamed[".".join(parts)] = value
    if len(renamed) < len(state):
        raise CheckpointError(
            f"{path} contains several networks in one state dict ({_list_keys(state)}): save the "
            "state dict of one of them"
        )
    renamed.pop("n_averaged", None)  # counter of torch.optim.swa_utils.AveragedModel
    return renamed


def choose_origin(
    path: Path,
    inferred_model: str,
    model: str | None,
    origin: str | None,
    inferred_origin: str | None,
) -> str:
    """Check --model and --origin against the file, and return the origin.

    Args:
        path: The file.
        inferred_model: Preset that matches the tensor shapes in the file.
        model: Value of --model.
        origin: Value of --origin.
        inferred_origin: Origin inferred from the file; None if the file is ambiguous.

    Raises:
        UserError: If a flag is missing or contradicts the file.
    """
    chosen_origin = origin or inferred_origin
    origins = ", ".join(ORIGINS)
    if model is None:
        origin_remedy = "" if chosen_origin else f" and --origin, one of {origins}"
        raise UserError(
            f"{path} does not record its architecture, but its tensor shapes match "
            f"{inferred_model}: add --model {inferred_model}{origin_remedy}"
        )
    if model != inferred_model:
        raise UserError(
            f"--model {model} does not match {path}, whose tensor shapes match "
            f"{inferred_model}; pass --model {inferred_model}"
        )
    if chosen_origin is None:
        raise UserError(
            f"{path} does not identify its repository, which determines the direction of time "
            "(heads would imply REPA or SRA, and a learned sigma would imply SiT): "
            f"add --origin, one of {origins}"
        )
    if inferred_origin not in (None, chosen_origin):
        raise UserError(
            f"--origin {origin}: {path} contains weights that exist only in {inferred_origin} "
            "checkpoints; remove the flag"
        )
    return chosen_origin


def choose_path_type(path: Path, settings: dict[str, Any], path_type: str | None) -> str:
    """Return the recorded interpolant of a file, or --path-type if the file does not record it.

    The default is linear, because every published file was trained on the linear path.

    Raises:
        CheckpointError: If this repository does not support the prediction or interpolant.
        UserError: If --path-type contradicts the file.
    """
    if settings.get("prediction", "v") not in ("v", "velocity"):
        raise CheckpointError(f"{path} predicts {settings['prediction']}, not velocity")
    official_name = str(settings.get("path_type", path_type or "linear"))
    if official_name not in OFFICIAL_PATHS:
        raise CheckpointError(
            f"{path} was trained on the {official_name} path, which is not supported here"
        )
    chosen_path_type = OFFICIAL_PATHS[official_name]
    if path_type not in (None, chosen_path_type):
        raise UserError(
            f"--path-type {path_type}: {path} records that it was trained on the "
            f"{chosen_path_type} path; remove the flag"
        )
    return chosen_path_type


def infer_config(state: dict[str, Tensor], settings: dict[str, Any]) -> tuple[str, SiTConfig]:
    """Infer the preset and the config from the shapes in a state dict.

    The label embedding table has no row for the null class if it has as many rows as the file
    records classes, or as ImageNet has classes if the file does not record their number.

    Args:
        state: The state dict.
        settings: Flags of the training run.

    Raises:
        ValueError: If no preset matches the state dict. The message has no subject, because the
            caller prepends the file name.
    """
    for key in (_PATCH_KEY, "pos_embed", _LABEL_KEY, _OUTPUT_KEYS[0]):
        if key not in state:
            raise ValueError(
                f"does not contain a SiT: {key} is missing; it contains {_list_keys(state)}"
            )
    width, channels, patch, _ = state[_PATCH_KEY].shape
    num_rows = len(state[_LABEL_KEY])
    has_null_row = num_rows != settings.get("num_classes", IMAGENET_CLASSES)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for name, preset in PRESETS.items():
        if (preset["depth"], preset["width"], preset["patch"]) == (depth, width, patch):
            config = SiTConfig(
                **preset,
                latent_size=round(state["pos_embed"].shape[1] ** 0.5) * patch,
                channels=channels,
                num_classes=num_rows - 1 if has_null_row else num_rows,
                qk_norm=_QK_NORM_KEY in state,
            )
            return name, config
    raise ValueError(
        f"has {depth} blocks of width {width} and patch size {patch}, unlike any preset of --model"
    )


def has_learned_sigma(state: dict[str, Tensor], config: SiTConfig) -> bool:
    """Return whether the output layer also predicts a sigma, in addition to the velocity."""
    return len(state[_OUTPUT_KEYS[0]]) == 2 * config.patch**2 * config.channels


def has_null_class(state: dict[str, Tensor], config: SiTConfig) -> bool:
    """Return whether the label embedding table has a row for the null class."""
    return len(state[_LABEL_KEY]) > config.num_classes


def infer_origin(state: dict[str, Tensor], config: SiTConfig) -> str | None:
    """Return the repository that a state dict comes from.

    Return None if the state dict could come from several repositories.
    """
    for origin, prefix in HEAD_PREFIXES.items():
        if any(key.startswith(prefix) for key in state):
            return origin
    return "sit" if has_learned_sigma(state, config) else None


def convert_state_dict(
    state: dict[str, Tensor], config: SiTConfig, origin: str
) -> dict[str, Tensor]:
    """Convert a state dict to the state dict of `SiT(config)`.

    Alignment heads and the learned sigma are removed, and a missing row of the null class is filled
    with zeros. The weights of a network from the SiT repository are converted to the time
    convention of this repository.
    """
    head_prefixes = tuple(HEAD_PREFIXES.values())
    state = {key: value for key, value in state.items() if not key.startswith(head_prefixes)}
    if has_learned_sigma(state, config):
        # There are 2C output channels per pixel of a patch. The last C channels are the sigma.
        for key in _OUTPUT_KEYS:
            rows = state[key].unflatten(0, (config.patch**2, 2 * config.channels))
            state[key] = rows[:, : config.channels].flatten(0, 1)
    if not has_null_class(state, config):
        table = state[_LABEL_KEY]
        state[_LABEL_KEY] = torch.cat((table, torch.zeros_like(table[:1])))
    return reverse_time(state) if origin == "sit" else state


def reverse_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a network v(x, t) to those of -v(x, 1 - t).

    With w = omega, cos w(1 - t) = cos w cos wt + sin w sin wt and sin w(1 - t) = sin w cos wt -
    cos w sin wt. The first layer (D, 256) of the timestep embedder absorbs this linear map, and the
    output layer absorbs the sign.
    """
    weight = state[_TIME_KEY]
    cos, sin = weight.double().chunk(2, 1)
    omega = TimestepEmbedder(1, 2 * cos.shape[1]).omega.double()
    reflected_cos = cos * omega.cos() + sin * omega.sin()
    reflected_sin = cos * omega.sin() - sin * omega.cos()
    # The network is float32. Rounding to the half precision of a file would be an additional error.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    reflected = torch.cat((reflected_cos, reflected_sin), 1).to(dtype)
    negated_output = {key: -state[key] for key in _OUTPUT_KEYS}
    return {**state, **negated_output, _TIME_KEY: reflected}
