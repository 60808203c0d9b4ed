r"""Measure the cost of alignment: parameters, FLOPs, time and memory (Table 5 of the SRA 2 paper).

    python -m benchmarks.cost --model SiT-XL/2 --batch-size 256 --precision bf16 --compile \
        --align none sra2 repa irepa sra layersync selftrans sra2+repa

Parameters are counted for the backbone, for the heads, which are discarded after training, and for
external networks, which only compute targets. FLOPs are per image, and a multiply-accumulate
operation counts as two FLOPs (models/flops.py). Forward FLOPs are the sum over the backbone, the
heads and the targets. Training FLOPs are three times the forward FLOPs of the backbone and the
heads, plus the FLOPs of the targets. Steps are timed as in benchmarks/train_step.py. With
--no-timing, no step is timed, and the command takes about a second.
"""

import torch

from benchmarks.measure import write_result
from benchmarks.run_steps import Plan
from benchmarks.table import TABLES
from benchmarks.train_step import make_step_parser, measure_variants
from benchmarks.variants import StepConfig, make_plans
from common import cli
from common.config import read_flags
from models.flops import backbone_flops, head_flops
from models.projector import make_head
from models.sit import SiT
from models.targets import TARGETS
from training.alignment import head_specs
from training.throughput import training_flops


def count_costs(plan: Plan) -> dict:
    """Count parameters and FLOPs per image of a variant, and compute the increase by alignment."""
    network = plan.network
    align = plan.align
    specs = [spec for entry in align for spec in head_specs(entry).values()]
    external = [TARGETS[entry["method"]].cost(entry, network, plan.cache) for entry in align]
    with torch.device("meta"):
        heads = torch.nn.ModuleList(make_head(spec) for spec in specs)
        parameters = {
            "backbone": _count_parameters(SiT(network)),
            "heads": _count_parameters(heads),
            "external": sum(cost.parameters for cost in external),
        }
    forward = {
        "backbone": backbone_flops(network),
        "heads": sum(head_flops(network, spec) for spec in specs),
        "targets": sum(cost.flops for cost in external),
    }
    training = training_flops(network, align, plan.cache)
    baseline = training_flops(network, [], plan.cache)
    return {
        "parameters": parameters,
        "forward_flops": forward,
        "training_flops": training,
        "more_parameters": parameters["heads"] / parameters["backbone"],
        "more_forward_flops": (forward["heads"] + forward["targets"]) / forward["backbone"],
        "more_training_flops": training / baseline - 1,
    }


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    """Run the benchmark."""
    parser = make_step_parser(__doc__, "cost")
    parser.add_argument(
        "--no-timing", action="store_true", help="count parameters and FLOPs without timing steps"
    )
    args = parser.parse_args()
    config = read_flags(StepConfig, args)
    variants = list(dict.fromkeys(args.align))
    plans = make_plans(config, variants)
    result: dict
    if args.no_timing:
        result = {
            "model": config.model,
            "latent_size": config.latent_size,
            "results": {variant: {} for variant in variants},
        }
    else:
        result = measure_variants(config, variants, args.rounds, args.steps, args.warm_up)
    for variant, measurements in result["results"].items():
        measurements |= count_costs(plans[variant])
    align = {variant: plan.align for variant, plan in plans.items()}
    result |= {"benchmark": "cost", "align": align}
    write_result(result, args.json)
    print(f"\n{TABLES['cost'].format([result])}")


if __name__ == "__main__":
    cli.run(main)
