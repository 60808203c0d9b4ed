"""config.json and args.json of a run, and checks that a resumed run continues what it started."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from common.cli import UserError
from common.config import destination, record_flags
from latents.manifest import Manifest
from models.sit import PRESETS, SiTConfig
from training.alignment_config import method_destinations, record_alignments
from training.config import (
    ALL_CONFIGS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    PreviewConfig,
    Settings,
    format_value,
)

# Classes of settings that a resumed run may be started with other values of.
FREE_CONFIGS = (DataConfig, LogConfig, CheckpointConfig, PreviewConfig, EvaluationConfig)


def check_cache(data: DataConfig, model: ModelConfig, manifest: Manifest) -> None:
    """Raise UserError unless the cache is what the flags ask for and fits the network."""
    patch = PRESETS[model.model]["patch"]
    if data.resolution not in (None, manifest.resolution):
        raise UserError(
            f"--resolution {data.resolution}: {format_value(data.data_dir)} contains images of "
            f"{manifest.resolution} pixels"
        )
    if data.num_classes not in (None, manifest.num_classes):
        raise UserError(
            f"--num-classes {data.num_classes}: {format_value(data.data_dir)} has {manifest.num_classes}"
        )
    _, height, width = manifest.latent_shape
    if height != width or height % patch:
        raise UserError(
            f"--model {model.model} cannot cut the latents of {format_value(data.data_dir)} "
            f"{manifest.latent_shape} into patches of {patch}"
        )


def build_config_json(
    settings: Settings, network: SiTConfig, align: list[dict], manifest: Manifest
) -> dict:
    """Return the contents of config.json: the network, its latents, and how it is trained."""
    data_keys = (
        "source",
        "count",
        "resolution",
        "class_names",
        "vae",
        "vae_fingerprint",
        "scale",
        "shift",
        "latent_shape",
        "mean",
    )
    data = {key: getattr(manifest, key) for key in data_keys}
    return {
        "model_name": settings.model.model,
        "model": asdict(network),
        "align": align,
        **asdict(settings.objective),
        "batch_size": settings.loop.batch_size,
        "ema_decay": list(settings.optimizer.ema_decay),
        "data": data | {"joined": manifest.encoding.get("joined")},
    }


def build_args_json(settings: Settings) -> dict:
    """Return the contents of args.json: every flag and its value."""
    configs = (getattr(settings, name) for name in Settings._fields)
    flat = record_flags(*(config for config in configs if type(config) in ALL_CONFIGS))
    return flat | record_alignments(settings.alignments)


def check_same_run(flags: dict, folder: Path) -> None:
    """Raise UserError if a run in `folder` was started with other flags.

    Args:
        flags: Contents of args.json for this start.
        folder: The run folder.
    """
    path = folder / "args.json"
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError:
        raise UserError(
            f"{path} is damaged: remove it to resume the run with the flags of this command"
        ) from None
    changed = [key for key in flags if key in stored and stored[key] != flags[key]]
    changed = [key for key in changed if key not in _flags_that_may_change()]
    if changed:
        differences = "; ".join(
            f"--{key.replace('_', '-')} was {format_value(stored[key])}, now {format_value(flags[key])}"
            for key in changed
        )
        raise UserError(
            f"{folder} was started with other flags: {differences}. Choose another --exp-name, or "
            "pass the flags it was started with"
        )


def _flags_that_may_change() -> set[str]:
    """Return argparse's names of the flags that a resumed run may be started with."""
    names = method_destinations()  # config.json records what these lead to
    for config in ALL_CONFIGS:
        for field in fields(config):
            if config in FREE_CONFIGS or field.metadata.get("may_change"):
                names.add(destination(field))
    return names


def check_same_data(data: DataConfig, folder: Path, stored: dict, current: dict) -> None:
    """Raise UserError if two config.json differ in their data or their alignment.

    Args:
        data: Settings of the data, for the message.
        folder: The run folder, for the message.
        stored: config.json of the checkpoint to resume from.
        current: config.json that this start would write.
    """
    before, now = stored["data"], current["data"]
    changed = [key for key in before if key not in ("source", "vae") and before[key] != now[key]]
    if changed:
        raise UserError(
            f"--data-dir {format_value(data.data_dir)} is not the cache that {folder} was started with: "
            f"{', '.join(changed)} differ"
        )
    for before, now in zip(stored.get("align", []), current["align"]):
        changed = [key for key in now if key not in before or before[key] != now[key]]
        if changed:
            differences = "; ".join(
                f"{key} was {format_value(before.get(key))}, now {format_value(now[key])}"
                for key in changed
            )
            raise UserError(
                f"{folder} was started with another setting of --align {now['method']}: "
                f"{differences}"
            )
