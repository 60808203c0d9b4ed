"""The command line of train.py, and every mistake in it that can be seen before any work is done."""

import argparse
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from common import cli
from common.cli import UserError
from common.machine import available_cores
from evaluations.extractors import EXTRACTOR_NAMES
from interpolant import INTERPOLANTS, PREDICTIONS, WEIGHTINGS
from latents.cache import LatentCache, Manifest
from models.sit import PRESETS, SiTConfig
from models.targets import TARGETS, Data
from training import alignment
from training.alignment import spelled

# Flags that may change between two starts of one run; every other one is part of what the run is.
FREE_FLAGS = {
    "data_dir",
    "cache_in_ram",
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "sampling_steps",
    "preview_cfg_scale",
    "log_every",
    "keep_last",
    "milestone_steps",
    "num_workers",
    "report_to",
    "gradient_accumulation_steps",
    "compile",
    "activation_checkpointing",
    "vae",
    "resolution",
    "num_classes",
    "epochs",
    "eval_every",
    "eval_samples",
    "eval_reference",
    "eval_latents",
    "eval_features",
    "eval_mode",
    "eval_heun",
    "eval_num_steps",
    "eval_cfg_scale",
    "eval_batch_size",
    "inception_weights",
    *(
        flag for target in TARGETS.values() for flag in target.flags
    ),  # what they say stands in config.json
}


def parse_args(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as they stand on the command line, or in argv; `doc` heads the help."""
    parser = cli.Parser(doc, "train.py", "--exp-name NAME --data-dir PATH")

    add = parser.add_argument_group("run").add_argument
    add("--exp-name", required=True, help="name of the run; it lives in OUTPUT_DIR/EXP_NAME")
    add("--output-dir", type=Path, default=Path("exps"), help="where runs live")
    add(
        "--seed",
        type=cli.seed,
        default=0,
        help="of initialisation and of the whole training stream",
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--data-dir",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        help="latent cache; several are joined",
    )
    add(
        "--cache-in-ram",
        action="store_true",
        help="read the cache into memory first, once on each machine: for slow disks",
    )
    add(
        "--resolution",
        type=cli.positive_int,
        help="stop unless the cache has this many pixels a side",
    )
    add("--num-classes", type=cli.positive_int, help="stop unless the cache has this many classes")
    add(
        "--num-workers",
        type=cli.non_negative_int,
        default=min(4, available_cores()),
        help="loader processes for each training process",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        choices=PRESETS,
        default="SiT-XL/2",
        metavar="NAME",
        help="SiT-Ti/2, or SiT- S, B, L, XL with /1 /2 /4 /8",
    )
    add(
        "--path-type",
        choices=INTERPOLANTS,
        default="linear",
        help="between data and noise; vp is DDPM's and DiT's",
    )
    add(
        "--prediction",
        choices=PREDICTIONS,
        default="v",
        help="what the network predicts: velocity, data or noise",
    )
    add(
        "--weighting",
        choices=WEIGHTINGS,
        default="uniform",
        help="of timesteps; lognormal: sigma/alpha is, as in REPA",
    )
    add(
        "--cfg-prob",
        type=cli.fraction,
        default=0.1,
        help="share of labels dropped for classifier-free guidance",
    )

    alignment.add_flags(parser)

    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--max-train-steps",
        type=cli.positive_int,
        help="optimizer updates (default: 400,000, unless --epochs says)",
    )
    add(
        "--epochs",
        type=cli.positive_float,
        help="passes over the data, instead of --max-train-steps",
    )
    add(
        "--batch-size",
        type=cli.positive_int,
        default=256,
        help="global batch: images of one update, over all processes",
    )
    add(
        "--gradient-accumulation-steps",
        type=cli.positive_int,
        default=1,
        help="parts a process cuts its share of the batch into",
    )
    add("--learning-rate", type=cli.positive_float, default=1e-4, help="AdamW's, constant")
    add("--adam-beta1", type=cli.decay, default=0.9, help="AdamW")
    add("--adam-beta2", type=cli.decay, default=0.999, help="AdamW")
    add("--adam-weight-decay", type=cli.non_negative_float, default=0.0, help="AdamW")
    add("--adam-epsilon", type=cli.positive_float, default=1e-8, help="AdamW")
    add("--max-grad-norm", type=cli.positive_float, default=1.0, help="gradient clipping")
    add(
        "--ema-decay",
        type=cli.decay,
        nargs="+",
        default=[0.9999],
        help="of the averaged weights, per step; several keep an average each, the first is the run's own",
    )
    add(
        "--mixed-precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="auto: bf16 on GPUs that have it",
    )
    add("--compile", action="store_true", help="compile the repeated block once (torch.compile)")
    add(
        "--activation-checkpointing",
        action="store_true",
        help="keep the blocks' inputs only: less memory, a third more work",
    )
    add("--allow-tf32", action="store_true", help="TF32 for float32 matrix products on GPUs")

    add = parser.add_argument_group("logging").add_argument
    add(
        "--log-every",
        type=cli.positive_int,
        default=100,
        help="steps between lines of metrics.jsonl",
    )
    add(
        "--checkpointing-steps",
        type=cli.positive_int,
        default=50_000,
        help="steps between checkpoints; the last step has one too",
    )
    add(
        "--keep-last",
        type=cli.non_negative_int,
        default=0,
        help="newest checkpoints kept; 0 keeps all",
    )
    add(
        "--milestone-steps",
        type=cli.non_negative_int,
        default=0,
        help="with --keep-last, multiples of this many steps are kept too",
    )
    add(
        "--sampling-steps",
        type=cli.non_negative_int,
        default=10_000,
        help="steps between previews; 0 for none",
    )
    add(
        "--preview-cfg-scale",
        type=cli.non_negative_float,
        default=1.5,
        help="guidance of the previews; 1 is none",
    )
    add(
        "--vae",
        help="autoencoder that decodes previews: hub id or folder (default: the one that made the cache)",
    )
    add(
        "--report-to",
        choices=("none", "wandb"),
        default="none",
        help="metrics.jsonl is always written",
    )

    add = parser.add_argument_group(
        "evaluation while training, on the averaged weights"
    ).add_argument
    add(
        "--eval-every",
        type=cli.non_negative_int,
        default=0,
        help="steps between evaluations, and one at the end; 0 for none",
    )
    add(
        "--eval-samples",
        type=cli.positive_int,
        default=5000,
        help="images; fewer than 50,000 make a larger FID",
    )
    add(
        "--eval-reference",
        type=Path,
        help="ADM's .npz, or images: a folder tree class/image.ext or a zip",
    )
    add(
        "--eval-latents",
        type=Path,
        metavar="DIR",
        help="images held out, a latent cache: the loss on EVAL_SAMPLES of them",
    )
    add(
        "--eval-features",
        default="inception",
        help=f"a network: {', '.join(EXTRACTOR_NAMES)} (the shipped classifier is fashion)",
    )
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add(
        "--eval-mode",
        choices=("sde", "ode"),
        default="sde",
        help="as sample_ddp.py's --mode, with --global-seed 0",
    )
    add("--eval-heun", action="store_true", help="as sample_ddp.py's --heun")
    add(
        "--eval-num-steps",
        type=cli.positive_int,
        default=250,
        help="as sample_ddp.py's --num-steps",
    )
    add(
        "--eval-cfg-scale",
        type=cli.non_negative_float,
        default=1.0,
        help="as sample_ddp.py's --cfg-scale",
    )
    add(
        "--eval-batch-size",
        type=cli.positive_int,
        default=32,
        help="as sample_ddp.py's --per-proc-batch-size",
    )

    return parser.parse_args(argv)


def paths(several: list[Path]) -> str:
    """As they stand on the command line."""
    return " ".join(map(str, several))


def check_args(args: argparse.Namespace, processes: int) -> None:
    """Mistakes that can be seen before anything is read. Raises UserError."""
    share = args.batch_size // processes
    if args.batch_size % processes or share % args.gradient_accumulation_steps:
        raise UserError(
            f"--batch-size {args.batch_size} (global) is not a multiple of {processes} (processes) x "
            f"--gradient-accumulation-steps {args.gradient_accumulation_steps}"
        )
    alignment.check(args)
    if len(set(args.ema_decay)) < len(args.ema_decay):
        raise UserError(f"--ema-decay {' '.join(map(str, args.ema_decay))}: each only once")
    if args.epochs and args.max_train_steps:
        raise UserError("--epochs and --max-train-steps both say how long to train: give one")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError(
            "--compile needs a C++ compiler (g++ or clang++, or name one in CXX): there is none here"
        )
    if args.eval_latents and not args.eval_every:
        raise UserError("--eval-latents needs --eval-every, which says how often")
    if not args.exp_name or "/" in args.exp_name or args.exp_name.startswith("."):
        raise UserError(
            f"--exp-name '{args.exp_name}' must be a plain folder name; the folder above it is --output-dir"
        )


def check_cache(args: argparse.Namespace, cache: LatentCache) -> None:
    """The cache against what was asked for, and how many steps that is. Raises UserError."""
    manifest, patch = cache.manifest, PRESETS[args.model]["patch"]
    if args.epochs:
        args.max_train_steps = math.ceil(args.epochs * len(cache) / args.batch_size)
    args.max_train_steps = args.max_train_steps or 400_000
    if args.resolution and args.resolution != manifest.resolution:
        raise UserError(
            f"--resolution {args.resolution}: {paths(args.data_dir)} holds images of {manifest.resolution} pixels"
        )
    if args.num_classes and args.num_classes != manifest.num_classes:
        raise UserError(
            f"--num-classes {args.num_classes}: {paths(args.data_dir)} has {manifest.num_classes}"
        )
    if manifest.latent_shape[1] != manifest.latent_shape[2] or manifest.latent_shape[1] % patch:
        raise UserError(
            f"--model {args.model} cannot cut the latents of {paths(args.data_dir)} {manifest.latent_shape} into patches of "
            f"{patch}"
        )


def make_config(args: argparse.Namespace, manifest: Manifest, data: Data | None = None) -> dict:
    """config.json: the network, what its latents are, and how it was trained. Raises UserError."""
    channels, side, _ = manifest.latent_shape
    model = SiTConfig(
        **PRESETS[args.model], latent_size=side, channels=channels, num_classes=manifest.num_classes
    )
    data = data or alignment.data_of(manifest)
    kept = (
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
    return {
        "model_name": args.model,
        "model": asdict(model),
        "align": alignment.plan(args, model, data),
        "path_type": args.path_type,
        "prediction": args.prediction,
        "weighting": args.weighting,
        "cfg_prob": args.cfg_prob,
        "batch_size": args.batch_size,
        "ema_decay": args.ema_decay,
        "data": {key: getattr(manifest, key) for key in kept}
        | {"joined": manifest.encoding.get("joined")},
    }


def check_same_run(args: argparse.Namespace, folder: Path) -> dict:
    """The flags as args.json keeps them. Raises UserError listing what differs from those of a run begun."""
    now = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    now["data_dir"] = [str(path) for path in args.data_dir]
    path = folder / "args.json"
    if path.exists():
        try:
            then = json.loads(path.read_text())
        except ValueError:
            raise UserError(
                f"{path} is damaged: remove it to continue the run under the flags given now"
            ) from None
        changed = [
            key for key in now if key not in FREE_FLAGS and key in then and then[key] != now[key]
        ]
        if changed:
            what = "; ".join(
                f"{spelled(key)} was {shown(then[key])}, is {shown(now[key])}" for key in changed
            )
            raise UserError(
                f"{folder} was started with other flags: {what}. Choose another --exp-name, or go back to those flags"
            )
    return now


def shown(value: object) -> str:
    """As it would stand on the command line."""
    return " ".join(map(shown, value)) if isinstance(value, list) else str(value)


def check_same_data(args: argparse.Namespace, folder: Path, then: dict, now: dict) -> None:
    """Two config.json, of a run begun and of the flags given now. Raises UserError listing what differs of their data, or of
    what they align to.
    """
    changed = [
        key
        for key in then["data"]
        if key not in ("source", "vae") and then["data"][key] != now["data"][key]
    ]
    if changed:
        raise UserError(
            f"--data-dir {paths(args.data_dir)} is not the cache that {folder} was started on: {', '.join(changed)} differ"
        )
    for before, after in zip(then.get("align", []), now["align"]):
        changed = [key for key in after if key not in before or before[key] != after[key]]
        if changed:
            what = "; ".join(
                f"{key} was {shown(before.get(key))}, is {shown(after[key])}" for key in changed
            )
            raise UserError(
                f"{folder} was started with another {after['method']} to align to: {what}"
            )


def precision(flag: str) -> str:
    """What `auto` stands for here."""
    if flag == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a GPU; there is none here, use no or bf16")
    if flag != "auto":
        return flag
    return (
        "bf16"
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        else "no"
    )
