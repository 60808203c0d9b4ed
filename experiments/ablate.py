"""The paper's ablations (arXiv:2601.17830, table 1), one choice varied at a time around the paper's best.

    python -m experiments.ablate --axis depth --seeds 0 1 2
    python -m experiments.ablate --scale imagenet --print
    python -m experiments.ablate --axis loss -- --batch-size 128 --eval-samples 5000

Writes NAME.json, and from it NAME.md and NAME.png, which --plot NAME.json makes again without running anything. Calling it
again goes on where it stopped, and runs that axes share are run once. What stands behind -- goes to every train.py.
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
from common.files import write_file
from common.machine import available_cores
from evaluations.compare import frechet_name
from experiments.cells import Cell, check, devices, run
from experiments.panels import draw, table
from experiments.results import gather, last, load, save
from latents.cache import CacheError, LatentCache
from models.sit import PRESETS, default_align_block


class Value(NamedTuple):
    """A point of an axis."""

    label: str
    flags: str
    paper: float | None = None  # its FID in the paper's table, of SiT-B/2; None where it gives none


PAPER_VANILLA = 33.02
DEMO = (
    "--batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 --sampling-steps 0 --num-workers 0 --keep-last 1 "
    "--eval-samples 1000 --eval-reference assets/fashion-mnist/images.zip --eval-features fashion --eval-mode ode "
    "--eval-num-steps 20 --eval-batch-size 100"
)
OWN = (
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
TITLES = {
    "depth": "aligned block",
    "t-range": "timesteps aligned",
    "loss": "loss",
    "weight": "weight of the loss",
    "layers": "linear layers of the head",
    "target": "target",
    "schedule": "steps aligned",
}
PAPERS = (
    "depth",
    "t-range",
    "loss",
    "weight",
    "layers",
)  # the axes of table 1; the others are ours


def axis(name: str, model: str, steps: int, demo: bool) -> list[Value]:
    """The values of an axis, for a model and a number of steps; the paper's at 12 blocks. At demo scale there are more."""
    depth = PRESETS[model]["depth"]
    fid = {2: 28.89, 6: 32.44, 8: 36.20} if depth == 12 else {}
    few = (
        range(1, depth + 1)
        if depth <= 8
        else sorted({default_align_block(model), *(round(depth * k / 12) for k in (2, 3, 6, 8))})
    )
    return {
        "depth": [Value(str(k), f"--align-depth {k}", fid.get(k)) for k in few],
        "t-range": [
            Value("[0, 1]", "--align-t-range 0 1", 28.89),
            Value("[0, 0.5]", "--align-t-range 0 0.5", 30.04),
            Value("[0.5, 1]", "--align-t-range 0.5 1"),
        ],
        "loss": [
            Value("smooth_l1", "--align-loss smooth_l1 --align-beta 0.05", 28.89),
            Value("cosine", "--align-loss cosine", 29.30),
            Value("l2", "--align-loss l2", 29.40),
            Value("l1", "--align-loss l1", 29.50),
        ],
        "weight": [
            Value(f"{w:g}", f"--align-weight {w}", {1.0: 28.89, 0.1: 30.10}.get(w))
            for w in ((0.1, 0.3, 1.0, 3.0) if demo else (1.0, 0.1))
        ],
        "layers": [
            Value("5", "--projector-layers 5", 28.89),
            Value("2", "--projector-layers 2", 31.32),
        ],
        "target": [
            Value("mean", "--align-target mean"),
            Value("sample", "--align-target sample"),
            Value("mean, normalised", "--align-target mean --align-normalize channel"),
        ],
        "schedule": [Value("all", "--align-stop-step 0")]
        + [
            Value(f"first {label}", f"--align-stop-step {max(1, steps // n)}")
            for label, n in (("half", 2), ("quarter", 4))
        ],
    }[name]


def usual(model: str) -> dict[str, str]:
    """The paper's best: the label of each of its axes."""
    rest = {
        "t-range": "[0, 1]",
        "loss": "smooth_l1",
        "weight": "1",
        "layers": "5",
        "target": "mean",
        "schedule": "all",
    }
    return {"depth": str(default_align_block(model)), **rest}


def grid(axes: list[str], model: str, steps: int, demo: bool) -> tuple[dict[str, str], list[dict]]:
    """Name of each run -> its flags of alignment, without doubles; and the axes as panels.py wants them."""
    best = usual(model)
    at = {
        name: {value.label: value.flags for value in axis(name, model, steps, demo)}
        for name in best
    }
    cells, panels = {"none": "--align none"}, []
    for name in axes:
        values = []
        for value in axis(name, model, steps, demo):
            chosen = best | {name: value.label}
            given = [
                at[each][chosen[each]]
                for each in best
                if each in PAPERS or chosen[each] != best[each]
            ]
            same = value.label == best[name]
            run_name = (
                "sra2" if same else f"{name}-{re.sub('[^0-9a-z._]+', '-', value.label).strip('-')}"
            )
            cells[run_name] = " ".join(["--align sra2", *given])
            values.append(
                {"label": value.label, "run": run_name, "usual": same, "paper": value.paper}
            )
        vanilla = PAPER_VANILLA if name in PAPERS else None
        panels.append({"name": name, "title": TITLES[name], "paper": vanilla, "values": values})
    return cells, panels


def demo_flags(args: argparse.Namespace) -> list[str]:
    """What all runs share: the README's comparison on the embedded data."""
    every, log = math.ceil(args.max_train_steps / args.evaluations), min(20, args.max_train_steps)
    rest = f"--max-train-steps {args.max_train_steps} --checkpointing-steps {every} --eval-every {every} {DEMO} --log-every {log}"
    return ["--data-dir", str(args.data_dir), "--model", args.model, *rest.split()]


def imagenet_flags(args: argparse.Namespace) -> list[str]:
    """As in SiT and REPA."""
    rest = f"--model {args.model} --batch-size 256 --max-train-steps {args.max_train_steps}".split()
    return ["--data-dir", str(args.data_dir), *rest]


def print_commands(args: argparse.Namespace, cells: list[Cell]) -> None:
    """Lines for a cluster: training, 50,000 samples by 250 steps of the SDE without guidance, their FID."""
    start = (
        f"accelerate launch --multi_gpu --num_processes {args.gpus}" if args.gpus > 1 else "python"
    )
    spread = f"torchrun --nproc_per_node {args.gpus}"
    for cell in cells:
        print(f"# {cell.name}, seed {cell.seed}")
        if args.scale == "demo":
            print(shlex.join(["python", "train.py", *cell.words(args.output_dir)]), end="\n\n")
            continue
        print(f"{start} train.py {shlex.join(cell.words(args.output_dir))}")
        checkpoint = shlex.quote(str(args.output_dir / cell.run))
        print(
            f"{spread} sample_ddp.py --ckpt {checkpoint} --num-fid-samples 50000 --mode sde --num-steps 250 --name {cell.run}"
        )
        print(
            f"{spread} -m evaluations.evaluate samples/{cell.run}.npz --reference VIRTUAL_imagenet256_labeled.npz",
            end="\n\n",
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = cli.Parser(
        __doc__, "python -m experiments.ablate", "--axis NAME [NAME ...]", "[-- FLAGS OF TRAIN.PY]"
    )

    add = parser.add_argument
    add(
        "--axis",
        nargs="+",
        choices=TITLES,
        metavar="NAME",
        help=f"{', '.join(TITLES)} (imagenet: by default the first five)",
    )
    add(
        "--scale",
        choices=("demo", "imagenet"),
        default="demo",
        help="the embedded data; imagenet only with --print",
    )
    add("--print", action="store_true", help="the commands, without running them")
    add(
        "--plot",
        type=Path,
        metavar="FILE.json",
        help="table and picture of a result, without running anything",
    )
    add(
        "--data-dir",
        type=Path,
        help="latent cache (default: data/fashion-mnist; imagenet: data/imagenet256)",
    )
    add(
        "--model",
        choices=PRESETS,
        metavar="NAME",
        help="of models/sit.py (default: SiT-Ti/2; imagenet: SiT-B/2)",
    )
    add("--seeds", type=cli.seed, nargs="+", help="a run of each (default: 0 1 2; imagenet: 0)")
    add(
        "--max-train-steps",
        type=cli.positive_int,
        help="of each run (default: 400; imagenet: 400000)",
    )
    add(
        "--evaluations",
        type=cli.positive_int,
        default=1,
        help="of each run, evenly on the way; the last at the end",
    )
    add("--jobs", type=cli.positive_int, help="runs at a time (default: one a GPU, or one a core)")
    add(
        "--gpus",
        type=cli.positive_int,
        default=8,
        help="of a machine of the cluster, for --scale imagenet",
    )
    add(
        "--output-dir",
        type=Path,
        help="where the runs live (default: exps/ablate; imagenet: exps/ablate-imagenet)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="the result; table and picture beside it (default: OUTPUT_DIR/AXES.json)",
    )

    args = parser.parse_args(argv[:cut])
    args.more, imagenet = argv[cut + 1 :], args.scale == "imagenet"
    for word in args.more:
        if word.split("=")[0] in OWN or word.startswith(("--align", "--projector")):
            raise UserError(f"-- {word}: that is for this command to say, before the --")
    if imagenet and not args.print:
        raise UserError(
            "--scale imagenet is for a cluster: add --print, and start the commands there"
        )
    if not args.plot and not args.axis and not imagenet:
        raise UserError(f"--axis is missing: one or several of {', '.join(TITLES)}")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each only once")
    args.axis = list(dict.fromkeys(args.axis or ([] if args.plot else PAPERS)))
    args.data_dir = args.data_dir or Path("data/imagenet256" if imagenet else "data/fashion-mnist")
    args.model = args.model or ("SiT-B/2" if imagenet else "SiT-Ti/2")
    args.seeds = args.seeds or ([0] if imagenet else [0, 1, 2])
    args.max_train_steps = args.max_train_steps or (400_000 if imagenet else 400)
    args.output_dir = args.output_dir or Path("exps/ablate-imagenet" if imagenet else "exps/ablate")
    args.jobs = args.jobs or len(devices()) or available_cores()
    args.out = args.out or args.output_dir / f"{'-'.join(args.axis)}.json"
    if args.out.suffix != ".json" and not args.plot:
        raise UserError(f"--out {args.out} must end in .json")
    return args


def of_axes(found: dict, path: Path, axes: list[str]) -> dict:
    """A result, of the axes asked for alone. Raises UserError."""
    there = [panel["name"] for panel in found["axes"]]
    missing = [name for name in axes if name not in there]
    if missing:
        raise UserError(f"--plot {path}: holds {' '.join(there)}, not {' '.join(missing)}")
    return found | {"axes": [panel for panel in found["axes"] if panel["name"] in (axes or there)]}


def show(found: dict, path: Path) -> None:
    """Writes table and picture beside the JSON, and prints the table. Raises UserError."""
    if "none" not in last(found["runs"], found.get("metric", "")):
        raise UserError(
            f"{path} holds no finished run of vanilla SiT (none), which all others are compared with"
        )
    text = table(found)
    write_file(path.with_suffix(".md"), text.encode())
    draw(found, path.with_suffix(".png"))
    print(f"{text}\n{path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}")


def main() -> None:
    args = parse(sys.argv[1:])
    if args.plot:
        show(of_axes(load(args.plot, "ablate"), args.plot, args.axis), args.plot)
        return
    demo = args.scale == "demo"
    named, panels = grid(args.axis, args.model, args.max_train_steps, demo)
    shared = [*(demo_flags if demo else imagenet_flags)(args), *args.more]
    cells = [
        Cell(name, seed, (*shared, *words.split()))
        for seed in args.seeds
        for name, words in named.items()
    ]
    if args.print:
        for cell in cells:
            cell.args(1 if demo else args.gpus)
        print_commands(args, cells)
        return
    check(cells, args.output_dir)
    try:
        LatentCache(args.data_dir)
    except CacheError as error:
        raise UserError(
            f"--data-dir: {error}; the embedded data's latents are made by `make demo`"
        ) from None
    failed = run(cells, args.output_dir, args.jobs)
    metric = frechet_name(cells[0].args().eval_features)
    about = {"model": args.model, "steps": args.max_train_steps, "metric": metric, "axes": panels}
    runs = gather(cells, args.output_dir)
    save(args.out, "ablate", about, runs)
    if not failed or any(each["name"] == "none" for each in runs):
        show(load(args.out, "ablate"), args.out)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} runs failed ({', '.join(failed)}): the same command tries them again"
        )


if __name__ == "__main__":
    cli.run(main)
