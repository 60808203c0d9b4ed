"""Does alignment reach a quality in fewer images? Vanilla SiT, SRA 2, SRA and REPA, each with several seeds.

    python -m experiments.convergence --scale laptop
    python -m experiments.convergence --scale gpu --images /usr/share/datasets/fashion-mnist
    python -m experiments.convergence --scale imagenet
    python -m experiments.convergence --plot docs/study-gpu.json

laptop: SiT-Ti/2 on the embedded garments, under two hours on two cores. gpu: SiT-S/2 on Fashion-MNIST's 60,000 training images,
under twenty minutes on one GPU. imagenet: prints a cluster's commands. The block each method aligns is chosen by --tune, on
other seeds, and kept in the file that --knobs names. Writes NAME.json, and from it NAME.md and NAME.png, which --plot makes
again without running anything. Stopped, the same command goes on. What stands behind -- goes to every train.py."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import cli
from benchmarks.run_steps import count_flops, time_runs
from cli import UserError
from evaluations.compare import frechet_name
from evaluations.runs import read_json
from experiments.cells import ROOT, Cell, check, devices, run
from experiments.results import gather, last, load, save
from experiments.study_data import ENCODER, IMAGES, floor, prepare
from experiments.study_page import draw, table
from experiments.study_probe import known, probe
from files import write_file
from latent_cache import LatentCache
from machine import cores
from models.sit import PRESETS


class Method(NamedTuple):
    """One of those compared; {sra2}, {repa} and {sra} in its flags stand for the block that each of them aligns."""

    label: str
    flags: str
    tuned: str | None = None  # which of these blocks is tried with it, on the seeds of --tune


METHODS = {
    "vanilla": Method("vanilla SiT", "--align none"),
    "sra2-cosine": Method("SRA 2, cosine", "--align sra2 --align-depth {sra2-cosine}", "sra2-cosine"),
    "sra2-smooth_l1": Method(
        "SRA 2, smooth L1", "--align sra2 --align-loss smooth_l1 --align-depth {sra2-smooth_l1}", "sra2-smooth_l1"
    ),
    "sra": Method("SRA", "--align sra --align-depth {sra}", "sra"),
    "repa": Method("REPA", "--align repa --align-depth {repa} {encoder}", "repa"),
    "sra2+repa": Method(
        "SRA 2 and REPA", "--align sra2 repa --align-depth {sra2-cosine} {repa} {encoder}"
    ),
}  # fmt: skip


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
    flags: str


SAME = (
    f"--eval-features fashion --eval-mode ode --eval-heun --eval-samples 5000 --sampling-steps 0 --keep-last 1 "
    f"--eval-reference {IMAGES}"
)
SCALES = {
    "laptop": Scale(
        "SiT-Ti/2", 600, 4, (10, 11, 12, 13, 14), (2, 3, 4), (0,), 400, None, (10, 1),
        f"--batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 --num-workers 0 --log-every 20 --eval-num-steps 6 "
        f"--eval-batch-size 100 {SAME}",
    ),
    "gpu": Scale(
        "SiT-S/2", 600, 4, (10, 11, 12, 13, 14), (2, 4, 6), (0,), 600, 15, (10, 20),
        f"--batch-size 256 --learning-rate 5e-4 --ema-decay 0.995 --num-workers 1 --log-every 50 --eval-num-steps 6 "
        f"--eval-batch-size 500 {SAME}",
    ),
    "imagenet": Scale(
        "SiT-B/2", 400_000, 8, (0, 1, 2, 3, 4), (), (), 0, None, (0, 0),
        "--batch-size 256 --keep-last 1 --eval-samples 50000 --eval-batch-size 128 "
        "--eval-reference VIRTUAL_imagenet256_labeled.npz",
    ),
}  # fmt: skip
OWN = {"--data-dir", "--model", "--max-train-steps", "--exp-name", "--output-dir", "--seed", "--eval-every", "--eval-latents"}


def shared(args: argparse.Namespace, steps: int, evaluations: int) -> list[str]:
    """What all runs have in common."""
    scale = SCALES[args.scale]
    every = max(1, steps // evaluations)
    saved = steps if args.scale == "gpu" else every  # a run there takes a minute, and its checkpoint half a gigabyte
    flags = ["--data-dir", args.data_dir / "train", "--eval-latents", args.data_dir / "held-out", "--model", args.model]
    flags += ["--max-train-steps", steps, "--eval-every", every, "--checkpointing-steps", saved, *scale.flags.split()]
    return [*map(str, flags), *args.more]


def flags_of(name: str, knobs: dict[str, int], args: argparse.Namespace) -> list[str]:
    """A method's own flags. REPA's head, 2048 wide, would be larger than a small network: as wide as SRA 2's there."""
    width = PRESETS[args.model]["width"]
    knobs = dict.fromkeys(METHODS, "auto") | knobs
    repa = "" if args.scale == "imagenet" else f"--repa-encoder {ENCODER} --projector-width {2 * width}"
    return METHODS[name].flags.format(**knobs, encoder=repa).split()


def read_knobs(path: Path, scale: str) -> dict[str, int]:
    """The blocks chosen by --tune. Raises UserError."""
    found = load(path, "convergence-knobs")
    if found["scale"] != scale:
        raise UserError(f"--knobs {path} is of --scale {found['scale']}: run --tune at this one")
    return found["knobs"]


def candidates(args: argparse.Namespace, seeds: list[int]) -> list[Cell]:
    """The runs of --tune: every method at every block that is tried."""
    common = shared(args, args.max_train_steps, 1)
    cells = []
    for seed in seeds:
        for name, method in METHODS.items():
            for block in SCALES[args.scale].blocks if method.tuned else ():
                knobs = dict.fromkeys(METHODS, block)
                cells.append(Cell(f"{name}-block{block}", seed, (*common, *flags_of(name, knobs, args))))
    return cells


def choose(runs: list[dict], metric: str) -> dict[str, int]:
    """Of each method the block with the lowest metric at the end, averaged over seeds."""
    at_end, means = last(runs, metric), {}
    for run_name, values in at_end.items():
        name, _, block = run_name.rpartition("-block")
        means.setdefault(name, {})[int(block)] = sum(values.values()) / len(values)
    return {name: min(sorted(found), key=found.get) for name, found in means.items()}


def tune(args: argparse.Namespace) -> None:
    """Chooses the blocks, and writes them with the runs that they were chosen by."""
    cells = candidates(args, args.seeds)
    check(cells, args.output_dir)
    failed = run(cells, args.output_dir, args.jobs)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed ({', '.join(failed)}): the same command tries them again")
    metric, runs = frechet_name("fashion"), gather(cells, args.output_dir)
    knobs = choose(runs, metric)
    about = {"scale": args.scale, "model": args.model, "steps": args.max_train_steps, "metric": metric, "knobs": knobs}
    save(args.out, "convergence-knobs", about, runs)
    print(f"{args.out}: " + ", ".join(f"{name} block {block}" for name, block in knobs.items()))


def of_study(args: argparse.Namespace) -> tuple[dict[str, int], list[Cell]]:
    """The blocks, and all runs. On ImageNet the blocks are the papers'."""
    knobs = {} if args.scale == "imagenet" else read_knobs(args.knobs, args.scale)
    common = shared(args, args.max_train_steps, args.evaluations)
    cells = [Cell(name, seed, (*common, *flags_of(name, knobs, args))) for seed in args.seeds for name in args.methods]
    return knobs, cells


def print_commands(args: argparse.Namespace, cells: list[Cell]) -> None:
    """A line a run. On a cluster each measures itself on all GPUs on the way."""
    spread = args.scale == "imagenet" and args.gpus > 1
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
    caches = {name: LatentCache(args.data_dir / name) for name in ("train", "held-out")}
    first = cells[0].args()
    about = {
        "scale": args.scale, "model": args.model, "batch_size": first.batch_size, "steps": args.max_train_steps,
        "training_images": len(caches["train"]), "held_out_images": len(caches["held-out"]),
        "metric": frechet_name(first.eval_features), "knobs": knobs,
        "floor": None if args.scale == "imagenet" else floor(args.data_dir, first.eval_samples),
        "methods": priced(args, cells, knobs),
    }  # fmt: skip
    for found in runs:
        folder = args.output_dir / Cell(found["name"], found["seed"], ()).run
        found["probe"] = known(folder) if args.gather else probe(folder, caches["train"])
    save(args.out, "convergence", about, runs)
    show(args.out)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed ({', '.join(failed)}): the same command tries them again")


def priced(args: argparse.Namespace, cells: list[Cell], knobs: dict[str, int]) -> list[dict]:
    """The methods with what training costs: FLOPs of an image, and seconds of a step, timed once, when nothing else runs."""
    path, ways = args.output_dir / "seconds.json", {cell.name: cell.args() for cell in cells}
    seconds = read_json(path)
    if not args.gather and not {*ways} <= {*seconds}:
        print("timing a step of each method: leave the machine to it", flush=True)
        flags = {cell.name: cell.args() for cell in cells}  # building a run settles flags in its own
        seconds = time_runs(flags, *SCALES[args.scale].timing)
        write_file(path, json.dumps(seconds).encode())
    return [
        {
            "name": name, "label": METHODS[name].label, "flags": " ".join(flags_of(name, knobs, args)),
            "training_flops": count_flops(ways[name]), "step_s": seconds.get(name),
        }
        for name in args.methods
    ]  # fmt: skip


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
    parser = cli.Parser(__doc__, "python -m experiments.convergence", "--scale NAME [-- FLAGS OF TRAIN.PY]")
    # fmt: off
    add = parser.add_argument
    add("--scale", choices=SCALES, help="laptop, gpu, or imagenet, which prints commands")
    add("--plot", type=Path, metavar="FILE.json", help="table and picture of a result, without running anything")
    add("--tune", action="store_true", help="choose each method's block, on seeds of their own")
    add("--gather", action="store_true", help="the result of the runs that are finished, without running the others")
    add("--print", action="store_true", help="the commands, without running them")
    add("--knobs", type=Path, metavar="FILE.json", help="what --tune wrote (default: docs/study-SCALE-knobs.json)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME", help=f"some of {', '.join(METHODS)}")
    add("--seeds", type=cli.seed, nargs="+", help="a run of each (default: 10 11 12 13 14; with --tune 0)")
    add("--model", choices=PRESETS, metavar="NAME", help="of models/sit.py (default: SiT-Ti/2, SiT-S/2, SiT-B/2)")
    add("--max-train-steps", type=cli.positive, help="of each run (default: the scale's)")
    add("--evaluations", type=cli.positive, help="of each run, evenly on the way; the last at the end")
    add("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of Fashion-MNIST's train-*.gz, for --scale gpu")
    add("--encoder-weights", type=Path, help="of tf_efficientnet_lite0, REPA's encoder here (default: out of a package)")
    add("--data-dir", type=Path, help="where the data are made (default: data/study-SCALE; imagenet: data/imagenet256)")
    add("--output-dir", type=Path, help="where the runs live (default: exps/study-SCALE)")
    add("--jobs", type=cli.positive, help="runs at a time (default: one a core; gpu: 15 a GPU)")
    add("--gpus", type=cli.positive, default=8, help="of a machine of the cluster, for --scale imagenet")
    add("--out", type=Path, metavar="FILE.json", help="the result (default: OUTPUT_DIR/study.json, or knobs.json)")
    # fmt: on
    args = parser.parse_args(argv[:cut])
    args.more = argv[cut + 1 :]
    if not args.scale and not args.plot:
        raise UserError(f"--scale is missing: one of {', '.join(SCALES)}; or --plot FILE.json")
    for word in args.more:
        if word.split("=")[0] in OWN or word.startswith(("--align", "--projector", "--repa", "--sra")):
            raise UserError(f"-- {word}: that is for this command to say, before the --")
    return args if args.plot else with_defaults(args)


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What the scale says where no flag does. Raises UserError."""
    scale, name = SCALES[args.scale], args.scale
    imagenet = name == "imagenet"
    if imagenet and args.tune:
        raise UserError("--tune is for --scale laptop and gpu; on ImageNet the blocks are the papers'")
    args.model = args.model or scale.model
    args.seeds = args.seeds or [*(scale.tune_seeds if args.tune else scale.seeds)]
    args.max_train_steps = args.max_train_steps or (scale.tune_steps if args.tune else scale.steps)
    args.evaluations = args.evaluations or scale.evaluations
    args.data_dir = args.data_dir or Path("data/imagenet256" if imagenet else f"data/study-{name}")
    args.output_dir = args.output_dir or Path(f"exps/study-{name}")
    args.knobs = args.knobs or ROOT / f"docs/study-{name}-knobs.json"
    args.jobs = args.jobs or (scale.jobs or 1) * max(1, len(devices())) if devices() or scale.jobs else args.jobs or cores()
    args.out = args.out or args.output_dir / ("knobs.json" if args.tune else "study.json")
    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each only once")
    if "vanilla" not in args.methods:
        args.methods = ["vanilla", *args.methods]  # what all others are compared with
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.plot:
        show(args.plot)
        return
    if args.print or args.scale == "imagenet":
        print_commands(args, candidates(args, args.seeds) if args.tune else of_study(args)[1])
        return
    if not args.tune:
        read_knobs(args.knobs, args.scale)
    if not args.gather:
        prepare(args.scale, args.data_dir, args.images, args.encoder_weights)
    (tune if args.tune else study)(args)


if __name__ == "__main__":
    cli.run(main)
