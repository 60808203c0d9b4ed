r"""Reproduce Tables 1, 2, 3 and 5 of the SRA 2 paper (arXiv:2601.17830).

    python -m experiments.paper --print                              the commands
    python -m experiments.paper --slurm jobs && bash jobs/submit.sh  on a SLURM cluster
    python -m experiments.paper --run --gpus 8                       on this machine
    python -m experiments.paper --gather                             the tables so far
    python -m experiments.paper --scale demo --run --gather          all stages in minutes

The images are encoded once. Each run is trained, sampled at the checkpoints of the tables and
evaluated. Rerun the same command to resume after an interruption. --gather writes paper.json, with
the tables in paper.md and a figure in paper.png: the paper's values, ours with intervals, whether
they are comparable, the progress and the remaining GPU-hours. Flags after -- are passed to every
run of train.py.

--scale demo trains tiny networks on the bundled images. Its results are not evidence.
"""

import argparse
import sys
from pathlib import Path

from common import cli
from common.cli import UserError
from common.machine import count_available_cores
from experiments.engine import run_in_this_process
from experiments.paper_page import draw_figure, format_tables
from experiments.paper_plan import PaperPlan
from experiments.paper_results import gather_tables
from experiments.paper_scales import SCALES
from experiments.paper_slurm import write_slurm_scripts
from experiments.paper_tables import DEFAULT_GUIDANCE, TABLES
from experiments.results import load_result, save_result, write_report
from experiments.scheduler import check_no_failures, list_visible_gpus, run_tasks
from experiments.study_flags import add_common_flags, parse_study_flags, set_defaults


def make_parser() -> cli.Parser:
    """Return the parser for the flags of the command."""
    parser = cli.Parser(
        __doc__,
        "python -m experiments.paper",
        "--print | --slurm DIR | --run | --gather",
        "[-- FLAGS OF TRAIN.PY]",
    )
    add = parser.add_argument
    add(
        "--scale",
        choices=SCALES,
        default="imagenet",
        help="imagenet: the settings of the paper; demo: tiny networks on the bundled images",
    )
    add("--run", action="store_true", help="execute all commands on this machine")
    add("--slurm", type=Path, metavar="DIR", help="folder for job scripts of a SLURM cluster")
    add(
        "--tables",
        type=int,
        nargs="+",
        choices=TABLES,
        default=[*TABLES],
        metavar="N",
        help="tables to reproduce",
    )
    add("--images", type=Path, help="images to encode (default: data/imagenet/train)")
    add(
        "--reference",
        type=Path,
        help="reference of the metrics (default: VIRTUAL_imagenet256_labeled.npz)",
    )
    scale, low, high = DEFAULT_GUIDANCE
    guidance_help = "guidance of Table 3, as in sample_ddp.py; the paper's value is not known"
    add("--cfg-scale", type=cli.positive_float, default=scale, help=guidance_help)
    add("--guidance-low", type=cli.fraction, default=low, help=guidance_help)
    add("--guidance-high", type=cli.fraction, default=high, help=guidance_help)
    add(
        "--ep-fid",
        type=cli.positive_float,
        nargs="+",
        metavar="FID",
        help="FIDs for which the number of epochs is reported (default: depends on the scale)",
    )
    defaults = {
        "--data-dir": "data/imagenet256; demo: data/fashion-mnist",
        "--seeds": "0",
        "--jobs": "as many as the GPUs or cores allow",
        "--output-dir": "exps/paper; demo: exps/paper-demo",
        "--out": "OUTPUT_DIR/paper.json",
    }
    add_common_flags(parser, defaults)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of the command, and the flags that are passed to every run of train.py.

    Raises:
        UserError: If a flag is invalid, or if no action is selected.
    """
    prefixes = ("--align", "--proj", "--repa", "--milestone-steps")
    args, train_flags = parse_study_flags(make_parser(), argv, *prefixes)
    if not (args.print or args.slurm or args.run or args.gather or args.plot):
        raise UserError("no action is selected; pass --print, --slurm DIR, --run or --gather")
    if args.cfg_scale < 1 or args.guidance_low > args.guidance_high:
        raise UserError(
            "--cfg-scale must be at least 1, and --guidance-low at most --guidance-high; correct "
            "these flags"
        )
    is_demo = args.scale == "demo"
    if is_demo:
        args.gpus = 1
    output_dir = args.output_dir or Path("exps/paper-demo" if is_demo else "exps/paper")
    num_gpus = len(list_visible_gpus())
    if args.run and 0 < num_gpus < args.gpus:
        raise UserError(
            f"--gpus {args.gpus} is more than the {num_gpus} visible GPUs; pass --gpus {num_gpus}"
        )
    set_defaults(
        args,
        data_dir=Path("data/fashion-mnist" if is_demo else "data/imagenet256"),
        seeds=[0],
        jobs=num_gpus // args.gpus or count_available_cores(),
        output_dir=output_dir,
        out=output_dir / "paper.json",
        ep_fid=[*SCALES[args.scale].fid_levels],
    )
    return args, train_flags


def make_plan(args: argparse.Namespace, train_flags: list[str]) -> PaperPlan:
    """Return the plan of the selected tables."""
    return PaperPlan(
        scale=args.scale,
        tables=tuple(TABLES[number] for number in sorted(set(args.tables))),
        seeds=tuple(args.seeds),
        data_dir=args.data_dir,
        output_dir=args.output_dir,
        images=args.images,
        reference=args.reference,
        guidance=(args.cfg_scale, args.guidance_low, args.guidance_high),
        train_flags=tuple(train_flags),
    )


def run(plan: PaperPlan, jobs: int, gpus: int) -> dict[str, str]:
    """Execute the unfinished commands, and return the error messages of the failed ones.

    In the demo, this process samples and evaluates, because the start of a process would take
    longer than its work.
    """
    stages = plan.stages
    train = [planned.train for planned in plan.runs if plan.needs_training(planned)]
    tasks = [*(stages["encode"] if train else []), *stages["cost"], *train]
    # The samples and the checkpoints may be deleted after their evaluation.
    evaluations = [
        task
        for evaluation in plan.evaluations.values()
        if not evaluation.evaluate.is_finished(plan.output_dir)
        for task in (evaluation.sample, evaluation.evaluate)
    ]
    if not plan.is_demo:
        return run_tasks([*tasks, *evaluations], plan.output_dir, jobs, gpus)
    errors = run_tasks(tasks, plan.output_dir, jobs)
    return errors | run_in_this_process(evaluations, plan.output_dir)


def write_paper_report(path: Path) -> None:
    """Write the tables and the figure of a result next to the JSON file, and print the tables.

    Raises:
        UserError: If the file is not a result of this command.
    """
    write_report(path, load_result(path, "paper"), format_tables, draw_figure)


def main() -> None:
    """Run the command line."""
    args, train_flags = parse(sys.argv[1:])
    if args.plot:
        write_paper_report(args.plot)
        return
    plan = make_plan(args, train_flags)
    plan.check(args.gpus)
    if args.print:
        plan.print_commands(args.gpus)
    if args.slurm:
        write_slurm_scripts(plan, args.slurm, args.gpus)
        print(f"{args.slurm}: run bash {args.slurm / 'submit.sh'} from the folder of train.py")
    errors: dict[str, str] = {}
    if args.run:
        errors = run(plan, args.jobs, args.gpus)
    if args.gather:
        settings = gather_tables(plan, args.gpus, args.ep_fid)
        save_result(args.out, "paper", settings, [])
        write_paper_report(args.out)
    check_no_failures(errors, sum(map(len, plan.stages.values())))


if __name__ == "__main__":
    cli.run(main)
