"""Which methods of alignment a run has, and how: their flags, and what these amount to."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch import Tensor

from checkpointing.storage import CheckpointError, read_config
from common import cli
from common.cli import UserError
from interpolant import INTERPOLANTS, interpolate
from latents.cache import Manifest
from loss import ALIGN_LOSSES
from models.autoencoder import LatentScale
from models.flops import backbone_flops, head_flops
from models.projector import AlignedSiT
from models.sit import PRESETS, SiT, SiTConfig
from models.targets import TARGETS, Data, Parts, Target, TargetError

SHARED_FLAGS = (
    "align_depth",
    "align_weight",
    "align_loss",
    "align_beta",
    "align_t_range",
    "align_stop_step",
    "projector_layers",
    "projector_width",
)


SHARED = (
    "method",
    "block",
    "weight",
    "loss",
    "beta",
    "t_range",
    "stop_step",
    "head",
)  # of an entry in config.json


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that methods share, and those of each."""
    add = parser.add_argument_group(
        "alignment (where several values may stand: one for all methods, or one each)"
    ).add_argument
    add(
        "--align",
        choices=(*TARGETS, "none"),
        nargs="+",
        default=["sra2"],
        metavar="METHOD",
        help=f"one or several of {', '.join(TARGETS)}; none is vanilla SiT",
    )
    add(
        "--align-depth",
        "--encoder-depth",
        type=block,
        nargs="+",
        metavar="K",
        help="block aligned, counted from 1 (default: auto, the paper's for the model; sra2: B 2, L 8, XL 8; repa: 8)",
    )
    add(
        "--align-weight",
        "--proj-coeff",
        type=cli.non_negative_float,
        nargs="+",
        metavar="X",
        help="lambda of the alignment loss (default: sra2 1, repa 0.5, sra 0.5, or 0.2 if not cosine)",
    )
    add(
        "--align-loss",
        choices=ALIGN_LOSSES,
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(ALIGN_LOSSES)} (default: cosine; sra2's paper has smooth_l1 as its best)",
    )
    add(
        "--align-beta",
        type=cli.positive_float,
        nargs="+",
        metavar="X",
        help="where smooth_l1 turns from quadratic to linear (default: 0.05)",
    )
    add(
        "--align-t-range",
        type=cli.fraction,
        nargs="+",
        metavar="LO HI",
        help="timesteps aligned; 0 is data, 1 is noise (default: 0 1)",
    )
    add(
        "--align-stop-step",
        type=cli.non_negative_int,
        nargs="+",
        metavar="N",
        help="align in the first N steps only; 0 in all (default: 0)",
    )
    add(
        "--projector-layers",
        type=cli.positive_int,
        nargs="+",
        metavar="N",
        help="linear layers of the head (default: sra2 5, repa 3, sra 2)",
    )
    add(
        "--projector-width",
        type=cli.positive_int,
        nargs="+",
        metavar="N",
        help="hidden width of the head (default: sra2 and sra twice the model's, repa 2048)",
    )
    for target in TARGETS.values():
        target.add_flags(add)


def check(args: argparse.Namespace) -> None:
    """Puts in the place of each flag that methods share a list of what it is for each of them. Raises UserError."""
    methods = [] if args.align == ["none"] else args.align
    if "none" in methods:
        raise UserError(f"--align {' '.join(methods)}: none goes with no other")
    if len(set(methods)) < len(methods):
        raise UserError(f"--align {' '.join(methods)}: each only once")
    for name, target in TARGETS.items():
        given = [flag for flag in target.flags if getattr(args, flag) is not None]
        if given and name not in methods:
            raise UserError(
                f"{spelled(given[0])} goes with --align {name}, and --align is {' '.join(args.align)}"
            )
    given = [flag for flag in SHARED_FLAGS if getattr(args, flag) is not None]
    if given and not methods:
        raise UserError(f"{spelled(given[0])} says how to align, and --align none does not")

    preset = PRESETS[args.model]
    losses = for_each(args, "align_loss", methods, [["cosine"]] * len(methods))
    usual = [
        TARGETS[name].defaults(args.model, preset["depth"], preset["width"], loss)
        for name, [loss] in zip(methods, losses)
    ]
    values = {
        "align_depth": [[each.block] for each in usual],
        "align_weight": [[each.weight] for each in usual],
        "align_loss": [["cosine"] for _ in usual],
        "align_beta": [[0.05] for _ in usual],
        "align_t_range": [[0.0, 1.0] for _ in usual],
        "align_stop_step": [[0] for _ in usual],
        "projector_layers": [[each.layers] for each in usual],
        "projector_width": [[each.hidden] for each in usual],
    }
    for flag, default in values.items():
        found = for_each(args, flag, methods, default)
        found = [
            usual if value == [None] else value for value, usual in zip(found, default)
        ]  # auto
        setattr(args, flag, [value if len(value) > 1 else value[0] for value in found])
    for k in args.align_depth:
        if k > preset["depth"]:
            raise UserError(f"--align-depth {k}: {args.model} has blocks 1 to {preset['depth']}")
    for low, high in args.align_t_range:
        if low > high:
            raise UserError(f"--align-t-range {low} {high}: LO lies above HI")


def for_each(
    args: argparse.Namespace, flag: str, methods: list[str], default: list[list]
) -> list[list]:
    """What a flag says, cut into a piece for each method. Raises UserError."""
    given, size = getattr(args, flag), len(default[0]) if default else 1
    if given is None or not methods:
        return default
    if len(given) not in (size, size * len(methods)):
        each = (
            f", or {size * len(methods)} for each of --align {' '.join(methods)}"
            if len(methods) > 1
            else ""
        )
        wanted = f"{size} value{'s' * (size > 1)}{' for all methods' if each else ''}{each}"
        raise UserError(
            f"{spelled(flag)} {' '.join(map(str, given))}: {len(given)} given, it takes {wanted}"
        )
    pieces = [given[i : i + size] for i in range(0, len(given), size)]
    return pieces * len(methods) if len(pieces) == 1 else pieces


def spelled(flag: str) -> str:
    """As on the command line."""
    return f"--{flag.replace('_', '-')}"


def block(text: str) -> int | None:
    """An argparse type: the number of a block, or auto, which is None."""
    return None if text == "auto" else cli.positive_int(text)


def data_of(manifest: Manifest, features: dict[str, dict] | None = None) -> Data:
    """What methods of alignment may ask of a cache; `features` are those that it holds of encoders."""
    return Data(
        manifest.resolution,
        LatentScale(manifest.scale, manifest.shift),
        manifest.mean,
        manifest.std,
        manifest.images,
        features,
    )


def plan(args: argparse.Namespace, config: SiTConfig, data: Data) -> list[dict]:
    """config.json's "align": an entry for each method. Raises UserError."""
    found = []
    for i, method in enumerate([] if args.align == ["none"] else args.align):
        try:
            own = TARGETS[method].plan(args, config, data)
        except TargetError as error:
            raise UserError(str(error)) from None
        head = {"width": config.width, "out": own.pop("out"), "layers": args.projector_layers[i]}
        found.append(
            {
                "method": method,
                "block": args.align_depth[i],
                "weight": args.align_weight[i],
                "loss": args.align_loss[i],
                "beta": args.align_beta[i],
                "t_range": args.align_t_range[i],
                "stop_step": args.align_stop_step[i],
                "head": head | {"hidden": args.projector_width[i]},
                **own,
            }
        )
    return found


def settle(args: argparse.Namespace, checkpoint: Path) -> None:
    """What was left open when the run of this checkpoint began stays what it became then. (One that is damaged is told of
    where it is loaded.)
    """
    with suppress(CheckpointError):
        for entry in read_config(checkpoint).get("align", []):
            TARGETS[entry["method"]].settle(args, entry)


def load(
    args: argparse.Namespace,
    config: dict,
    data: Data,
    ema: SiT,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, Target]:
    """What each method aligns to; what identifies it is added to its entry in config. Raises UserError."""
    path, network = INTERPOLANTS[args.path_type], SiTConfig(**config["model"])

    def noised(latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(path, latent, noise, t)[0]

    parts, targets = Parts(device, ema, noised, autocast, args.compile), {}
    for entry in config["align"]:
        try:
            targets[entry["method"]] = TARGETS[entry["method"]](entry, args, network, data, parts)
        except TargetError as error:
            raise UserError(str(error)) from None
        entry |= targets[entry["method"]].identity
    return targets


def extra(targets: dict[str, Target]) -> str | None:
    """What of the cache the targets need beside latents. Raises UserError if they need two things."""
    needed = {target.extra for target in targets.values()} - {None}
    if len(needed) > 1:
        raise UserError(
            f"--align {' '.join(targets)}: they need {' and '.join(sorted(needed))} of the cache, which gives one"
        )
    return needed.pop() if needed else None


def describe(entry: dict, model: AlignedSiT, data: Data) -> str:
    """A method in one line: what of the network it is put on, and what it costs."""
    config, head = (
        model.backbone.config,
        sum(p.numel() for p in model.heads[entry["method"]].parameters()),
    )
    size, body = sum(p.numel() for p in model.backbone.parameters()), backbone_flops(config)
    outside, flops = TARGETS[entry["method"]].cost(entry, config, data)
    own = "".join(
        f"{key.replace('_', ' ')} {value}, "
        for key, value in entry.items()
        if key not in SHARED and key != "fingerprint"
    )
    line = (
        f"{entry['method']}: {own}block {entry['block']}, {entry['loss']}, weight {entry['weight']:g}, a head of "
        f"{head / 1e6:.1f}M parameters (+{head / size:.1%}), +{head_flops(config, entry['head']) / body:.1%} FLOPs both ways"
    )
    if flops:
        line += f"; for its target {outside / 1e6:.1f}M parameters and +{flops / body:.1%} FLOPs forward"
    return line
