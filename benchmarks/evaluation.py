"""The metrics that are no networks, each against the code that others compute it with, in one run.

    python -m benchmarks.evaluation --json evaluation.json

Features are random numbers of Inception's width. `frechet_distance` against `sqrtm`, which is pytorch-fid's
calculate_frechet_distance (the same lines as ADM's) with scipy's matrix square root; `statistics` against numpy's mean and cov;
`precision_recall` of as many samples as references against torch-fidelity's. What is not ours runs on the CPU.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks.measure import (
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    time_in_turn,
)
from common import cli
from evaluations.metrics import compute_statistics, frechet_distance, precision_recall

PAIRS = {"frechet_distance": "sqrtm", "statistics": "numpy", "precision_recall": "torch-fidelity"}


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.evaluation", "[--json PATH]")

    add = parser.add_argument
    add(
        "--images",
        type=cli.positive_int,
        default=10_000,
        help="rows of each of the two sets of features",
    )
    add("--width", type=cli.positive_int, default=2048, help="features an image")
    add(
        "--rounds",
        type=cli.positive_int,
        default=5,
        help="timings of each, of which the median counts",
    )
    add("--warm-up", type=cli.non_negative_int, default=1, help="rounds before those")
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where ours runs",
    )
    add("--json", type=Path, help="file for the result")

    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((args.width, args.width), np.float32) / args.width**0.5
    a, b = (
        np.maximum(rng.standard_normal((args.images, args.width), np.float32) @ mix + 0.3, 0)
        for _ in range(2)
    )
    s_a, s_b = (compute_statistics(x, device) for x in (a, b))
    actions: dict[str, Callable[[], object]] = {
        "frechet_distance": partial(frechet_distance, s_a, s_b, device),
        "sqrtm": partial(calculate_frechet_distance, *s_a, *s_b),
        "statistics": partial(compute_statistics, a, device),
        "numpy": lambda: (a.mean(0), np.cov(a, rowvar=False)),
        "precision_recall": partial(precision_recall, a, b, device=device),
        "torch-fidelity": partial(
            prc_features_to_metric, torch.from_numpy(b), torch.from_numpy(a), verbose=False
        ),
    }
    seconds, _ = time_in_turn(actions, device, args.rounds, 1, args.warm_up)
    report(
        {
            "benchmark": "evaluation",
            "machine": describe_machine(device)
            | {"numpy": np.__version__, "scipy": scipy.__version__},
            "images": args.images,
            "width": args.width,
            "rounds": args.rounds,
            "results": {
                name: {"call_s": median_and_quartiles(values)} for name, values in seconds.items()
            },
            "ratios": {
                f"{other}/{own}": ratio_per_round(seconds[other], seconds[own])
                for own, other in PAIRS.items()
            },
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
