"""Settings of the alignment methods and their flags.

A shared setting, such as the block, takes one value for all methods or one per method. The settings
of a single method are the fields of its `Settings` dataclass (models/targets.py).
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from common import cli
from common.cli import UserError
from common.config import (
    add_flags,
    get_argparse_type,
    get_destination,
    get_flag_names,
    setting,
    to_plain,
)
from loss import ALIGN_LOSSES
from models.projector import HEADS
from models.sit import PRESETS
from models.targets import TARGETS

# Fields of AlignmentConfig that only have an effect if another field has this value.
CONDITIONS = {
    "projector_layers": ("projector_type", "mlp"),
    "projector_width": ("projector_type", "mlp"),
    "projector_kernel": ("projector_type", "conv"),
    "zscore_alpha": ("target_norm", "zscore"),
}

# Flags of method settings that are not called --METHOD-FIELD.
METHOD_FLAGS = {
    ("sra2", "target"): ("--align-target",),
    ("sra2", "normalize"): ("--align-normalize",),
    ("repa", "encoder"): ("--repa-encoder", "--enc-type"),
    ("repa", "weights"): ("--encoder-weights",),
    ("repa", "source"): ("--repa-from",),
    ("layersync", "target_block"): ("--layersync-target-block", "--gt-encoder-depth"),
}
TARGET_NORMS = ("none", "zscore")


def block_or_auto(text: str) -> int | None:
    """Parse a block number, or return None for "auto"."""
    return None if text == "auto" else cli.positive_int(text)


def odd_int(text: str) -> int:
    """Parse a positive odd number."""
    value = cli.positive_int(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} is even; pass an odd number")
    return value


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of one alignment method in a run.

    `default_alignment` fills in the paper's values for a model.
    """

    method: str
    block: int = setting(
        help="aligned block, counted from 1 (default: auto, the block used in the paper for the "
        "model; sra2: 2 for B, 8 for L and XL; repa: 4 for B, 8 for L and XL; sra: 8 for XL, "
        "otherwise a quarter of the depth; layersync: two sevenths of the depth; selftrans: half "
        "of the depth)",
        flags=("--align-depth", "--encoder-depth"),
        type=block_or_auto,
        metavar="K",
    )
    weight: float = setting(
        help="weight lambda of the alignment loss (default: 1 for sra2, 0.5 for repa and "
        "selftrans, 0.2 for layersync; for sra, 0.5 with the cosine loss and 0.2 with other "
        "losses)",
        flags=("--align-weight", "--proj-coeff"),
        type=cli.non_negative_float,
        metavar="X",
    )
    projector_type: str = setting(
        help="head that maps block tokens to target tokens; conv: one convolution over the token "
        "grid, as in iREPA; none: no head, for targets with as many channels as the block "
        "(default: mlp; layersync: none)",
        flags=("--projector-type", "--projection-layer-type"),
        choices=(*HEADS, "none"),
        metavar="NAME",
    )
    projector_layers: int = setting(
        help="number of linear layers of an mlp head (default: 5 for sra2, 3 for repa and "
        "selftrans, 2 for sra)",
        flags=("--projector-layers",),
        type=cli.positive_int,
        metavar="N",
    )
    projector_width: int = setting(
        help="hidden width of an mlp head (default: twice the width of the model for sra2 and sra, "
        "2048 for repa and selftrans)",
        flags=("--projector-width",),
        type=cli.positive_int,
        metavar="N",
    )
    projector_kernel: int = setting(
        3,
        help="kernel size of a conv head in tokens (default: 3)",
        flags=("--projector-kernel", "--proj-kwargs-kernel-size"),
        type=odd_int,
        metavar="N",
    )
    target_norm: str = setting(
        "none",
        help="normalization of the target tokens; zscore: standardize each channel over the tokens "
        "of an image, as in iREPA (default: none)",
        flags=("--target-norm", "--spnorm-method"),
        choices=TARGET_NORMS,
        metavar="NAME",
    )
    zscore_alpha: float = setting(
        0.6,
        help="fraction of the mean that --target-norm zscore subtracts (default: 0.6)",
        flags=("--zscore-alpha",),
        type=cli.non_negative_float,
        metavar="X",
    )
    loss: str = setting(
        "cosine",
        help=f"alignment loss: {', '.join(ALIGN_LOSSES)} (default: cosine, for selftrans l2; "
        "smooth_l1 is best in the SRA 2 paper)",
        flags=("--align-loss",),
        choices=ALIGN_LOSSES,
        metavar="NAME",
    )
    beta: float = setting(
        0.05,
        help="transition of smooth_l1 from quadratic to linear (default: 0.05)",
        flags=("--align-beta",),
        type=cli.positive_float,
        metavar="X",
    )
    t_range: tuple[float, float] = setting(
        (0.0, 1.0),
        help="lowest and highest aligned timestep; 0 is data, 1 is noise (default: 0 1, for "
        "selftrans 0.4 0.7)",
        flags=("--align-t-range",),
        type=cli.fraction,
        metavar="LO HI",
    )
    stop_step: int = setting(
        0,
        help="number of initial steps with alignment; 0 applies it in all steps (default: 0)",
        flags=("--align-stop-step",),
        type=cli.non_negative_int,
        metavar="N",
    )
    settings: Any = None  # an instance of the method's Settings


_SHARED_FIELDS = [field for field in fields(AlignmentConfig) if "help" in field.metadata]


def default_alignment(method: str, model: str, **values: Any) -> AlignmentConfig:
    """Return the settings of a method for a model.

    Args:
        method: A key of TARGETS.
        model: A key of PRESETS.
        values: Fields that differ from the defaults. None selects the default.
    """
    preset = PRESETS[model]
    target = TARGETS[method]
    defaults = target.defaults(model, preset["depth"], preset["width"], values.get("loss"))
    chosen = {key: value for key, value in values.items() if value is not None}
    return AlignmentConfig(
        **{
            "method": method,
            "block": defaults.block,
            "weight": defaults.weight,
            "projector_type": target.head or "none",
            "projector_layers": defaults.layers,
            "projector_width": defaults.hidden,
            "loss": defaults.loss,
            "t_range": defaults.t_range,
            "settings": target.Settings(),
        }
        | chosen
    )


def add_alignment_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the alignment methods to a parser."""
    group = parser.add_argument_group(
        "alignment (flags that take several values: one for all methods, or one per method)"
    )
    group.add_argument(
        "--align",
        choices=(*TARGETS, "none"),
        nargs="+",
        default=["sra2"],
        metavar="METHOD",
        help=f"alignment methods, one or several of {', '.join(TARGETS)}; none trains vanilla SiT",
    )
    add_flags(group, AlignmentConfig, nargs="+", default=None, required=False)
    for method, field in _method_fields():
        help_text = f"{method}: {field.metadata.get('help', field.name)}"
        if field.default is not None:
            help_text += f" (default: {field.default})"
        kind = get_argparse_type(field)
        type_option = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        options = {**type_option, **field.metadata, "help": help_text}
        group.add_argument(*method_flags(method, field.name), **options)


def method_flags(method: str, field: str) -> tuple[str, ...]:
    """Return the names of the flag of a method's setting, the main one first."""
    generated = f"--{method}-{field.replace('_', '-')}"
    return METHOD_FLAGS.get((method, field), (generated,))


def method_destinations() -> set[str]:
    """Return argparse's names of the flags that belong to a single method."""
    return {_destination(method, field.name) for method, field in _method_fields()}


def resolve_alignments(args: argparse.Namespace, model: str) -> tuple[AlignmentConfig, ...]:
    """Return the settings of each method that the flags select.

    Raises:
        UserError: The flags contradict each other.
    """
    methods = [] if args.align == ["none"] else args.align
    _check_methods(args, methods)
    columns = {
        field.name: _split_per_method(field, getattr(args, get_destination(field)), methods)
        for field in _SHARED_FIELDS
    }
    alignments = []
    for i, method in enumerate(methods):
        shared = {name: column[i] for name, column in columns.items()}
        alignment = default_alignment(
            method, model, **shared, settings=_read_method_settings(args, method)
        )
        _check_alignment(alignment, model)
        alignments.append(alignment)
    _check_conditions(args, alignments)
    return tuple(alignments)


def record_alignments(alignments: tuple[AlignmentConfig, ...]) -> dict:
    """Return the alignment's part of args.json: lists with one value per method."""
    record: dict[str, Any] = {"align": [alignment.method for alignment in alignments] or ["none"]}
    for field in _SHARED_FIELDS:
        record[get_destination(field)] = [
            getattr(alignment, field.name) for alignment in alignments
        ]
    settings_by_method = {alignment.method: alignment.settings for alignment in alignments}
    for method, field in _method_fields():
        settings = settings_by_method.get(method)
        record[_destination(method, field.name)] = getattr(settings, field.name, None)
    return to_plain(record)


def _method_fields() -> Iterator[tuple[str, dataclasses.Field]]:
    for method, target in TARGETS.items():
        for field in fields(target.Settings):
            yield method, field


def _destination(method: str, field: str) -> str:
    return method_flags(method, field)[0].removeprefix("--").replace("-", "_")


def _read_method_settings(args: argparse.Namespace, method: str) -> Any:
    kind = TARGETS[method].Settings
    values = {field.name: getattr(args, _destination(method, field.name)) for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if value is not None})


def _check_methods(args: argparse.Namespace, methods: list[str]) -> None:
    selection = f"--align {' '.join(args.align)}"
    if "none" in methods:
        raise UserError(f"{selection}: none cannot be combined with other methods; remove it")
    if len(set(methods)) < len(methods):
        raise UserError(f"{selection} repeats a method: pass each method once")
    for method, field in _method_fields():
        if method not in methods and getattr(args, _destination(method, field.name)) is not None:
            main_flag, *aliases = method_flags(method, field.name)
            flag = f"{main_flag} ({', '.join(aliases)})" if aliases else main_flag
            raise UserError(
                f"{flag} needs --align {method}, but --align is {' '.join(args.align)}: change "
                "--align, or remove the flag"
            )
    for field in _SHARED_FIELDS:
        if not methods and getattr(args, get_destination(field)) is not None:
            flag = get_flag_names(field)[0]
            raise UserError(f"{flag} has no effect with --align none: remove one of them")


def _check_alignment(alignment: AlignmentConfig, model: str) -> None:
    depth = PRESETS[model]["depth"]
    if alignment.block > depth:
        raise UserError(f"--align-depth {alignment.block}: {model} has blocks 1 to {depth}")
    low, high = alignment.t_range
    if low > high:
        raise UserError(f"--align-t-range {low} {high}: LO must not exceed HI")


def _check_conditions(args: argparse.Namespace, alignments: list[AlignmentConfig]) -> None:
    """Raise UserError if a flag was passed that has no effect on any of the methods."""
    shared_fields = {field.name: field for field in _SHARED_FIELDS}
    for name, (condition, value) in CONDITIONS.items():
        field = shared_fields[name]
        was_passed = getattr(args, get_destination(field)) is not None
        has_effect = any(getattr(alignment, condition) == value for alignment in alignments)
        if was_passed and not has_effect:
            needed = f"{get_flag_names(shared_fields[condition])[0]} {value}"
            raise UserError(
                f"{get_flag_names(field)[0]} has no effect without {needed}: pass both, or remove "
                "it"
            )


def _split_per_method(field: dataclasses.Field, passed: list | None, methods: list[str]) -> list:
    """Return one value per method; None where the flag was not passed."""
    if passed is None:
        return [None] * len(methods)
    size = 2 if field.name == "t_range" else 1
    if len(passed) not in (size, size * len(methods)):
        expected = "1 value" if size == 1 else "2 values"
        if len(methods) > 1:
            expected += (
                f" for all methods, or {size * len(methods)} for --align {' '.join(methods)}"
            )
        flag = f"{get_flag_names(field)[0]} {' '.join(map(str, passed))}"
        raise UserError(f"{flag}: pass {expected}, not {len(passed)}")
    values = passed
    if size == 2:
        values = list(zip(passed[::2], passed[1::2]))
    return values * len(methods) if len(values) == 1 else values
