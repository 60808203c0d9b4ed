"""Run the ablations of the paper (arXiv:2601.17830, table 1), which vary one setting at a time.

    python -m experiments.ablate --axis depth --seeds 0 1 2
    python -m experiments.ablate --scale imagenet --print
    python -m experiments.ablate --axis loss -- --batch-size 128 --eval-samples 5000

All other settings have the best values of the paper. The result is NAME.json, with a table in
NAME.md and a figure in NAME.png; --plot NAME.json recreates the table and the figure without
running anything. Rerun the same command to resume an interrupted study. A run that several axes
share is executed once. Flags after -- are passed to every run of train.py.
"""

import argparse
import math
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.cli import UserError
from common.machine import count_available_cores
from evaluations.compare import frechet_name
from experiments.cells import Cell, check_cells, open_cache
from experiments.panels import BASELINE, draw_figure, format_table
from experiments.results import (
    collect_final_values,
    collect_runs,
    load_result,
    save_result,
    write_report,
)
from experiments.scheduler import check_no_failures, list_visible_gpus, run_cells
from experiments.study_flags import add_study_flags, parse_study_flags, set_defaults
from models.sit import PRESETS, default_align_block

PAPER_VANILLA_FID = 33.02
AXIS_TITLES = {
    "depth": "aligned block",
    "t-range": "timesteps aligned",
    "loss": "loss",
    "weight": "weight of the loss",
    "layers": "linear layers of the head",
    "target": "target",
    "schedule": "steps aligned",
}
PAPER_AXES = ("depth", "t-range", "loss", "weight", "layers")  # the axes of table 1
DEMO_FLAGS = (
    "--batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 --sampling-steps 0 --num-workers 0 "
    "--keep-last 1 --eval-samples 1000 --eval-reference assets/fashion-mnist/images.zip "
    "--eval-features fashion --eval-mode ode --eval-num-steps 20 --eval-batch-size 100"
)


class AxisValue(NamedTuple):
    """A value of an axis: flags of train.py, and the FID that the paper reports for SiT-B/2."""

    flags: str
    paper_fid: float | None = None


def list_axis_values(model: str, steps: int, demo: bool) -> dict[str, dict[str, AxisValue]]:
    """Return the values of each axis by their labels.

    Args:
        model: A preset of models/sit.py. The paper's FIDs per aligned block apply only to
            models with 12 blocks.
        steps: Number of training steps.
        demo: Whether to include weights that the paper does not report.
    """
    depth = PRESETS[model]["depth"]
    paper_blocks = {round(depth * block / 12) for block in (2, 3, 6, 8)}
    blocks = {default_align_block(model), *paper_blocks}
    if depth <= 8:
        blocks = set(range(1, depth + 1))
    fid_of_block = {2: 28.89, 6: 32.44, 8: 36.20} if depth == 12 else {}
    fid_of_weight = {1.0: 28.89, 0.1: 30.10}
    weights = (0.1, 0.3, 1.0, 3.0) if demo else (1.0, 0.1)
    return {
        "depth": {
            str(block): AxisValue(f"--align-depth {block}", fid_of_block.get(block))
            for block in sorted(blocks)
        },
        "t-range": {
            "[0, 1]": AxisValue("--align-t-range 0 1", 28.89),
            "[0, 0.5]": AxisValue("--align-t-range 0 0.5", 30.04),
            "[0.5, 1]": AxisValue("--align-t-range 0.5 1"),
        },
        "loss": {
            "smooth_l1": AxisValue("--align-loss smooth_l1 --align-beta 0.05", 28.89),
            "cosine": AxisValue("--align-loss cosine", 29.30),
            "l2": AxisValue("--align-loss l2", 29.40),
            "l1": AxisValue("--align-loss l1", 29.50),
        },
        "weight": {
            f"{weight:g}": AxisValue(f"--align-weight {weight}", fid_of_weight.get(weight))
            for weight in weights
        },
        "layers": {
            "5": AxisValue("--projector-layers 5", 28.89),
            "2": AxisValue("--projector-layers 2", 31.32),
        },
        "target": {
            "mean": AxisValue("--align-target mean"),
            "sample": AxisValue("--align-target sample"),
            "mean, normalised": AxisValue("--align-target mean --align-normalize channel"),
        },
        "schedule": {
            "all": AxisValue("--align-stop-step 0"),
            "first half": AxisValue(f"--align-stop-step {max(1, steps // 2)}"),
            "first quarter": AxisValue(f"--align-stop-step {max(1, steps // 4)}"),
        },
    }


def list_best_labels(model: str) -> dict[str, str]:
    """Return the label of the paper's best value on each axis."""
    return {
        "depth": str(default_align_block(model)),
        "t-range": "[0, 1]",
        "loss": "smooth_l1",
        "weight": "1",
        "layers": "5",
        "target": "mean",
        "schedule": "all",
    }


def build_grid(
    axes: list[str], model: str, steps: int, demo: bool
) -> tuple[dict[str, str], list[dict]]:
    """Return the runs of a study.

    Args:
        axes: The axes to vary, keys of `AXIS_TITLES`.
        model: A preset of models/sit.py.
        steps: Number of training steps.
        demo: Whether to include values that the paper does not report.

    Returns:
        The alignment flags by the name of the run (a run that several axes share occurs once), and
        the "axes" entry of the result.
    """
    best = list_best_labels(model)
    values = list_axis_values(model, steps, demo)
    runs = {BASELINE: "--align none"}
    panels = []
    for axis in axes:
        entries = []
        for label, value in values[axis].items():
            is_best = label == best[axis]
            slug = re.sub("[^0-9a-z._]+", "-", label).strip("-")
            name = "sra2" if is_best else f"{axis}-{slug}"
            # For axes that the paper does not vary, the best values are the defaults of train.py.
            flags = [
                values[axis_name][selected_label].flags
                for axis_name, selected_label in (best | {axis: label}).items()
                if axis_name in PAPER_AXES or selected_label != best[axis_name]
            ]
            runs[name] = " ".join(["--align sra2", *flags])
            entries.append(
                {"label": label, "run": name, "usual": is_best, "paper": value.paper_fid}
            )
        paper_vanilla = PAPER_VANILLA_FID if axis in PAPER_AXES else None
        panels.append(
            {"name": axis, "title": AXIS_TITLES[axis], "paper": paper_vanilla, "values": entries}
        )
    return runs, panels


def make_demo_flags(steps: int, evaluations: int) -> list[str]:
    """Return the flags that all runs on the bundled data share, as in the README."""
    interval = math.ceil(steps / evaluations)
    schedule = f"--max-train-steps {steps} --checkpointing-steps {interval} --eval-every {interval}"
    return f"{schedule} {DEMO_FLAGS} --log-every {min(20, steps)}".split()


def list_commands(cell: Cell, folder: Path, gpus: int) -> list[str]:
    """Return the commands that train and evaluate a network on a cluster.

    The commands draw 50,000 samples with 250 SDE steps and no guidance, and compute their FID.
    """
    name = cell.run_name
    checkpoint = shlex.quote(str(folder / name))
    torchrun = f"torchrun --nproc_per_node {gpus}"
    return [
        cell.make_command(folder, gpus),
        f"{torchrun} sample_ddp.py --ckpt {checkpoint} --num-fid-samples 50000 --mode sde "
        f"--num-steps 250 --name {name}",
        f"{torchrun} -m evaluations.evaluate samples/{name}.npz "
        "--reference VIRTUAL_imagenet256_labeled.npz",
    ]


def make_parser() -> cli.Parser:
    """Return the parser for the flags of the study."""
    parser = cli.Parser(
        __doc__, "python -m experiments.ablate", "--axis NAME [NAME ...]", "[-- FLAGS OF TRAIN.PY]"
    )
    names = ", ".join(AXIS_TITLES)
    parser.add_argument(
        "--axis",
        nargs="+",
        choices=AXIS_TITLES,
        metavar="NAME",
        help=f"axes to vary: {names} (default with --scale imagenet: the first five)",
    )
    parser.add_argument(
        "--scale",
        choices=("demo", "imagenet"),
        default="demo",
        help="data set: demo for the bundled data, or imagenet, which requires --print",
    )
    defaults = {
        "--data-dir": "data/fashion-mnist; imagenet: data/imagenet256",
        "--model": "SiT-Ti/2; imagenet: SiT-B/2",
        "--seeds": "0 1 2; imagenet: 0",
        "--max-train-steps": "400; imagenet: 400000",
        "--evaluations": "1",
        "--jobs": "one per GPU, or one per CPU core",
        "--output-dir": "exps/ablate; imagenet: exps/ablate-imagenet",
        "--out": "OUTPUT_DIR/AXES.json",
    }
    add_study_flags(parser, defaults)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of the study, and the flags that are passed to every run of train.py.

    Raises:
        UserError: If a flag is invalid or incompatible with another flag.
    """
    args, train_flags = parse_study_flags(make_parser(), argv, "--align", "--projector")
    imagenet = args.scale == "imagenet"
    if imagenet and not args.print:
        raise UserError(
            "--scale imagenet requires a cluster; add --print and run the printed commands there"
        )
    if args.plot:
        args.axis = args.axis or []
        return args, train_flags
    if not args.axis and not imagenet:
        raise UserError(f"--axis is missing; pass one or more of {', '.join(AXIS_TITLES)}")
    args.axis = list(dict.fromkeys(args.axis or PAPER_AXES))
    output_dir = args.output_dir or Path("exps/ablate-imagenet" if imagenet else "exps/ablate")
    set_defaults(
        args,
        data_dir=Path("data/imagenet256" if imagenet else "data/fashion-mnist"),
        model="SiT-B/2" if imagenet else "SiT-Ti/2",
        seeds=[0] if imagenet else [0, 1, 2],
        max_train_steps=400_000 if imagenet else 400,
        evaluations=1,
        output_dir=output_dir,
        jobs=len(list_visible_gpus()) or count_available_cores(),
        out=output_dir / f"{'-'.join(args.axis)}.json",
    )
    return args, train_flags


def select_axes(result: dict, path: Path, axes: list[str]) -> dict:
    """Return the result with only the requested axes, or with all axes if `axes` is empty.

    Raises:
        UserError: If the result does not contain a requested axis.
    """
    panels = {panel["name"]: panel for panel in result["axes"]}
    missing = [axis for axis in axes if axis not in panels]
    if missing:
        raise UserError(
            f"--plot {path} contains {' '.join(panels)}, not {' '.join(missing)}; "
            "pass another --axis"
        )
    return result | {"axes": [panels[name] for name in panels if name in axes or not axes]}


def write_ablation_report(result: dict, path: Path) -> None:
    """Write the table and the figure next to the JSON file, and print the table.

    Raises:
        UserError: If the result contains no finished runs of vanilla SiT.
    """
    if BASELINE not in collect_final_values(result["runs"], result.get("metric", "")):
        raise UserError(
            f"{path} contains no finished run of vanilla SiT ({BASELINE}), the baseline of the "
            "comparison; rerun the study"
        )
    write_report(path, result, format_table, draw_figure)


def main() -> None:
    """Run the command line."""
    args, train_flags = parse(sys.argv[1:])
    if args.plot:
        result = load_result(args.plot, "ablate")
        write_ablation_report(select_axes(result, args.plot, args.axis), args.plot)
        return

    # List the runs.
    demo = args.scale == "demo"
    steps = args.max_train_steps
    runs, panels = build_grid(args.axis, args.model, steps, demo)
    scale_flags = f"--batch-size 256 --max-train-steps {steps}".split()  # as in SiT and REPA
    if demo:
        scale_flags = make_demo_flags(steps, args.evaluations)
    shared = ["--data-dir", str(args.data_dir), "--model", args.model, *scale_flags, *train_flags]
    cells = [
        Cell(name, seed, (*shared, *flags.split()))
        for seed in args.seeds
        for name, flags in runs.items()
    ]
    folder = args.output_dir
    if args.print:
        lines = []
        for cell in cells:
            commands = (
                [cell.make_command(folder)] if demo else list_commands(cell, folder, args.gpus)
            )
            lines += [f"# {cell.name}, seed {cell.seed}", *commands, ""]
        print(*lines, sep="\n")
        return

    # Check and execute the runs.
    check_cells(cells, folder)
    try:
        open_cache(args.data_dir)
    except UserError as error:
        raise UserError(f"{error}; `make demo` creates the latents of the bundled data") from None
    failed = run_cells(cells, folder, args.jobs)

    # Write the result of the finished runs.
    entries = collect_runs(cells, folder)
    settings = {
        "model": args.model,
        "steps": steps,
        "metric": frechet_name(cells[0].parse_settings().evaluation.features),
        "axes": panels,
    }
    save_result(args.out, "ablate", settings, entries)
    if not failed or any(entry["name"] == BASELINE for entry in entries):
        write_ablation_report(load_result(args.out, "ablate"), args.out)
    check_no_failures(failed, len(cells))


if __name__ == "__main__":
    cli.run(main)
