"""Load a network for sampling, together with the settings that sampling requires.

    exps/NAME                                   newest checkpoint of a run of this repository
    exps/NAME/checkpoints/0050000               one checkpoint
    .../ema.safetensors, ema-0.999.safetensors  one EMA, next to config.json
    DIR                                         an export by checkpointing.export
    FILE.pt                                     a file of the SiT, REPA or SRA repository

Official files are pickles. Only tensors and argparse.Namespace, in which the official repositories
store their settings, are loaded from them.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpointing.official import (
    ORIGINS,
    convert_state_dict,
    infer_config,
    infer_origin,
    strip_prefixes,
)
from checkpointing.storage import (
    CheckpointError,
    convert_errors,
    ema_filename,
    find_checkpoint,
    load_weights,
    read_config,
)
from common.cli import UserError
from common.files import sha256
from models.sit import SiT, SiTConfig

# The VAE that generate.py uses in all three repositories. It has the same encoder as sd-vae-ft-mse.
OFFICIAL_VAE = "stabilityai/sd-vae-ft-ema"
# Interpolant names of the official repositories -> keys of interpolant.INTERPOLANTS.
OFFICIAL_PATHS = {
    "linear": "linear",
    "cosine": "cosine",
    "Linear": "linear",
    "GVP": "cosine",
    "VP": "vp",
}


class PretrainedModel(NamedTuple):
    """A network and the settings that sampling requires."""

    model: SiT  # uses the time convention of this repository; frozen, in eval mode, on the CPU
    path_type: str
    prediction: str  # v, x or eps
    vae: str  # hub id or folder of the VAE that decodes the latents
    vae_fingerprint: str | None  # None if the file does not record it
    class_names: list[str]
    name: str  # run and step, or folder or file name; prefix of output files
    # Stored in the records of samples: checkpoint, ema_sha256, model, step, images_seen, ema_decay
    # and origin. Values that the file does not record are None.
    identity: dict[str, Any]


def resolve_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a run; return other loadable paths unchanged.

    Raises:
        CheckpointError: If there is no checkpoint.
    """
    return path if path.is_file() else find_checkpoint(path)


def load(
    path: Path,
    ema_decay: float | None = None,
    model: str | None = None,
    origin: str | None = None,
    path_type: str | None = None,
) -> PretrainedModel:
    """Load a network from any of the paths listed in the module docstring.

    Args:
        path: The run, checkpoint, export or file.
        ema_decay: Decay of the EMA to load from a run of this repository. The default is the first
            decay of the run.
        model: Preset of an official file; required because the file does not record it.
        origin: Repository of an official file; required if the file is ambiguous.
        path_type: Interpolant of an official file, if the file does not record it.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        UserError: If an argument does not fit the file. The message names its flag.
    """
    path = resolve_checkpoint(path)
    if path.is_file() and path.suffix != ".safetensors":
        if ema_decay is not None:
            raise UserError(
                f"--ema-decay is for runs of this repository, but {path} has one EMA; "
                "remove the flag"
            )
        return _load_official(path, model, origin, path_type)
    folder, config = read_native_config(path)
    for flag, value, recorded_value in (
        ("--model", model, f"it is {config['model_name']}"),
        ("--origin", origin, "it comes from this repository"),
        ("--path-type", path_type, f"it was trained on the {config['path_type']} path"),
    ):
        if value is not None:
            raise UserError(
                f"{flag} is for official .pt files, but {path} records that {recorded_value}; "
                "remove the flag"
            )

    # Load the EMA, and compare it with the sha256 that an export records.
    decay = choose_ema_decay(path, config, ema_decay)
    weights = folder / ema_filename(config, decay)
    network = SiT(SiTConfig(**config["model"])).eval().requires_grad_(False)
    load_weights(network, weights)
    digest = sha256(weights)
    if config.get("exported", {}).get("ema_sha256", digest) != digest:
        raise CheckpointError(
            f"{weights} has changed since the export: export or download it again"
        )

    name = _checkpoint_name(folder)
    if decay != config["ema_decay"][0]:
        name += f"-ema{decay}"
    data = config["data"]
    return PretrainedModel(
        model=network,
        path_type=config["path_type"],
        prediction=config.get("prediction", "v"),  # older checkpoints do not record it
        vae=data["vae"],
        vae_fingerprint=data["vae_fingerprint"],
        class_names=data["class_names"],
        name=name,
        identity={
            "checkpoint": str(folder),
            "ema_sha256": digest,
            "model": config["model_name"],
            "step": config["step"],
            "images_seen": config["step"] * config["batch_size"],
            "ema_decay": decay,
            "origin": "ours",
        },
    )


def read_native_config(path: Path) -> tuple[Path, dict]:
    """Return the folder and the config.json of a checkpoint, an export, or an EMA in one of them.

    Raises:
        CheckpointError: If config.json cannot be read or was not written by this repository.
    """
    folder = path.parent if path.is_file() else path
    config = read_config(folder)
    required = {"model_name", "model", "ema_decay", "step", "data"}
    if not isinstance(config, dict) or not required <= config.keys():
        raise CheckpointError(
            f"{folder / 'config.json'} does not belong to a checkpoint of this repository"
        )
    return folder, config


def choose_ema_decay(path: Path, config: dict, ema_decay: float | None) -> float:
    """Return the decay of the EMA that a path and --ema-decay select.

    Raises:
        CheckpointError: If the path is a file that is not an EMA.
        UserError: If the path and --ema-decay contradict each other.
    """
    if not path.is_file():
        return config["ema_decay"][0] if ema_decay is None else ema_decay
    decays = {ema_filename(config, decay): decay for decay in config["ema_decay"]}
    if path.name not in decays:
        raise CheckpointError(f"{path} is not an EMA; choose one of {' '.join(decays)}")
    decay = decays[path.name]
    if ema_decay not in (None, decay):
        raise UserError(
            f"--ema-decay {ema_decay}: {path} is the EMA with decay {decay}; remove the flag"
        )
    return decay


def _checkpoint_name(folder: Path) -> str:
    folder = folder.absolute()
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


class _OfficialFile(NamedTuple):
    state: dict[str, Tensor]  # EMA weights, without key prefixes
    settings: dict[str, Any]  # flags of the training run; empty if the file has none
    step: int | None


def _load_official(
    path: Path, model: str | None, origin: str | None, path_type: str | None
) -> PretrainedModel:
    """Load a .pt file; the arguments are the same as for `load`."""
    file = _read_official(path)
    try:
        name, config = infer_config(file.state)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None
    origin = _choose_origin(path, name, model, origin, infer_origin(file.state, config))
    path_type = _choose_path_type(path, file.settings, path_type)
    network = SiT(config).eval().requires_grad_(False)
    with convert_errors(path):
        network.load_state_dict(convert_state_dict(file.state, config, origin))
    return PretrainedModel(
        model=network,
        path_type=path_type,
        prediction="v",
        vae=OFFICIAL_VAE,
        vae_fingerprint=None,
        class_names=[str(k) for k in range(config.num_classes)],
        name=path.stem,
        identity={
            "checkpoint": str(path),
            "ema_sha256": sha256(path),
            "model": name,
            "step": file.step,
            "images_seen": None,
            "ema_decay": None,
            "origin": origin,
        },
    )


def _choose_origin(
    path: Path, name: str, model: str | None, origin: str | None, inferred_origin: str | None
) -> str:
    """Validate --model and --origin against the file and return its origin.

    Args:
        path: The file.
        name: Preset that matches the shapes in the file.
        model: Value of --model.
        origin: Value of --origin.
        inferred_origin: Origin inferred from the file; None if it is ambiguous.

    Raises:
        UserError: If a flag is missing or contradicts the file.
    """
    result = origin or inferred_origin
    origins = ", ".join(ORIGINS)
    if model is None:
        origin_remedy = "" if result else f" and --origin, one of {origins}"
        raise UserError(
            f"{path} does not record its architecture, but its tensor shapes match {name}: "
            f"add --model {name}{origin_remedy}"
        )
    if model != name:
        raise UserError(
            f"--model {model} does not match {path}, whose tensor shapes match {name}; "
            f"pass --model {name}"
        )
    if result is None:
        raise UserError(
            f"{path} does not identify its repository, which determines the direction of time "
            "(heads would imply REPA or SRA, and a learned sigma would imply SiT): "
            f"add --origin, one of {origins}"
        )
    if inferred_origin not in (None, result):
        raise UserError(
            f"--origin {origin}: {path} contains weights that exist only in {inferred_origin} "
            "checkpoints; remove the flag"
        )
    return result


def _read_official(path: Path) -> _OfficialFile:
    """Read a .pt file.

    Raises:
        CheckpointError: If the file contains code, is damaged, or has no state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # the exception type depends on how the file is damaged
        problem = "cannot be read as a .pt file: download it again"
        # torch reports the name of a forbidden function or class only in the message.
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = f"contains code ({code[1]}) and is not loaded"
        raise CheckpointError(f"{path} {problem}") from None
    state: Any = content.get("ema", content) if isinstance(content, dict) else None
    values = state.values() if isinstance(state, dict) else []
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise CheckpointError(
            f"{path} does not contain a state dict, neither under 'ema' nor at the top level"
        )
    settings = content.get("args")
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    if not isinstance(settings, dict):
        settings = {}
    return _OfficialFile(strip_prefixes(state), settings, content.get("steps"))


def _choose_path_type(path: Path, settings: dict[str, Any], path_type: str | None) -> str:
    """Return the interpolant that the file records, otherwise the value of --path-type.

    The default is linear, because every published file was trained with it.

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
    recorded = OFFICIAL_PATHS[official_name]
    if path_type not in (None, recorded):
        raise UserError(
            f"--path-type {path_type}: {path} records that it was trained on the {recorded} path; "
            "remove the flag"
        )
    return recorded
