r"""Compute the memory per GPU and the time of a training step on many GPUs.

    python -m benchmarks.scaling --model SiT-XL/2 SiT-3B/2 --gpus 1 8 64 512 --network ib-400 \
        --batch-size 256 4096 --json scaling.json

The command runs no step, and no step on several GPUs has been measured. Memory is counted from
parameters and from the tensors that autograd stores (benchmarks/scaling_memory.py). Times are FLOPs
divided by a measured rate, and bytes divided by bandwidths (benchmarks/scaling_time.py). The output
lists all assumptions. docs/scale.md contains results.

Each row accumulates over the smallest number of micro-batches that fits into the GPU's memory.
Combinations that are the same as another row are omitted: sharding on one GPU, and hybrid sharding
on one node.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import make_parser, write_result
from benchmarks.run_steps import Plan
from benchmarks.scaling_assumptions import list_assumptions
from benchmarks.scaling_hardware import (
    GPUS,
    GPUS_PER_NODE,
    NETWORKS,
    RESERVED_GIB,
    Fabric,
    Layout,
)
from benchmarks.scaling_memory import (
    FLOAT32,
    MemoryModel,
    Parameters,
    count_parameters,
    count_stored_bytes,
)
from benchmarks.scaling_time import (
    Measurement,
    StepTime,
    TimeModel,
    load_measurement,
)
from benchmarks.table import RESULTS, TABLES
from benchmarks.variants import StepConfig, make_plan, parse_variant
from common import cli
from common.cli import UserError
from models.flops import backbone_flops
from models.sit import PRESETS
from training.config import SHARD_MODES, autocast_dtype
from training.peak_rates import PEAK_TFLOPS
from training.throughput import training_flops

GIB = 2**30
MEASURED_STEP = RESULTS / "train-step-xl2-b64-h200.json"
MEASURED_CHECKPOINT = RESULTS / "checkpoint-b2-cpu.json"
PREVIEW_PASSES = 80 * 50 * 2  # images, steps, with and without label


class Case(NamedTuple):
    """One row of the result.

    Attributes:
        layout: Number of GPUs and sharding.
        batch_size: Images per update on all GPUs.
        recomputed_blocks: Blocks whose activations are recomputed.
    """

    layout: Layout
    batch_size: int
    recomputed_blocks: int


@dataclass(frozen=True)
class Scenario:
    """A model and a cluster, and the models of memory and time for them.

    Args:
        model: Name of the preset.
        plan: The plan of the run.
        precision: Mixed precision.
        gpu: Name of the GPU.
        network: Name of the network.
        measurement: The measured step on one GPU.
        memory: Computes the memory.
        time: Computes the time.
    """

    model: str
    plan: Plan
    precision: str
    gpu: str
    network: str
    measurement: Measurement
    memory: MemoryModel
    time: TimeModel

    @property
    def parameters(self) -> Parameters:
        """Numbers of parameters."""
        return self.memory.parameters

    def compute_row(self, case: Case) -> dict:
        """Return the memory and the time of a case."""
        layout = case.layout
        row = {
            "model": self.model,
            "gpu": self.gpu,
            "num_gpus": layout.num_gpus,
            "shard": layout.shard,
            "network": self.network if layout.num_nodes > 1 else None,
            "precision": self.precision,
            "batch_size": case.batch_size,
            "recomputed_blocks": case.recomputed_blocks,
        }
        images, remainder = divmod(case.batch_size, layout.num_gpus)
        if remainder:
            return row | {"shard": None, "limit": "batch"}

        # Accumulate over as few micro-batches as fit, or over single images if nothing fits.
        for accumulation in range(1, images + 1):
            if images % accumulation:
                continue
            micro_batch = images // accumulation
            sizes = (layout, micro_batch, accumulation, case.recomputed_blocks)
            parts = self.memory.parts(*sizes)
            if self.fits(parts):
                break
        step = self.time.compute(*sizes)
        limit = step.limit if self.fits(parts) else "memory"
        row |= {"micro_batch": micro_batch, "accumulation": accumulation, "limit": limit}
        row |= describe_memory(parts) | describe_time(step, case.batch_size)
        return row | self.get_measured(row)

    def fits(self, parts: dict[str, float]) -> bool:
        """Return whether the memory suffices."""
        return sum(parts.values()) / GIB + RESERVED_GIB <= GPUS[self.gpu].memory_gib

    def get_measured(self, row: dict) -> dict:
        """Return the measured values if the row has the settings of the measurement."""
        result = self.measurement.result
        variant = "+".join(entry["method"] for entry in self.plan.align) or "none"
        has_same_settings = (
            row["num_gpus"] == row["accumulation"] == 1
            and not row["recomputed_blocks"]
            and all(row[key] == result[key] for key in ("model", "batch_size", "precision"))
            and row["gpu"] == self.measurement.gpu
            and variant == self.measurement.variant
        )
        if not has_same_settings:
            return {}
        values = self.measurement.values
        return {
            "measured_step_s": values["step_s"]["median"],
            "measured_memory_gib": values["peak_memory_gib"],
        }

    def describe_model(self) -> dict:
        """Return properties of the model that do not depend on the number of GPUs."""
        checkpoint = json.loads(MEASURED_CHECKPOINT.read_text())
        parameters = self.parameters
        # Weights, two moments of AdamW, and the EMAs.
        checkpoint_bytes = FLOAT32 * (3 * parameters.trained + parameters.emas)
        copy_rate = checkpoint["bytes"] / checkpoint["results"]["copy_s"]["median"]
        preview_flops = PREVIEW_PASSES * backbone_flops(self.plan.network)
        return {
            "model": self.model,
            "parameters": parameters.backbone,
            "head_parameters": parameters.heads,
            "training_flops": self.time.flops,
            "stored_bytes_per_image": self.memory.activation_bytes(),
            "checkpoint_bytes": checkpoint_bytes,
            "checkpoint_copy_s": checkpoint_bytes / copy_rate,
            "checkpoint_write_s": checkpoint_bytes / checkpoint["write_bytes_per_s"],
            "preview_s": preview_flops / self.time.flops_per_s / GPUS_PER_NODE,
        }


def describe_memory(parts: dict[str, float]) -> dict:
    """Return the entries of a row about the memory."""
    return {
        "memory_gib": sum(parts.values()) / GIB,
        "memory_parts_gib": {name: num_bytes / GIB for name, num_bytes in parts.items()},
    }


def describe_time(step: StepTime, batch_size: int) -> dict:
    """Return the entries of a row about the time."""
    return {
        "step_s": step.step_s,
        "compute_s": step.compute_s,
        "update_s": step.update_s,
        "communication_s": step.communication.seconds,
        "exposed_s": step.exposed_s,
        "images_per_s": batch_size / step.step_s,
    }


def make_scenarios(
    model: str,
    variant: str,
    precision: str,
    gpu: str,
    networks: list[str],
    measurement: Measurement,
) -> list[Scenario]:
    """Build the models of memory and time for each network.

    Args:
        model: Name of the preset.
        variant: Variant of alignment.
        precision: Mixed precision.
        gpu: Name of the GPU.
        networks: Names of the networks.
        measurement: The measured step on one GPU.
    """
    plan = make_plan(StepConfig(model=model), [variant])
    parameters = count_parameters(plan)
    wire_bytes = autocast_dtype(precision).itemsize
    stored = count_stored_bytes(plan, precision)
    memory = MemoryModel(parameters, stored, wire_bytes)
    flops = training_flops(plan.network, plan.align, plan.cache)

    # The measured rate applies to the measured precision and GPU; scale it by the peak rates.
    rate = measurement.flops_per_s * peak_rate(gpu, precision)
    rate /= peak_rate(measurement.gpu, measurement.result["precision"])
    scenarios = []
    for network in networks:
        fabric = Fabric(GPUS[gpu], NETWORKS[network])
        time = TimeModel(flops, parameters, wire_bytes, rate, fabric)
        scenarios.append(Scenario(model, plan, precision, gpu, network, measurement, memory, time))
    return scenarios


def peak_rate(gpu: str, precision: str) -> float:
    """Return the peak rate of matrix products in TFLOP/s; those in float32 do not use TF32."""
    half_precision, _, float32 = PEAK_TFLOPS[gpu]
    return float32 if precision == "no" else half_precision


def list_cases(
    gpus: list[int], shardings: list[str], batch_sizes: list[int], recomputed_blocks: int
) -> Iterator[Case]:
    """Yield the cases of the result, without those that are the same as another.

    Args:
        gpus: Numbers of GPUs.
        shardings: Values of --shard.
        batch_sizes: Global batch sizes.
        recomputed_blocks: Blocks whose activations are recomputed.
    """
    for batch_size in batch_sizes:
        for num_gpus in gpus:
            if batch_size % num_gpus:  # cannot run with any sharding
                yield Case(Layout(num_gpus, shardings[0]), batch_size, recomputed_blocks)
                continue
            for shard in shardings:
                is_duplicate = shard != "none" and num_gpus == 1
                is_duplicate |= shard == "hybrid" and num_gpus <= GPUS_PER_NODE
                if not is_duplicate or shardings == [shard]:
                    yield Case(Layout(num_gpus, shard), batch_size, recomputed_blocks)


def make_scaling_parser() -> cli.Parser:
    """Return the parser of the command line."""
    parser = make_parser(__doc__, "scaling")
    add_list = partial(parser.add_argument, nargs="+")
    add = parser.add_argument
    add_list("--model", choices=PRESETS, default=["SiT-XL/2"], metavar="NAME", help="presets")
    add_list("--gpus", type=cli.positive_int, default=[1, 8, 64, 512], help="numbers of GPUs")
    add_list(
        "--shard", choices=SHARD_MODES, default=list(SHARD_MODES), help="as --shard of train.py"
    )
    add_list("--batch-size", type=cli.positive_int, default=[256], help="images per update")
    add_list("--network", choices=NETWORKS, default=["ib-400"], help="networks between nodes")
    add("--gpu", choices=GPUS, default="H200", help="the GPU")
    add("--precision", choices=("no", "fp16", "bf16"), default="bf16", help="mixed precision")
    add("--align", type=parse_variant, default="sra2", metavar="VARIANT", help="alignment methods")
    add(
        "--recomputed-blocks",
        type=cli.non_negative_int,
        default=0,
        help="as --recomputed-blocks of train.py with --activation-checkpointing",
    )
    add(
        "--measured",
        type=Path,
        default=MEASURED_STEP,
        metavar="PATH",
        help="result of benchmarks.train_step on one GPU, from which the computing rate is derived",
    )
    return parser


def main() -> None:
    """Run the computation."""
    args = make_scaling_parser().parse_args()
    if "nvlink" in args.network and max(args.gpus) > GPUS_PER_NODE:
        raise UserError(
            f"--network nvlink connects only the {GPUS_PER_NODE} GPUs of a node; pass another "
            f"network, or --gpus of at most {GPUS_PER_NODE}"
        )
    for name in args.model:
        if args.recomputed_blocks > PRESETS[name]["depth"]:
            raise UserError(
                f"--recomputed-blocks {args.recomputed_blocks}: {name} has only "
                f"{PRESETS[name]['depth']} blocks"
            )
    measurement = load_measurement(args.measured, args.align)
    networks = list(dict.fromkeys(args.network))
    scenarios = []
    for name in dict.fromkeys(args.model):
        scenarios += make_scenarios(
            name, args.align, args.precision, args.gpu, networks, measurement
        )
    cases = list(list_cases(args.gpus, args.shard, args.batch_size, args.recomputed_blocks))
    rows = [scenario.compute_row(case) for scenario in scenarios for case in cases]
    result = {
        "benchmark": "scaling",
        "measured": measurement.path.name,
        "align": args.align,
        "models": list({s.model: s.describe_model() for s in scenarios}.values()),
        "rows": rows,
        "assumptions": list_assumptions(measurement),
    }
    write_result(result, args.json)
    for name in ("scaling", "scaling_models", "scaling_assumptions"):
        print(f"\n{TABLES[name].format([result])}")


if __name__ == "__main__":
    cli.run(main)
