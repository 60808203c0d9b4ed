"""What can be sampled from, and what it says of itself.

    exps/NAME, exps/NAME/checkpoints/0050000   a run of ours (its newest checkpoint), or one checkpoint
    .../ema.safetensors, ema-0.999.safetensors  one of its averages; config.json is beside it
    DIR                                         what checkpointing.export wrote
    FILE.pt                                     of the SiT, REPA and SRA repositories

No file is unpickled beyond tensors and the argparse.Namespace that the official ones keep their settings in.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpointing.official import (
    ORIGINS,
    official_state_dict,
    read_origin,
    read_shapes,
    strip_prefix,
)
from checkpointing.storage import (
    CheckpointError,
    ema_filename,
    find_checkpoint,
    load_weights,
    read_config,
)
from common.cli import UserError
from common.files import sha256
from models.sit import SiT, SiTConfig

OFFICIAL_VAE = "stabilityai/sd-vae-ft-ema"  # what the three repositories' generate.py decodes with; its encoder is ft-mse's
OFFICIAL_PATHS = {
    "linear": "linear",
    "cosine": "cosine",
    "Linear": "linear",
    "GVP": "cosine",
    "VP": "vp",
}


class PretrainedModel(NamedTuple):
    """A network and what sampling needs to know of it."""

    model: SiT  # in our time, in eval mode, without gradients, on the CPU
    path_type: str
    prediction: str  # v, x or eps
    vae: str  # hub id or folder of the autoencoder that its latents are of
    vae_fingerprint: str | None  # None: not recorded
    class_names: list[str]
    name: str  # for files made from it: run and step, or the folder or file itself
    identity: dict  # for records: checkpoint, ema_sha256, model, step, images_seen, ema_decay, origin; None: not recorded


def resolve_checkpoint(path: Path) -> Path:
    """A run's newest checkpoint; anything else is found already. Raises CheckpointError."""
    return path if path.is_file() else find_checkpoint(path)


def load(
    path: Path,
    ema_decay: float | None = None,
    model: str | None = None,
    origin: str | None = None,
    path_type: str | None = None,
) -> PretrainedModel:
    """`ema_decay` chooses among the averages of ours; the rest (--model, --origin, --path-type) is for official files, which
    do not say it. Raises CheckpointError, and UserError naming the flag.
    """
    path = resolve_checkpoint(path)
    if path.is_file() and path.suffix != ".safetensors":
        return _load_official(path, ema_decay, model, origin, path_type)
    folder, config = read_own_config(path)
    said = config["model_name"], "of this repository", f"on the {config['path_type']} path"
    for flag, value, own in zip(
        ("--model", "--origin", "--path-type"), (model, origin, path_type), said
    ):
        if value is not None:
            raise UserError(
                f"{flag} is for official .pt files; {path} says itself that it is {own}"
            )
    decay = choose_ema_decay(path, config, ema_decay)
    weights = folder / ema_filename(config, decay)
    network = SiT(SiTConfig(**config["model"])).eval().requires_grad_(False)
    load_weights(network, weights)
    digest = sha256(weights)
    if config.get("exported", {}).get("ema_sha256", digest) != digest:
        raise CheckpointError(f"{weights} is not what was exported: export or fetch it again")
    data, average = config["data"], "" if decay == config["ema_decay"][0] else f"-ema{decay}"
    name, classes = _name(folder) + average, data["class_names"]
    identity = {
        "checkpoint": str(folder),
        "ema_sha256": digest,
        "model": config["model_name"],
        "step": config["step"],
        "images_seen": config["step"] * config["batch_size"],
        "ema_decay": decay,
        "origin": "ours",
    }
    prediction = config.get("prediction", "v")  # checkpoints from before there was a choice
    return PretrainedModel(
        network,
        config["path_type"],
        prediction,
        data["vae"],
        data["vae_fingerprint"],
        classes,
        name,
        identity,
    )


def read_own_config(path: Path) -> tuple[Path, dict]:
    """The folder and config.json of a checkpoint, an export, or an average in one. Raises CheckpointError."""
    folder = path.parent if path.is_file() else path
    config = read_config(folder)
    if (
        not isinstance(config, dict)
        or not {"model_name", "model", "ema_decay", "step", "data"} <= config.keys()
    ):
        raise CheckpointError(f"{folder / 'config.json'} is not of a checkpoint of this repository")
    return folder, config


def choose_ema_decay(path: Path, config: dict, ema_decay: float | None) -> float:
    """The decay of the average that a path and --ema-decay name together. Raises CheckpointError, UserError."""
    if not path.is_file():
        ema_filename(config, ema_decay)
        return config["ema_decay"][0] if ema_decay is None else ema_decay
    averages = {ema_filename(config, decay): decay for decay in config["ema_decay"]}
    if path.name not in averages:
        raise CheckpointError(f"{path} is not an average: beside it there is {' '.join(averages)}")
    if ema_decay not in (None, averages[path.name]):
        raise UserError(f"--ema-decay {ema_decay}: {path} is the average of {averages[path.name]}")
    return averages[path.name]


def _name(folder: Path) -> str:
    folder = folder.absolute()
    return (
        f"{folder.parent.parent.name}-{folder.name}"
        if folder.parent.name == "checkpoints"
        else folder.name
    )


def _load_official(
    path: Path,
    ema_decay: float | None,
    model: str | None,
    origin: str | None,
    path_type: str | None,
) -> PretrainedModel:
    if ema_decay is not None:
        raise UserError(f"--ema-decay is for runs of this repository; {path} holds one average")
    state, settings, step = _read_official(path)
    try:
        name, config = read_shapes(state)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None
    told = read_origin(state, config)
    from_where = "" if told or origin else f" --origin, one of {', '.join(ORIGINS)}"
    if model is None:
        also = f" and{from_where}" if from_where else ""
        raise UserError(
            f"{path} does not say what it is; its shapes are those of {name}: add --model {name}{also}"
        )
    if model != name:
        raise UserError(f"--model {model} does not fit {path}: its shapes are those of {name}")
    if from_where:
        raise UserError(
            f"{path} does not tell which repository it is from, and so which way its time runs (heads would say REPA or SRA, a "
            f"learned sigma SiT): add{from_where}"
        )
    if told and origin not in (None, told):
        raise UserError(f"--origin {origin}: {path} holds what only {told} has")
    path_type = _official_path(path, settings, path_type)
    network = SiT(config).eval().requires_grad_(False)
    try:
        network.load_state_dict(official_state_dict(state, config, origin or told))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from None
    identity = {
        "checkpoint": str(path),
        "ema_sha256": sha256(path),
        "model": name,
        "step": step,
        "images_seen": None,
        "ema_decay": None,
        "origin": origin or told,
    }
    classes = [str(k) for k in range(config.num_classes)]
    return PretrainedModel(
        network, path_type, "v", OFFICIAL_VAE, None, classes, path.stem, identity
    )


def _read_official(path: Path) -> tuple[dict[str, Tensor], dict, int | None]:
    """The averaged weights of a .pt without DDP's prefix, the settings kept with them, and the step. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # whatever bytes that are no checkpoint lead to
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = (
            f"holds code ({code[1]}) and is not loaded"
            if code
            else "cannot be read as a .pt file: fetch it again"
        )
        raise CheckpointError(f"{path} {why}") from None
    state = content.get("ema", content) if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise CheckpointError(f"{path} holds no state dict, neither under 'ema' nor by itself")
    settings, step = content.get("args"), content.get("steps")
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    return (
        strip_prefix(state),
        settings if isinstance(settings, dict) else {},
        None if step is None else int(step),
    )


def _official_path(path: Path, settings: dict, path_type: str | None) -> str:
    """The path that a file's settings name, else the flag's, else the linear one, which every published file is of."""
    if settings.get("prediction", "v") not in ("v", "velocity"):
        raise CheckpointError(f"{path} predicts {settings['prediction']}, not velocity")
    trained = str(settings.get("path_type", path_type or "linear"))
    if trained not in OFFICIAL_PATHS:
        raise CheckpointError(
            f"{path} was trained on the path {trained}, which this repository does not have"
        )
    trained = OFFICIAL_PATHS[trained]
    if path_type not in (None, trained):
        raise UserError(
            f"--path-type {path_type}: {path} says itself that it was trained on the {trained} path"
        )
    return trained
