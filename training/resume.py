"""Find out where a run stopped, and check that it may be resumed with the current settings.

| file of the checkpoint | holds | compared on resume |
|---|---|---|
| progress.json | every flag | all but those that may change, such as the number of steps |
| config.json | network, data, alignment | the data and the alignment |

Until the first checkpoint, all flags may change. Checkpoints of older code do not hold the flags;
those in args.json are compared instead.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from checkpointing.storage import list_checkpoints, read_config, read_progress
from common.cli import UserError, format_value
from common.config import get_destination, record_flags
from common.files import read_json_if_valid
from common.logs import get_logger
from common.metrics_log import read_rows
from latents.manifest import Manifest
from models.sit import PRESETS, SiTConfig
from training.alignment_config import method_destinations, record_alignments
from training.config import (
    ALL_CONFIGS,
    DataConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    PeriodicEvaluationConfig,
    PreviewConfig,
    RunConfig,
    SaveConfig,
    Settings,
)
from training.log import is_due
from training.monitors import ema_suffixes
from training.preview import preview_path, real_images_path
from training.shared_files import measure_files

logger = get_logger(__name__)

# Behaviour of older versions, whose checkpoints do not record these flags.
FORMER_VALUES = {
    "optimizer": "adamw",
    "lr_schedule": "constant",
    "lr_warmup_steps": 0,
    "qk_norm": False,
}

# Settings that may change between two starts of a run, besides fields marked `may_change`.
FREE_CONFIGS = (DataConfig, LogConfig, SaveConfig, PreviewConfig, PeriodicEvaluationConfig)


@dataclass(frozen=True)
class RunPosition:
    """The progress of a run when it is started; the same on all processes."""

    checkpoints: list[Path] = field(default_factory=list)  # oldest first
    step: int = 0  # step of the newest checkpoint
    complete_evaluations: frozenset[tuple[int, float]] = frozenset()  # (`step`, EMA decay)
    complete_previews: frozenset[Path] = frozenset()  # files of previews at `step`
    has_real_images: bool = False  # the images next to previews have been drawn
    has_pending_work: bool = False  # a preview or evaluation at `step` was interrupted
    last_logged_step: int = 0  # step of the newest line of metrics.jsonl
    file_sizes: dict[str, int] = field(default_factory=dict)  # files of the newest checkpoint


def find_position(
    folder: Path,
    last_step: int,
    ema_decays: tuple[float, ...],
    preview_every: int,
    eval_every: int,
) -> RunPosition:
    """Find out where a run stopped; a new run may have no folder yet.

    Args:
        folder: The run folder.
        last_step: Number of updates of the whole run.
        ema_decays: Decays of the EMAs; the first is the primary one.
        preview_every: Steps between previews.
        eval_every: Steps between evaluations.
    """
    checkpoints = list_checkpoints(folder)
    step = int(checkpoints[-1].name) if checkpoints else 0
    rows = read_rows(folder, ignore_zeroed=True)
    complete_evaluations = frozenset(
        (step, row["evaluation"]["ema_decay"])
        for row in rows
        if row["step"] == step and "evaluation" in row
    )
    previews = [preview_path(folder, step, suffix) for suffix in ema_suffixes(ema_decays)]
    complete_previews = frozenset(path for path in previews if path.exists())
    lacks_evaluation = is_due(step, eval_every, last_step) and any(
        (step, decay) not in complete_evaluations for decay in ema_decays
    )
    lacks_preview = is_due(step, preview_every, last_step) and any(
        path not in complete_previews for path in previews
    )
    return RunPosition(
        checkpoints,
        step,
        complete_evaluations,
        complete_previews,
        # A new run draws the images again, because it may have other data or a new tracker run.
        bool(checkpoints) and real_images_path(folder).exists(),
        lacks_evaluation or lacks_preview,
        last_logged_step=max((row["step"] for row in rows), default=0),
        file_sizes=measure_files(checkpoints[-1]) if checkpoints else {},
    )


def check_run_folder(folder: Path) -> None:
    """Raise UserError if the run folder contains checkpoints of REPA, SRA or SiT, and none of ours.

    Their programs use the same folders, exps/NAME/checkpoints, with .pt files in them.
    """
    files = sorted((folder / "checkpoints").glob("*.pt"))
    if files and not list_checkpoints(folder):
        raise UserError(
            f"{files[-1]} is a checkpoint of another repository, from which training cannot "
            "continue; choose another --exp-name"
        )


def check_resume_step(run: RunConfig, checkpoints: list[Path]) -> None:
    """Raise UserError if --resume-step is not the step of the newest checkpoint.

    Args:
        run: Name and location of the run.
        checkpoints: Checkpoints of the run, oldest first.
    """
    step = run.resume_step
    steps = [int(checkpoint.name) for checkpoint in checkpoints]
    if not step or step in steps[-1:]:
        return
    if not steps:
        raise UserError(
            f"--resume-step {step}: {run.folder} has no checkpoint; remove the flag to start it"
        )
    newest = f"the newest checkpoint of {run.folder} is that of step {steps[-1]}"
    if step not in steps:
        raise UserError(
            f"--resume-step {step}: there is no such checkpoint, and {newest}; remove the flag to "
            "continue from it"
        )
    chosen = checkpoints[steps.index(step)]
    raise UserError(
        f"--resume-step {step}: {newest}; remove the flag to continue from it, or, to continue "
        f"from {step}, copy {chosen} to {run.output_dir}/NEW/checkpoints/{chosen.name} and pass "
        f"--exp-name NEW (or delete the newer folders in {chosen.parent})"
    )


def check_cache(data: DataConfig, model: ModelConfig, manifest: Manifest) -> None:
    """Raise UserError unless the cache matches the flags and fits the network."""
    patch = PRESETS[model.model]["patch"]
    folders = format_value(data.data_dir)
    if data.resolution not in (None, manifest.resolution):
        raise UserError(
            f"--resolution {data.resolution}: {folders} contains {manifest.resolution}x"
            f"{manifest.resolution} images; pass another --data-dir, or remove the flag"
        )
    if data.num_classes not in (None, manifest.num_classes):
        raise UserError(
            f"--num-classes {data.num_classes}: {folders} has {manifest.num_classes} classes; pass "
            "another --data-dir, or remove the flag"
        )
    _, height, width = manifest.latent_shape
    if height != width or height % patch:
        raise UserError(
            f"--model {model.model} cannot cut the latents of {folders} {manifest.latent_shape} "
            f"into patches of {patch}"
        )


def build_config_json(
    settings: Settings,
    network: SiTConfig,
    align: list[dict],
    manifest: Manifest,
    images_per_class: list[int] | None = None,
) -> dict:
    """Return the contents of config.json: the network, its latents, and how it is trained.

    Args:
        settings: Settings of the run.
        network: Architecture of the backbone.
        align: The alignment methods.
        manifest: Manifest of the training cache.
        images_per_class: Number of images of each class; None for a run that was started by a
            version that did not record it.
    """
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
    data["joined"] = manifest.encoding.get("joined")
    if images_per_class is not None:
        data["images_per_class"] = images_per_class
    return {
        "model_name": settings.model.model,
        "model": network.to_json(),
        "align": align,
        **asdict(settings.objective),
        "batch_size": settings.loop.batch_size,
        "ema_decay": list(settings.optimizer.ema_decay),
        "data": data,
    }


def build_args_json(settings: Settings) -> dict:
    """Return the contents of args.json: every flag and its value."""
    configs = [config for config in settings if type(config) in ALL_CONFIGS]
    return record_flags(*configs) | record_alignments(settings.alignments)


def check_same_run(flags: dict, folder: Path) -> None:
    """Raise UserError if the newest checkpoint in `folder` was trained with other flags.

    Args:
        flags: Contents of args.json for the current command line.
        folder: The run folder. If it contains no checkpoint, all flags may change.
    """
    changes = describe_changed_flags(flags, folder)
    if changes:
        raise UserError(
            f"{folder} was started with other flags: {changes}. Choose another --exp-name, or "
            "pass the flags it was started with"
        )


def describe_changed_flags(flags: dict, folder: Path) -> str:
    """Describe the flags in which the newest checkpoint in a run folder differs, or return "".

    The arguments are those of `check_same_run`.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return ""
    stored = FORMER_VALUES | read_stored_flags(checkpoints[-1])
    fixed = [key for key in flags if key not in _flags_that_may_change()]
    if flags["lr_schedule"] != "constant":  # its learning rates depend on the length of the run
        fixed.append("max_train_steps")
    changed = {
        key: f"--{key.replace('_', '-')}"
        for key in fixed
        if stored.get(key, flags[key]) != flags[key]
    }
    if "align" in changed:  # the other settings of the alignment follow from the methods
        changed = {"align": "--align"}
    differences = _describe_changes(changed, stored, flags)
    if "max_train_steps" in changed:
        differences += f" (--lr-schedule {flags['lr_schedule']} depends on it)"
    return differences


def read_stored_flags(checkpoint: Path) -> dict:
    """Return the flags that a checkpoint was trained with.

    For a checkpoint of older code, they are read from args.json. If that file is missing or
    damaged, they are inferred from the checkpoint, and a message lists those that are unknown.
    """
    progress = read_progress(checkpoint)
    if "flags" in progress:
        return progress["flags"]
    path = checkpoint.parent.parent / "args.json"
    flags = read_json_if_valid(path)
    if not flags:
        flags = _infer_flags(read_config(checkpoint), progress["param_groups"][0])
        logger.info(
            "%s is missing or damaged, and %s was saved by older code: the values of --seed, "
            "--max-grad-norm, --mixed-precision and --allow-tf32 must be those that the run was "
            "started with, but cannot be compared",
            path,
            checkpoint,
        )
    return flags


def _infer_flags(config: dict, optimizer: dict) -> dict:
    """Return the flags that follow from config.json and the settings of AdamW."""
    objective = {setting.name: config.get(setting.name) for setting in fields(ObjectiveConfig)}
    beta1, beta2 = optimizer["betas"]
    flags = {
        **objective,
        "model": config["model_name"],
        "batch_size": config.get("batch_size"),
        "ema_decay": config["ema_decay"],
        "learning_rate": optimizer["lr"],
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_weight_decay": optimizer["weight_decay"],
        "adam_epsilon": optimizer["eps"],
    }
    return {key: value for key, value in flags.items() if value is not None}


def _flags_that_may_change() -> set[str]:
    """Return argparse's names of the flags that may change when a run is resumed."""
    names = {
        get_destination(setting)
        for config in ALL_CONFIGS
        for setting in fields(config)
        if config in FREE_CONFIGS or setting.metadata.get("may_change")
    }
    # The flags of the methods are compared through config.json.
    return names | method_destinations()


def _describe_changes(names: dict[str, str], before: dict, now: dict) -> str:
    """Return the values of changed keys before and now, given the keys and their names."""
    return "; ".join(
        f"{name} was {format_value(before.get(key))}, now {format_value(now[key])}"
        for key, name in names.items()
    )


def check_same_data(data: DataConfig, folder: Path, stored: dict, current: dict) -> None:
    """Raise UserError if two config.json differ in their data.

    Args:
        data: Settings of the data, for the message.
        folder: The run folder, for the message.
        stored: config.json of the checkpoint to resume from.
        current: config.json for the current command line.
    """
    before = stored["data"]
    now = current["data"]
    changed = [key for key in before if key not in ("source", "vae") and before[key] != now[key]]
    if changed:
        raise UserError(
            f"--data-dir {format_value(data.data_dir)} is not the cache that {folder} was started "
            f"with: {', '.join(changed)} differ"
        )


def check_same_alignment(folder: Path, stored: list[dict], current: list[dict]) -> None:
    """Raise UserError if the alignment entries of two config.json differ.

    Args:
        folder: The run folder, for the message.
        stored: config.json's "align" of the checkpoint to resume from.
        current: "align" in config.json for the current command line.
    """
    old_methods = " ".join(entry["method"] for entry in stored) or "none"
    methods = " ".join(entry["method"] for entry in current) or "none"
    if old_methods != methods:
        raise UserError(f"{folder} was started with --align {old_methods}, now --align {methods}")
    for before, now in zip(stored, current):
        changed = {key: key for key in now if key not in before or before[key] != now[key]}
        if changed:
            raise UserError(
                f"{folder} was started with another setting of --align {now['method']}: "
                f"{_describe_changes(changed, before, now)}. Choose another --exp-name, or pass "
                "the settings and files it was started with"
            )
