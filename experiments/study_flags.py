"""Define and parse the command-line flags that all studies share."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from models.sit import PRESETS

# Flags of train.py that the study sets.
RESERVED_FLAGS = (
    "--data-dir",
    "--model",
    "--max-train-steps",
    "--exp-name",
    "--output-dir",
    "--seed",
    "--encoder-depth",
    "--proj-coeff",
    "--eval-every",
    "--checkpointing-steps",
)


def add_common_flags(parser: argparse.ArgumentParser, defaults: dict[str, str]) -> None:
    """Add the flags that all commands for studies share.

    Args:
        parser: The parser of the study.
        defaults: Descriptions of the default values, by flag, for the help texts.
    """
    add = partial(_add_flag, parser, defaults)
    plot_help = "existing result from which to regenerate the tables and the figure"
    add("--plot", plot_help, type=Path, metavar="FILE.json")
    gather_help = "write the measurements that exist so far, without running anything"
    add("--gather", gather_help, action="store_true")
    add("--print", "print the commands instead of running them", action="store_true")
    add("--data-dir", "latent cache, or folder that contains the caches", type=Path)
    add("--seeds", "seeds; every configuration runs with every seed", type=cli.seed, nargs="+")
    add("--jobs", "number of simultaneous runs", type=cli.positive_int)
    gpus_help = "number of GPUs per machine of the cluster, for --scale imagenet"
    add("--gpus", gpus_help, type=cli.positive_int, default=8)
    add("--output-dir", "parent folder of the runs", type=Path)
    out_help = "file for the result; the tables and the figure are written next to it"
    add("--out", out_help, type=Path, metavar="FILE.json")


def add_study_flags(parser: argparse.ArgumentParser, defaults: dict[str, str]) -> None:
    """Add the flags of studies whose runs differ only in the method (see `add_common_flags`)."""
    add_common_flags(parser, defaults)
    add = partial(_add_flag, parser, defaults)
    reuse_help = (
        "earlier result, whose finished runs with the same name, seed and flags are not repeated"
    )
    add("--reuse", reuse_help, type=Path, metavar="FILE.json")
    add("--model", "preset of models/sit.py", choices=PRESETS, metavar="NAME")
    add("--max-train-steps", "training steps per run", type=cli.positive_int)
    evaluations_help = (
        "evaluations per run, evenly spaced; the last evaluation follows the last step"
    )
    add("--evaluations", evaluations_help, type=cli.positive_int)


def _add_flag(
    parser: argparse.ArgumentParser,
    defaults: dict[str, str],
    flag: str,
    text: str,
    **options: Any,
) -> None:
    default = f" (default: {defaults[flag]})" if flag in defaults else ""
    parser.add_argument(flag, help=text + default, **options)


def parse_study_flags(
    parser: argparse.ArgumentParser, argv: list[str], *reserved_prefixes: str
) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line at "--" into the flags of the study and the flags of train.py.

    Args:
        parser: The parser of the study.
        argv: The command line.
        reserved_prefixes: Prefixes of flags of train.py that the user must not pass, in addition
            to `RESERVED_FLAGS`.

    Raises:
        UserError: If a flag of the study is invalid, or if the user passed a flag of train.py that
            is set by the study.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    train_flags = argv[end + 1 :]
    for argument in train_flags:
        if argument.split("=")[0] in RESERVED_FLAGS or argument.startswith(reserved_prefixes):
            raise UserError(f"-- {argument}: this flag is set by the study; remove it")
    return args, train_flags


def set_defaults(args: argparse.Namespace, **defaults: Any) -> None:
    """Set the unset flags of a study to their defaults, and check the flags.

    Raises:
        UserError: If a seed occurs twice, or if --out does not end in .json.
    """
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: pass each seed only once")
    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
