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
import sys
from pathlib import Path

from common import cli
from common.cli import UserError
from common.machine import count_available_cores
from evaluations.compare import frechet_name
from experiments.ablation_grid import AXIS_TITLES, BASELINE, PAPER_AXES, build_grid
from experiments.cells import Cell, open_cache
from experiments.engine import Study
from experiments.panels import draw_figure, format_table
from experiments.paper_plan import PaperPlan
from experiments.paper_tables import list_table_1
from experiments.results import collect_final_values, load_result, write_report
from experiments.scheduler import list_visible_gpus
from experiments.study_flags import add_study_flags, parse_study_flags, set_defaults

DEMO_FLAGS = (
    "--batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 --sampling-steps 0 --num-workers 0 "
    "--keep-last 1 --eval-samples 1000 --eval-reference assets/fashion-mnist/images.zip "
    "--eval-features fashion --eval-mode ode --eval-num-steps 20 --eval-batch-size 100"
)


def make_demo_flags(steps: int, evaluations: int) -> list[str]:
    """Return the flags that all runs on the bundled data share, as in docs/ablations.md."""
    interval = math.ceil(steps / evaluations)
    schedule = f"--max-train-steps {steps} --checkpointing-steps {interval} --eval-every {interval}"
    return f"{schedule} {DEMO_FLAGS} --log-every {min(20, steps)}".split()


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
    args, train_flags = parse_study_flags(make_parser(), argv, "--align", "--proj")
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


def make_study(args: argparse.Namespace, train_flags: list[str]) -> Study:
    """Return the study on the bundled data."""
    steps = args.max_train_steps
    runs, panels = build_grid(args.axis, args.model, steps, demo=True)
    shared = ["--data-dir", str(args.data_dir), "--model", args.model]
    shared += [*make_demo_flags(steps, args.evaluations), *train_flags]
    cells = [
        Cell(name, seed, (*shared, *flags.split()))
        for seed in args.seeds
        for name, flags in runs.items()
    ]
    settings = {
        "model": args.model,
        "steps": steps,
        "metric": frechet_name(cells[0].parse_settings().evaluation.features),
        "axes": panels,
    }

    def report(path: Path) -> None:
        write_ablation_report(load_result(path, "ablate"), path)

    return Study(
        "ablate", cells, args.output_dir, args.out, lambda runs: settings, report, BASELINE
    )


def print_table_1(args: argparse.Namespace, train_flags: list[str]) -> None:
    """Print the commands of Table 1 of the paper (see experiments/paper.py)."""
    table = list_table_1(args.model, args.max_train_steps, args.axis)
    plan = PaperPlan(
        scale="imagenet",
        tables=(table,),
        seeds=tuple(args.seeds),
        data_dir=args.data_dir,
        output_dir=args.output_dir,
        train_flags=tuple(train_flags),
    )
    plan.check(args.gpus)
    plan.print_run_commands(args.gpus)


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

    if args.scale == "imagenet":
        print_table_1(args, train_flags)
        return
    study = make_study(args, train_flags)
    study.reuse(args.reuse)
    if args.print:
        study.print_commands()
    elif args.gather:
        study.gather()
    else:
        try:
            open_cache(args.data_dir)
        except UserError as error:
            message = f"{error}; `make demo` creates the latents of the bundled data"
            raise UserError(message) from None
        study.run(args.jobs)


if __name__ == "__main__":
    cli.run(main)
