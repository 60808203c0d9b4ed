"""Load a network for sampling, together with the settings that sampling requires.

    exps/NAME                                   newest checkpoint of a run of this repository
    exps/NAME/checkpoints/0050000               one checkpoint
    .../ema.safetensors, ema-0.999.safetensors  one EMA, next to config.json
    DIR                                         an export by checkpointing.export
    FILE.pt, FILE.safetensors                   a file of the SiT, REPA or SRA repository

checkpointing/official.py reads and converts the files of other repositories.
"""

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from checkpointing.official import (
    choose_origin,
    choose_path_type,
    convert_state_dict,
    has_null_class,
    infer_config,
    infer_origin,
    read_official_file,
)
from checkpointing.storage import (
    CheckpointError,
    convert_errors,
    ema_filename,
    find_checkpoint,
    hash_settings,
    load_weights,
    read_config,
)
from common.cli import UserError, print_warning
from common.files import read_json_if_valid, sha256
from models.labels import TrainedLabels
from models.sit import SiT, SiTConfig

# The VAE that generate.py of SiT, REPA and SRA uses. It has the same encoder as sd-vae-ft-mse.
OFFICIAL_VAE = "stabilityai/sd-vae-ft-ema"


class PretrainedModel(NamedTuple):
    """A network and the settings that sampling requires."""

    model: SiT  # uses the time convention of this repository; frozen, in eval mode, on the CPU
    path_type: str
    prediction: str  # v, x or eps
    vae: str  # hub id or folder of the VAE that decodes the latents
    vae_fingerprint: str | None  # None if the file does not record it
    class_names: list[str]
    name: str  # prefix of output files: run and step, or the name of the folder or file
    # Stored with samples: checkpoint, ema_sha256, model, step, images_seen, ema_decay and origin.
    # Values that the file does not record are None.
    identity: dict[str, Any]
    trained_labels: TrainedLabels = TrainedLabels()


def resolve_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a run. Paths of checkpoints and files are unchanged.

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
    """Load a network from one of the paths in the module docstring.

    Args:
        path: The run, checkpoint, export or file.
        ema_decay: Decay of the EMA to load from a run of this repository. The default is the first
            decay of the run.
        model: Preset of the network. An official file does not record it, so it is required then.
        origin: Repository that an official file comes from, required if the file is ambiguous.
        path_type: Interpolant of an official file that does not record it.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        UserError: If an argument does not fit the file. The message names its flag.
    """
    path = resolve_checkpoint(path)
    is_native = path.is_dir() or (
        path.suffix == ".safetensors" and (model is None or _has_native_config(path.parent))
    )
    if not is_native:
        if ema_decay is not None:
            raise UserError(
                f"--ema-decay is for runs of this repository, but {path} has one EMA; "
                "remove the flag"
            )
        return _load_official(path, model, origin, path_type)
    folder, config = read_native_config(path)
    for flag, value, recorded, recorded_fact in (
        ("--model", model, config["model_name"], f"it is {config['model_name']}"),
        ("--origin", origin, None, "it comes from this repository"),
        (
            "--path-type",
            path_type,
            config["path_type"],
            f"it was trained on the {config['path_type']} path",
        ),
    ):
        if value not in (None, recorded):
            raise UserError(
                f"{flag} {value} is for official .pt files, but {path} records that "
                f"{recorded_fact}; remove the flag"
            )

    # Load the EMA, and compare its sha256 with the recorded one, and its settings with config.json.
    decay = choose_ema_decay(path, config, ema_decay)
    weights = folder / ema_filename(config, decay)
    network = SiT(SiTConfig(**config["model"])).eval().requires_grad_(False)
    remedy = f"; config.json next to it describes {config['model_name']}: copy both from one run"
    load_weights(network, weights, remedy)
    digest = sha256(weights)
    if _read_recorded_sha256(weights, config) not in (None, digest):
        raise CheckpointError(
            f"{weights} has changed since it was saved: copy or download it again"
        )
    with safe_open(weights, "pt") as file:
        metadata = file.metadata() or {}  # empty for files of older versions
    if metadata.get("config") not in (None, hash_settings(config)):
        print_warning(
            f"{weights} was saved with another config.json than the one next to it: class names, "
            "latents or other settings may be wrong, unless you edited the file; copy both files "
            "from one run"
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
        trained_labels=TrainedLabels.from_config(config),
    )


def read_native_config(path: Path) -> tuple[Path, dict]:
    """Return the folder and the config.json of a checkpoint or an export.

    Args:
        path: The folder, or an EMA file in the folder.

    Raises:
        CheckpointError: If config.json cannot be read or was not written by this repository.
    """
    folder = path.parent if path.is_file() else path
    if path.is_file() and not _has_native_config(folder):
        raise CheckpointError(
            f"{path} needs the config.json of its run or export in the same folder: copy it there, "
            "or pass --model and --origin for a file of the SiT, REPA or SRA repositories"
        )
    config = read_config(folder)
    if not _is_native_config(config):
        raise CheckpointError(
            f"{folder / 'config.json'} does not belong to a checkpoint of this repository"
        )
    return folder, config


def _read_recorded_sha256(weights: Path, config: dict) -> str | None:
    """Return the sha256 that the checkpoint or export of an EMA records, or None."""
    if "exported" in config:
        return config["exported"].get("ema_sha256")
    progress = read_json_if_valid(weights.parent / "progress.json")
    return progress.get("sha256", {}).get(weights.name)


def _has_native_config(folder: Path) -> bool:
    """Return whether a folder contains a config.json that was written by this repository."""
    return _is_native_config(read_json_if_valid(folder / "config.json"))


def _is_native_config(config: Any) -> bool:
    required = {"model_name", "model", "ema_decay", "step", "data"}
    return isinstance(config, dict) and required <= config.keys()


def choose_ema_decay(path: Path, config: dict, ema_decay: float | None) -> float:
    """Return the decay of the EMA that a path or --ema-decay selects.

    Raises:
        CheckpointError: If the path is a file that is not an EMA.
        UserError: If the path is an EMA whose decay differs from --ema-decay.
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
    """Return RUN-STEP for a checkpoint of a run, and the name of other folders."""
    folder = folder.absolute()
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


def _load_official(
    path: Path, model: str | None, origin: str | None, path_type: str | None
) -> PretrainedModel:
    """Load a file of another repository. The arguments are the same as for `load`."""
    file = read_official_file(path)
    try:
        model_name, config = infer_config(file.state, file.settings)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None
    if file.settings.get("model") == model_name:  # REPA, SRA and SiT use the same names
        model = model or model_name
    origin = choose_origin(path, model_name, model, origin, infer_origin(file.state, config))
    path_type = choose_path_type(path, file.settings, path_type)
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
            "model": model_name,
            "step": file.step,
            "images_seen": None,
            "ema_decay": None,
            "origin": origin,
        },
        trained_labels=TrainedLabels(has_null_class=has_null_class(file.state, config)),
    )
