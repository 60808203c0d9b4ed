"""Settings of train.py as frozen dataclasses, its command line, and checks of the settings."""

import argparse
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from common import cli
from common.cli import UserError, format_value
from common.config import add_flags, get_flag_of_field, read_flags, setting
from common.machine import count_available_cores
from evaluations.extractors import EXTRACTOR_NAMES
from interpolant import INTERPOLANTS, PREDICTIONS, WEIGHTINGS
from latents.manifest import Manifest
from models.sit import PRESETS, SiTConfig
from training.alignment_config import (
    AlignmentConfig,
    add_alignment_flags,
    resolve_alignments,
)
from training.foreign_flags import FOREIGN_FLAGS
from training.schedule import SCHEDULES
from training.trackers import TRACKER_NAMES

DEFAULT_NUM_STEPS = 400_000
OPTIMIZERS = ("adamw", "muon")
SHARD_MODES = ("none", "optimizer", "full", "hybrid")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RunConfig:
    """Name, location and seed of a run."""

    exp_name: str = setting(
        help="name of the run; its files are in OUTPUT_DIR/EXP_NAME", may_change=True
    )
    output_dir: Path = setting(
        Path("exps"), help="folder that holds the run folders", may_change=True
    )
    seed: int = setting(
        0, help="seed of the initial weights and of all training randomness", type=cli.seed
    )
    resume_step: int = setting(
        0,
        help="step that the newest checkpoint must have; it is resumed with or without this flag "
        "(0: any step)",
        type=cli.non_negative_int,
        may_change=True,
    )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output_dir / self.exp_name


@dataclass(frozen=True)
class DataConfig:
    """The latent cache and how it is read."""

    data_dir: tuple[Path | str, ...] = setting(
        help="latent cache: a folder, or a URL (s3://, gs://, hf://, https://); several are joined",
        type=cli.path_or_url,
        nargs="+",
        action="extend",
    )
    local_cache: str = setting(
        "auto",
        help="folder for copies of remote caches, made once per machine; auto: in $SLURM_TMPDIR or "
        "the temporary folder; none: no copy, rows are read by ranged requests",
        metavar="DIR",
    )
    cache_in_ram: bool = setting(
        False,
        help="load the cache into memory first, once per machine; for slow disks",
    )
    resolution: int | None = setting(
        None,
        help="image size in pixels that the cache must have",
        type=cli.positive_int,
    )
    num_classes: int | None = setting(
        None,
        help="number of classes that the cache must have",
        type=cli.positive_int,
    )
    num_workers: int = setting(
        min(4, count_available_cores()),
        help="number of DataLoader workers per training process",
        type=cli.non_negative_int,
    )


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    model: str = setting(
        "SiT-XL/2",
        help="network: SiT-Ti/2, or SiT-{S,B,L,XL} with patch size /1, /2, /4 or /8",
        choices=PRESETS,
        metavar="NAME",
    )
    qk_norm: bool = setting(
        False,
        action=argparse.BooleanOptionalAction,
        help="normalize the queries and keys of attention with a LayerNorm per block",
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """The denoising objective."""

    path_type: str = setting(
        "linear",
        help="interpolant between data and noise; vp is that of DDPM and DiT",
        choices=INTERPOLANTS,
    )
    prediction: str = setting(
        "v", help="quantity that the network predicts: velocity, data or noise", choices=PREDICTIONS
    )
    weighting: str = setting(
        "uniform",
        help="distribution of timesteps; lognormal: log-normal sigma/alpha, as in REPA",
        choices=WEIGHTINGS,
    )
    cfg_prob: float = setting(
        0.1,
        help="fraction of labels dropped for classifier-free guidance; it must be below 1, so "
        "that classes are trained",
        type=cli.decay,
    )


@dataclass(frozen=True)
class LoopConfig:
    """Length of the run and size of its batches."""

    max_train_steps: int | None = setting(
        None,
        help=f"number of optimizer updates (default: {DEFAULT_NUM_STEPS:,}, unless --epochs is "
        "passed)",
        type=cli.positive_int,
        may_change=True,
    )
    epochs: float | None = setting(
        None,
        help="number of passes over the data, instead of --max-train-steps",
        type=cli.positive_float,
        may_change=True,
    )
    batch_size: int = setting(
        256,
        help="global batch size: images per update over all processes",
        type=cli.positive_int,
    )
    gradient_accumulation_steps: int = setting(
        1,
        help="number of micro-batches per process and update",
        type=cli.positive_int,
        may_change=True,
    )

    @property
    def num_steps(self) -> int:
        """Number of updates of the run; `resolve_num_steps` must have filled it in."""
        assert self.max_train_steps is not None, "call resolve_num_steps first"
        return self.max_train_steps


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate schedule, gradient clipping and EMAs."""

    optimizer: str = setting(
        "adamw",
        help="optimizer; muon: Muon for the weight matrices of the blocks, and AdamW for all other "
        "parameters",
        choices=OPTIMIZERS,
    )
    learning_rate: float = setting(
        1e-4, help="learning rate; the highest one of a schedule", type=cli.positive_float
    )
    lr_schedule: str = setting(
        "constant",
        help="learning rate after the warm-up; cosine and linear decrease it until the last step",
        choices=SCHEDULES,
    )
    lr_warmup_steps: int = setting(
        0,
        help="steps in which the learning rate rises linearly to --learning-rate",
        type=cli.non_negative_int,
    )
    lr_min_factor: float = setting(
        0.0,
        help="final learning rate of cosine and linear, as a fraction of --learning-rate",
        type=cli.fraction,
    )
    adam_beta1: float = setting(0.9, help="beta1 of AdamW", type=cli.decay)
    adam_beta2: float = setting(0.999, help="beta2 of AdamW", type=cli.decay)
    adam_weight_decay: float = setting(
        0.0, help="weight decay of AdamW", type=cli.non_negative_float
    )
    adam_epsilon: float = setting(1e-8, help="epsilon of AdamW", type=cli.positive_float)
    muon_momentum: float = setting(0.95, help="momentum of Muon", type=cli.decay)
    muon_weight_decay: float = setting(
        0.1, help="weight decay of the matrices that Muon updates", type=cli.non_negative_float
    )
    max_grad_norm: float = setting(
        1.0, help="gradient norm above which gradients are scaled down", type=cli.positive_float
    )
    ema_decay: tuple[float, ...] = setting(
        (0.9999,),
        help="EMA decay per step; pass several for several EMAs (the first is the primary one)",
        type=cli.decay,
        nargs="+",
    )


@dataclass(frozen=True)
class DeviceConfig:
    """Precision and memory use on the device."""

    mixed_precision: str = setting(
        "auto",
        help="autocast precision; auto: bf16 on GPUs that support it, otherwise no",
        choices=("auto", "no", "fp16", "bf16"),
    )
    compile: bool = setting(
        False,
        help="compile the repeated block, the random inputs and the losses (torch.compile)",
        may_change=True,
    )
    activation_checkpointing: bool = setting(
        False,
        help="store only the inputs of the blocks and recompute their activations; this saves "
        "memory and increases computation by a third",
        may_change=True,
    )
    recomputed_blocks: int | None = setting(
        None,
        type=cli.positive_int,
        help="number of blocks that --activation-checkpointing recomputes (default: all); memory "
        "savings and additional computation are proportional to this number",
        may_change=True,
    )
    shard: str = setting(
        "none",
        help="state that is sharded over the processes with FSDP2 instead of being copied to each "
        "(DDP); optimizer: gradients, optimizer state and EMAs; full: parameters as well; hybrid: "
        "full within a node, copied to every node",
        choices=SHARD_MODES,
        may_change=True,
    )
    allow_tf32: bool = setting(
        False, help="use TF32 for float32 matrix products and convolutions on GPUs"
    )
    collective_timeout: float = setting(
        10.0,
        help="minutes after which a process that keeps the others waiting in a training step is "
        "reported, and the run ends with exit code 75, so that a job script restarts it; previews, "
        "evaluations, checkpoints and compilation may take longer",
        type=cli.positive_float,
        may_change=True,
    )


@dataclass(frozen=True)
class LogConfig:
    """Metrics and trackers."""

    log_every: int = setting(
        100,
        help="steps between lines of metrics.jsonl, and of the progress without a terminal",
        type=cli.positive_int,
    )
    report_to: tuple[str, ...] = setting(
        ("none",),
        help="trackers in addition to metrics.jsonl: none, all (every installed tracker), or any "
        f"of {', '.join(TRACKER_NAMES)}",
        choices=("none", "all", *TRACKER_NAMES),
        nargs="+",
        metavar="NAME",
    )
    wandb_project: str = setting("sra2", help="project name in the trackers")
    logging_dir: Path | None = setting(
        None,
        help="folder of the trackers' files, relative to OUTPUT_DIR; those of this run are in its "
        "subfolder EXP_NAME (default: the run folder)",
        metavar="DIR",
    )
    profile: int = setting(
        0,
        help="number of steps to profile, after twelve others; a trace and a table of the "
        "operations are written to the run folder (0: no profile)",
        type=cli.non_negative_int,
        metavar="N",
        may_change=True,
    )


@dataclass(frozen=True)
class SaveConfig:
    """Schedule and retention of checkpoints."""

    checkpointing_steps: int = setting(
        50_000,
        help="steps between checkpoints; the last step is saved as well",
        type=cli.positive_int,
    )
    keep_last: int = setting(
        0,
        help="number of newest checkpoints to keep; 0 keeps all",
        type=cli.non_negative_int,
    )
    milestone_steps: int = setting(
        0,
        help="with --keep-last, also keep checkpoints at multiples of this many steps",
        type=cli.non_negative_int,
    )


@dataclass(frozen=True)
class PreviewConfig:
    """Sample grids of the EMA during training."""

    every: int = setting(
        10_000,
        help="steps between previews; 0 disables them",
        flags=("--sampling-steps",),
        type=cli.non_negative_int,
    )
    cfg_scale: float = setting(
        1.5,
        help="guidance scale of previews; 1 disables guidance",
        flags=("--preview-cfg-scale",),
        type=cli.non_negative_float,
    )
    vae: str | None = setting(
        None,
        help="autoencoder that decodes previews: hub id or folder (default: the one that created "
        "the cache)",
    )


@dataclass(frozen=True)
class PeriodicEvaluationConfig:
    """Metrics of the EMA during training."""

    every: int = setting(
        0,
        help="steps between evaluations; the last step is evaluated as well; 0 disables them",
        flags=("--eval-every",),
        type=cli.non_negative_int,
    )
    samples: int = setting(
        5000,
        help="number of samples; fewer than 50,000 give a larger FID",
        flags=("--eval-samples",),
        type=cli.positive_int,
    )
    reference: Path | None = setting(
        None,
        help="ADM's .npz, or images: a folder, zip, tar or parquet files",
        flags=("--eval-reference",),
    )
    latents: Path | str | None = setting(
        None,
        help="latent cache of held-out images; their loss is measured on EVAL_SAMPLES images",
        type=cli.path_or_url,
        flags=("--eval-latents",),
        metavar="DIR",
    )
    features: str = setting(
        "inception",
        help=f"feature network: {', '.join(EXTRACTOR_NAMES)} (fashion is the bundled classifier)",
        flags=("--eval-features",),
    )
    inception_weights: Path | None = setting(
        None,
        help="file with the Inception weights (default: in the torch hub cache)",
    )
    mode: str = setting(
        "sde",
        help="same as --mode of sample_ddp.py, with --global-seed 0",
        flags=("--eval-mode",),
        choices=("sde", "ode"),
    )
    heun: bool = setting(False, help="same as --heun of sample_ddp.py", flags=("--eval-heun",))
    num_steps: int = setting(
        250,
        help="same as --num-steps of sample_ddp.py",
        flags=("--eval-num-steps",),
        type=cli.positive_int,
    )
    cfg_scale: float = setting(
        1.0,
        help="same as --cfg-scale of sample_ddp.py",
        flags=("--eval-cfg-scale",),
        type=cli.non_negative_float,
    )
    batch_size: int = setting(
        32,
        help="same as --per-proc-batch-size of sample_ddp.py",
        flags=("--eval-batch-size",),
        type=cli.positive_int,
    )


class Settings(NamedTuple):
    """Everything that train.py's command line sets. Classes take the parts that they need."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    alignments: tuple[AlignmentConfig, ...]
    loop: LoopConfig
    optimizer: OptimizerConfig
    device: DeviceConfig
    log: LogConfig
    checkpoint: SaveConfig
    preview: PreviewConfig
    evaluation: PeriodicEvaluationConfig
    print_config: bool

    @property
    def tracker_folder(self) -> Path:
        """The folder of the trackers' files of this run."""
        if self.log.logging_dir is None:
            return self.run.folder
        return self.run.output_dir / self.log.logging_dir / self.run.exp_name


_GROUPS: dict[str, tuple[type, ...]] = {
    "run": (RunConfig,),
    "data": (DataConfig,),
    "model": (ModelConfig, ObjectiveConfig),
    "alignment": (),
    "optimization": (LoopConfig, OptimizerConfig, DeviceConfig),
    "logging": (LogConfig, SaveConfig, PreviewConfig),
    "evaluation of the EMA during training": (PeriodicEvaluationConfig,),
}
ALL_CONFIGS = [config for configs in _GROUPS.values() for config in configs]


def parse_settings(
    argv: Sequence[str] | None = None, description: str = "Train a SiT."
) -> Settings:
    """Parse a command line, by default that of the process.

    Raises:
        UserError: A flag is unknown, has a bad value, or contradicts another flag.
    """
    parser = cli.Parser(description, "train.py", "--exp-name NAME --data-dir PATH")
    for title, kinds in _GROUPS.items():
        if title == "alignment":
            add_alignment_flags(parser)
            continue
        group = parser.add_argument_group(title)
        for kind in kinds:
            add_flags(group, kind)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the flags with the values that the run would use, and exit; requires the cache",
    )
    args = FOREIGN_FLAGS.parse(parser, argv)
    configs: dict[str, Any] = {
        name: read_flags(kind, args)
        for name, kind in get_type_hints(Settings).items()
        if kind in ALL_CONFIGS
    }
    alignments = resolve_alignments(args, args.model)
    settings = Settings(**configs, alignments=alignments, print_config=args.print_config)
    _check_settings(settings)
    return settings


def _check_settings(settings: Settings) -> None:
    run = settings.run
    if not run.exp_name or "/" in run.exp_name or run.exp_name.startswith("."):
        raise UserError(
            f"--exp-name '{run.exp_name}' must be a plain folder name; pass the folder above it as "
            "--output-dir"
        )
    decays = settings.optimizer.ema_decay
    if len(set(decays)) < len(decays):
        raise UserError(f"--ema-decay {format_value(decays)} repeats a value: pass each decay once")
    _check_optimizer(settings.optimizer)
    if settings.loop.epochs and settings.loop.max_train_steps:
        raise UserError("--epochs and --max-train-steps both set the length: pass only one")
    check_compiler(settings.device)
    if settings.device.recomputed_blocks and not settings.device.activation_checkpointing:
        raise UserError("--recomputed-blocks needs --activation-checkpointing: pass both flags")
    if settings.evaluation.latents and not settings.evaluation.every:
        raise UserError("--eval-latents needs --eval-every: pass the steps between evaluations")
    report_to = settings.log.report_to
    if "none" in report_to and len(report_to) > 1:
        raise UserError(
            f"--report-to {format_value(report_to)}: none cannot be combined with trackers; "
            "remove it"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raise UserError if a setting has a value but no effect."""
    required_flags: dict[str, str] = {}
    if optimizer.lr_schedule == "constant":
        required_flags["lr_min_factor"] = "--lr-schedule cosine or linear"
    if optimizer.optimizer != "muon":
        required_flags["muon_momentum"] = "--optimizer muon"
        required_flags["muon_weight_decay"] = "--optimizer muon"
    defaults = OptimizerConfig()
    for name, required in required_flags.items():
        value = getattr(optimizer, name)
        if value != getattr(defaults, name):
            flag = get_flag_of_field(OptimizerConfig, name)
            raise UserError(f"{flag} {value} needs {required}: pass both flags")


def check_compiler(device: DeviceConfig) -> None:
    """Raise UserError if --compile was passed and there is no C++ compiler."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device.compile and not any(map(shutil.which, compilers)):
        raise UserError(
            "--compile needs a C++ compiler, and none was found: install g++ or clang++, or set "
            "CXX to a compiler"
        )


def check_batch_size(loop: LoopConfig, num_processes: int) -> None:
    """Raise UserError unless the global batch divides into equal micro-batches."""
    parts = num_processes * loop.gradient_accumulation_steps
    if loop.batch_size % parts:
        raise UserError(
            f"--batch-size {loop.batch_size} (global) is not a multiple of {num_processes} "
            "(processes) x --gradient-accumulation-steps "
            f"{loop.gradient_accumulation_steps}"
        )


def check_warmup(optimizer: OptimizerConfig, loop: LoopConfig) -> None:
    """Raise UserError if a decreasing schedule has no steps after the warm-up.

    Args:
        optimizer: Settings of the schedule.
        loop: Length of the run, as returned by `resolve_num_steps`.
    """
    if optimizer.lr_schedule != "constant" and optimizer.lr_warmup_steps >= loop.num_steps:
        raise UserError(
            f"--lr-warmup-steps {optimizer.lr_warmup_steps} leaves no steps for --lr-schedule "
            f"{optimizer.lr_schedule}: the run has {loop.num_steps} steps; pass fewer warm-up steps"
        )


def resolve_num_steps(loop: LoopConfig, num_images: int) -> LoopConfig:
    """Return the settings with `max_train_steps` filled in."""
    steps = loop.max_train_steps or DEFAULT_NUM_STEPS
    if loop.epochs:
        steps = math.ceil(loop.epochs * num_images / loop.batch_size)
    return replace(loop, max_train_steps=steps)


def resolve_device(settings: Settings) -> Settings:
    """Return the settings with "auto" replaced by the default precision of this machine."""
    precision = resolve_precision(settings.device.mixed_precision)
    return settings._replace(device=replace(settings.device, mixed_precision=precision))


def resolve_precision(mixed_precision: str) -> str:
    """Return a precision, with "auto" replaced by the default of this machine.

    Raises:
        UserError: The machine does not support the precision.
    """
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a GPU, and none was found: use no or bf16")
    if mixed_precision != "auto":
        return mixed_precision
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "no"


def build_network_config(model: ModelConfig, manifest: Manifest) -> SiTConfig:
    """Return the architecture for the cache's latents and classes."""
    channels, size, _ = manifest.latent_shape
    return SiTConfig(
        **PRESETS[model.model],
        latent_size=size,
        channels=channels,
        num_classes=manifest.num_classes,
        qk_norm=model.qk_norm,
    )


def autocast_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype that autocast uses for a precision, float32 without mixed precision."""
    return AUTOCAST_DTYPES.get(mixed_precision, torch.float32)
