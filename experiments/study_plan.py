"""What a study of convergence runs: its methods, its scales, and the flags that make a run of them.

The block that each method aligns is a knob: it is chosen on other seeds than those that are reported.
"""

import argparse
import math
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from common.cli import UserError
from experiments import ablate
from experiments.cells import Cell
from experiments.results import last, load
from experiments.study_data import ENCODER, IMAGES
from models.sit import PRESETS


class Method(NamedTuple):
    """One of those compared. A name of METHODS in braces in its flags is the block that --tune chose for that method."""

    label: str
    flags: str

    @property
    def knobs(self) -> set[str]:
        """The names whose blocks it needs: its own, if it is one that is tuned."""
        return {field for _, field, _, _ in Formatter().parse(self.flags) if field} - {"encoder"}


METHODS = {
    "vanilla": Method("vanilla SiT", "--align none"),
    "sra2-cosine": Method("SRA 2, cosine", "--align sra2 --align-depth {sra2-cosine}"),
    "sra2-smooth_l1": Method(
        "SRA 2, smooth L1", "--align sra2 --align-loss smooth_l1 --align-depth {sra2-smooth_l1}"
    ),
    "sra": Method("SRA", "--align sra --align-depth {sra}"),
    "repa": Method("REPA", "--align repa --align-depth {repa} {encoder}"),
    "sra2+repa": Method(
        "SRA 2 and REPA", "--align sra2 repa --align-depth {sra2-cosine} {repa} {encoder}"
    ),
}


class Scale(NamedTuple):
    """How large a study is."""

    model: str
    steps: int
    evaluations: int  # evenly on the way, the last at the end
    seeds: tuple[int, ...]
    blocks: tuple[int, ...]  # that --tune tries
    tune_seeds: tuple[int, ...]
    tune_steps: int
    jobs: int | None  # at a time; None is one a core
    timing: tuple[int, int]  # rounds, and updates of a round
    log_every: int
    flags: str


SAME = (
    f"--eval-features fashion --eval-mode ode --eval-heun --eval-samples 5000 --sampling-steps 0 --keep-last 1 "
    f"--eval-reference {IMAGES}"
)
SCALES = {
    "laptop": Scale(
        "SiT-Ti/2",
        600,
        4,
        (10, 11, 12, 13, 14),
        (2, 3, 4),
        (0,),
        400,
        None,
        (10, 1),
        20,
        f"--batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 --num-workers 0 --eval-num-steps 6 "
        f"--eval-batch-size 100 {SAME}",
    ),
    "gpu": Scale(
        "SiT-S/2",
        600,
        4,
        (10, 11, 12, 13, 14),
        (2, 4, 6),
        (0,),
        600,
        15,
        (10, 20),
        50,
        f"--batch-size 256 --learning-rate 5e-4 --ema-decay 0.995 --num-workers 1 --eval-num-steps 6 "
        f"--eval-batch-size 500 {SAME}",
    ),
    "imagenet": Scale(
        "SiT-B/2",
        400_000,
        8,
        (0, 1, 2, 3, 4),
        (),
        (),
        0,
        None,
        (0, 0),
        100,
        "--batch-size 256 --keep-last 1 --eval-samples 50000 --eval-batch-size 128 "
        "--eval-reference VIRTUAL_imagenet256_labeled.npz",
    ),
}
OWN = {*ablate.OWN, "--eval-latents"}  # flags of train.py that are not for those who start a study


def caches(args: argparse.Namespace) -> dict[str, Path]:
    """Of the images that train, and of those that are held out."""
    if args.scale == "imagenet":
        return {
            "train": args.data_dir,
            "held-out": args.data_dir.with_name(f"{args.data_dir.name}-val"),
        }
    return {name: args.data_dir / name for name in ("train", "held-out")}


def shared(args: argparse.Namespace, steps: int, evaluations: int) -> list[str]:
    """What all runs have in common."""
    scale = SCALES[args.scale]
    every = math.ceil(steps / evaluations)
    saved = (
        steps if args.scale == "gpu" else every
    )  # a run there takes a minute, and its checkpoint half a gigabyte
    train, held_out = caches(args).values()
    flags = ["--data-dir", train, "--eval-latents", held_out, "--model", args.model]
    flags += [
        "--max-train-steps",
        steps,
        "--eval-every",
        every,
        "--checkpointing-steps",
        saved,
        *scale.flags.split(),
    ]
    flags += ["--log-every", min(steps, scale.log_every)]
    return [*map(str, flags), *args.more]


def flags_of(name: str, knobs: dict[str, int], args: argparse.Namespace) -> list[str]:
    """A method's own flags. REPA's head, 2048 wide, would be larger than a small network: as wide as SRA 2's there."""
    width = PRESETS[args.model]["width"]
    knobs = dict.fromkeys(METHODS, "auto") | knobs
    repa = (
        ""
        if args.scale == "imagenet"
        else f"--repa-encoder {ENCODER} --projector-width {2 * width}"
    )
    return METHODS[name].flags.format(**knobs, encoder=repa).split()


def read_knobs(args: argparse.Namespace) -> dict[str, int]:
    """The blocks chosen by --tune; on ImageNet they are the papers'. Raises UserError."""
    if args.scale == "imagenet":
        return {}
    found = load(args.knobs, "convergence-knobs")
    for key in ("scale", "model"):
        if found[key] != getattr(args, key):
            raise UserError(
                f"--knobs {args.knobs} is of --{key} {found[key]}: run --tune at this one"
            )
    missing = set().union(*(METHODS[name].knobs for name in args.methods)) - {*found["knobs"]}
    if missing:
        raise UserError(
            f"--knobs {args.knobs} has no block for {' '.join(sorted(missing))}: run --tune with it"
        )
    seen = sorted({*args.seeds} & {run["seed"] for run in found["runs"]})
    if seen:
        raise UserError(
            f"--seeds {' '.join(map(str, seen))}: --knobs {args.knobs} was chosen on it; report on others"
        )
    return found["knobs"]


def candidates(args: argparse.Namespace, seeds: list[int]) -> list[Cell]:
    """The runs of --tune: every method at every block that is tried."""
    common = shared(args, args.max_train_steps, 1)
    cells = []
    for seed in seeds:
        for name in args.methods:
            for block in SCALES[args.scale].blocks if METHODS[name].knobs == {name} else ():
                knobs = dict.fromkeys(METHODS, block)
                cells.append(
                    Cell(f"{name}-block{block}", seed, (*common, *flags_of(name, knobs, args)))
                )
    return cells


def choose(runs: list[dict], metric: str) -> dict[str, int]:
    """Of each method the block with the lowest metric at the end, averaged over seeds."""
    at_end, means = last(runs, metric), {}
    for run_name, values in at_end.items():
        name, _, block = run_name.rpartition("-block")
        means.setdefault(name, {})[int(block)] = sum(values.values()) / len(values)
    return {name: min(sorted(found), key=found.get) for name, found in means.items()}


def of_study(args: argparse.Namespace) -> tuple[dict[str, int], list[Cell]]:
    """The blocks, and all runs. Raises UserError."""
    knobs = read_knobs(args)
    common = shared(args, args.max_train_steps, args.evaluations)
    cells = [
        Cell(name, seed, (*common, *flags_of(name, knobs, args)))
        for seed in args.seeds
        for name in args.methods
    ]
    return knobs, cells
