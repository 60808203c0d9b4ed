r"""Time the training step of train.py with and without alignment, alternately in one process.

    python -m benchmarks.train_step --model SiT-XL/2 --batch-size 256 --precision bf16 --compile \
        --json xl2.json

The inputs are random latents with the shape of ImageNet latents, and random images for repa. They
are in host memory, like the batches of a loader. The encoder of repa has random weights, which do
not affect the speed. All variants share the backbone, the EMA and the optimizer; on a GPU, the peak
memory of each variant is measured separately afterwards. `--plain` adds a minimal step that trains
the network of sra2: forward pass, both losses, backward pass and AdamW on interpolated inputs. It
omits gradient clipping, EMA, random numbers, logged quantities and the guard against non-finite
values. `--repa-repository` adds the step of REPA's own repository, with its encoder and with fixed
targets (see benchmarks/repa.py). `--accumulated` adds the step of each variant in several
micro-batches, to compare with recomputed blocks. `--shard` adds the step of each variant with a
sharded state, in one process. The first step of the first variant includes compilation.
benchmarks/cost.py also counts the parameters and FLOPs of each variant.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.measure import (
    Action,
    compare_times,
    describe_machine,
    make_parser,
    median_and_quartiles,
    time_call,
    time_interleaved,
    write_result,
)
from benchmarks.repa import REPA_STEPS, make_repa_steps
from benchmarks.run_steps import Plan, make_accelerator
from benchmarks.variant_steps import build_sharded_steps, build_steps, name_steps
from benchmarks.variants import (
    VARIANT_FLAGS,
    StepConfig,
    make_plans,
    make_synthetic_manifest,
    parse_variant,
    plan_groups,
)
from common import cli
from common.cli import UserError
from common.config import add_flags, read_flags
from common.tf32 import set_tf32
from models.flops import backbone_flops, head_flops
from models.targets import TARGETS
from training.alignment import head_specs
from training.config import autocast_dtype
from training.profiling import make_profiler, make_table
from training.throughput import measure_matmul_rate, training_flops

# Fields of StepConfig that the result contains.
RECORDED_SETTINGS = (
    "model",
    "batch_size",
    "latent_size",
    "compile",
    "activation_checkpointing",
    "recomputed_blocks",
    "shard",
    "allow_tf32",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Additions:
    """Optional measurements in addition to the steps of the variants.

    Attributes:
        repa_repository: A clone of REPA's repository, whose step is timed as well.
        kernel_table: File for the table of the operations of the last variant's step.
        accumulated_parts: Number of micro-batches of an additional step per variant, which does not
            recompute activations.
    """

    repa_repository: Path | None = None
    kernel_table: Path | None = None
    accumulated_parts: int | None = None


def make_step_parser(doc: str | None, benchmark: str) -> cli.Parser:
    """Return a parser with the flags that benchmarks/train_step.py and benchmarks/cost.py share."""
    parser = make_parser(doc, benchmark, rounds=20, warm_up=2)
    add_flags(parser, StepConfig)
    parser.add_argument(
        "--align",
        type=parse_variant,
        nargs="+",
        default=["none", "sra2"],
        metavar="VARIANT",
        help=f"variants to compare: none, {', '.join((*VARIANT_FLAGS, *TARGETS))}, or several "
        "methods joined by +, such as sra2+repa",
    )
    parser.add_argument(
        "--steps",
        type=cli.positive_int,
        help="steps per timed round (default: 10 on a GPU, 1 on a CPU)",
    )
    return parser


def build_all_steps(
    config: StepConfig, variants: list[str], accelerator: Accelerator, additions: Additions
) -> dict[str, Action]:
    """Build the steps of all variants and of REPA's repository, by name.

    Args:
        config: Settings of the steps.
        variants: Names of the variants.
        accelerator: Accelerator that determines the device and the precision.
        additions: Determines the steps in addition to one step per variant.
    """
    actions: dict[str, Action] = {}
    for group, plan in plan_groups(config, variants):
        actions |= build_steps(plan, accelerator, group, additions.accumulated_parts)
        actions |= build_sharded_steps(plan, accelerator, group)
    if additions.repa_repository:
        manifest = make_synthetic_manifest(config.latent_size)
        device = accelerator.device
        actions |= make_repa_steps(additions.repa_repository, config, manifest, device)
    return actions


def write_kernel_table(action: Action, device: torch.device, path: Path) -> None:
    """Profile three steps, and write a table of their operations by time."""
    with make_profiler(device) as profiler:
        for _ in range(3):
            action()
    path.write_text(make_table(profiler, device))


def measure_peak_memory(
    accelerator: Accelerator, build: Callable[[], dict[str, Action]]
) -> dict[str, float]:
    """Measure the peak GPU memory of steps in GiB, by the name of the step.

    Args:
        accelerator: Accelerator that determines the device.
        build: Builds the steps. All other steps must have been freed.
    """
    accelerator.free_memory()
    gc.collect()
    allocated = torch.cuda.memory_allocated(accelerator.device) / 2**30
    steps = build()
    timings = time_interleaved(steps, accelerator.device, rounds=1, warm_up=2)
    return {name: peak - allocated for name, peak in timings.peak_memory_gib.items()}


def measure_variant_memory(
    plan: Plan, accelerator: Accelerator, variant: str, accumulated_parts: int | None
) -> dict[str, float]:
    """Measure the peak GPU memory of the steps of one variant in GiB, by the name of the step."""
    peak_memory_gib = measure_peak_memory(
        accelerator, partial(build_steps, plan, accelerator, [variant], accumulated_parts)
    )
    sharded = measure_peak_memory(
        accelerator, partial(build_sharded_steps, plan, accelerator, [variant])
    )
    return peak_memory_gib | sharded


def measure_variants(
    config: StepConfig,
    variants: list[str],
    rounds: int,
    steps: int | None,
    warm_up: int,
    additions: Additions = Additions(),
) -> dict:
    """Time the steps of several variants alternately, and compare the times.

    Args:
        config: Settings of the steps.
        variants: Names of the variants.
        rounds: Number of timed rounds.
        steps: Number of steps per round. By default, 10 on a GPU and 1 on a CPU.
        warm_up: Number of untimed rounds before the timed rounds.
        additions: Optional measurements in addition to these steps.

    Returns:
        The result of the benchmark.

    Raises:
        UserError: If the settings contradict each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "this benchmark uses one process; run it without a launcher, or read the speed of "
            "several processes in the log of train.py"
        )
    accumulated_parts = additions.accumulated_parts
    plans = make_plans(config, variants)
    plan = plans[variants[0]]
    accelerator = make_accelerator(config.mixed_precision)
    set_tf32(config.allow_tf32)
    device = accelerator.device
    dtype = autocast_dtype(accelerator.mixed_precision)
    calls = steps or (10 if device.type == "cuda" else 1)

    # Measure the matmul rate before and after the timings, because machine speed drifts.
    rate_before = measure_matmul_rate(device, dtype, seconds=1.0)
    actions = build_all_steps(config, variants, accelerator, additions)
    variant_of_step = {
        name: variant
        for variant in variants
        for name in name_steps(variant, accumulated_parts)
        if name in actions
    }
    first_step_s = {name: time_call(action, device) for name, action in actions.items()}
    timings = time_interleaved(actions, device, rounds, calls, warm_up)
    rate = max(rate_before, measure_matmul_rate(device, dtype, seconds=1.0))
    if additions.kernel_table:
        write_kernel_table(actions[variants[-1]], device, additions.kernel_table)
    actions.clear()

    peak_memory_gib = dict(timings.peak_memory_gib)
    if device.type == "cuda":
        for variant in variants:
            peak_memory_gib |= measure_variant_memory(
                plans[variant], accelerator, variant, accumulated_parts
            )
    results = {}
    for name in dict.fromkeys([*variant_of_step, *timings.seconds]):  # grouped by variant
        step_s = median_and_quartiles(timings.seconds[name])
        images_per_s = config.batch_size / step_s["median"]
        results[name] = {
            "step_s": step_s,
            "images_per_s": images_per_s,
            "first_step_s": first_step_s[name],
        }
        if name in variant_of_step:
            align = plans[variant_of_step[name]].align
            flops_per_s = training_flops(plan.network, align, plan.cache) * images_per_s
            results[name]["matmul_share"] = flops_per_s / rate
            results[name]["peak_memory_gib"] = peak_memory_gib[name]
    methods = {entry["method"] for plan in plans.values() for entry in plan.align}
    pairs = [(variant, "none") for variant in variants if variant not in ("none", "plain")]
    pairs += [(name, variant) for name in REPA_STEPS for variant in variants]
    pairs += [(variant, name) for name, variant in variant_of_step.items() if name != variant]
    return {
        "benchmark": "train_step",
        "machine": describe_machine(device),
        **{key: getattr(config, key) for key in RECORDED_SETTINGS},
        "precision": accelerator.mixed_precision,
        "rounds": rounds,
        "steps": calls,
        "encoder_weights": "random" if "repa" in methods else None,
        "matmul_flops_per_s": rate,
        "forward_flops_per_image": backbone_flops(plan.network),
        "results": results,
        "ratios": compare_times(timings.seconds, [*pairs, ("sra2", "plain")]),
    }


def compute_head_share(plans: dict[str, Plan]) -> float:
    """Return the FLOPs of all heads of the variants, divided by those of the backbone."""
    entries = {str(entry): entry for plan in plans.values() for entry in plan.align}
    network = next(iter(plans.values())).network
    specs = [spec for entry in entries.values() for spec in head_specs(entry).values()]
    return sum(head_flops(network, spec) for spec in specs) / backbone_flops(network)


def main() -> None:
    """Run the benchmark."""
    parser = make_step_parser(__doc__, "train_step")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="also time a minimal step with only forward pass, backward pass and AdamW; this step "
        "has separate optimizer moments",
    )
    parser.add_argument(
        "--repa-repository",
        type=Path,
        metavar="DIR",
        help="clone of REPA's repository, whose training step is also timed",
    )
    parser.add_argument(
        "--kernel-table",
        type=Path,
        metavar="PATH",
        help="file for a table of the operations in the step of the last variant",
    )
    parser.add_argument(
        "--accumulated",
        type=cli.positive_int,
        metavar="N",
        help="also time each variant in N micro-batches per update, without recomputed blocks",
    )
    args = parser.parse_args()
    config = read_flags(StepConfig, args)
    if config.shard != "none" and args.plain:
        raise UserError("--shard compares variants: omit --plain")
    if args.accumulated:
        if args.plain or args.repa_repository:
            raise UserError("--accumulated compares variants: omit --plain and --repa-repository")
        if config.batch_size % args.accumulated:
            raise UserError(
                f"--batch-size {config.batch_size} is not a multiple of --accumulated "
                f"{args.accumulated}; choose another number of micro-batches"
            )
    variants = list(dict.fromkeys(args.align))
    if args.plain:
        variants.insert(0, "plain")
    additions = Additions(args.repa_repository, args.kernel_table, args.accumulated)
    result = measure_variants(config, variants, args.rounds, args.steps, args.warm_up, additions)
    result["head_flops_share"] = compute_head_share(make_plans(config, variants))
    write_result(result, args.json)


if __name__ == "__main__":
    cli.run(main)
