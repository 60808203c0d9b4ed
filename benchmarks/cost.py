"""What alignment costs, as the paper's Table 5 has it, for any model and methods: parameters, FLOPs, time and memory.

    python -m benchmarks.cost --model SiT-XL/2 --align none sra2 repa sra sra2+repa --batch-size 256 --precision bf16 --compile

Parameters are those of the backbone, of the heads, which are dropped after training, and external ones: of what runs for the
targets alone. FLOPs are of one image (models/flops.py; a multiply-accumulate is two): forward through backbone, heads and what
runs for the targets, and of training, three times the first two and once the last. Steps are timed as benchmarks/train_step.py
does; with --no-timing nothing is built, and the counts take a second.
"""

import argparse

import torch

from benchmarks.measure import report
from benchmarks.table import cost_table
from benchmarks.train_step import Plan, add_flags, make_plan, measure
from common import cli
from models.flops import backbone_flops, head_flops
from models.projector import Projector
from models.sit import SiT
from models.targets import TARGETS
from training.throughput import training_flops


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.cost", "[--model NAME]")
    add_flags(parser)
    parser.add_argument("--no-timing", action="store_true", help="count only")
    return parser.parse_args()


def count_costs(planned: Plan, name: str) -> dict:
    """Of one way: parameters, FLOPs for an image, and how much more than without alignment they are."""
    network, data, align = planned.network, planned.data, planned.align(name)
    with torch.device("meta"):
        modules = {
            "backbone": [SiT(network)],
            "heads": [Projector(**entry["head"]) for entry in align],
        }
    external = [TARGETS[entry["method"]].cost(entry, network, data) for entry in align]
    parameters = {
        part: sum(p.numel() for module in each for p in module.parameters())
        for part, each in modules.items()
    }
    heads, targets = (
        sum(head_flops(network, entry["head"]) for entry in align),
        sum(flops for _, flops in external),
    )
    forward, training = (
        {"backbone": backbone_flops(network), "heads": heads, "targets": targets},
        training_flops(network, []),
    )
    return {
        "parameters": parameters | {"external": sum(size for size, _ in external)},
        "forward_flops": forward,
        "training_flops": training_flops(network, align, data),
        "more_parameters": parameters["heads"] / parameters["backbone"],
        "more_forward_flops": (heads + targets) / forward["backbone"],
        "more_training_flops": training_flops(network, align, data) / training - 1,
    }


def main() -> None:
    args = parse()
    names = [*dict.fromkeys(args.align)]
    planned = make_plan(args, names)
    result = {
        "model": args.model,
        "latent_size": args.latent_size,
        "results": {name: {} for name in names},
    }
    if not args.no_timing:
        result = measure(args, names)
    for name, figures in result["results"].items():
        figures |= count_costs(planned, name)
    result |= {"benchmark": "cost", "align": planned.config["align"]}
    report(result, args.json)
    print(f"\n{cost_table([result])}")


if __name__ == "__main__":
    cli.run(main)
