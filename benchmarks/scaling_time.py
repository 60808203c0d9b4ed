"""Compute the time of a training step on several GPUs, for benchmarks/scaling.py."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.scaling_hardware import (
    GPUS,
    MEMORY_EFFICIENCY,
    CollectiveTime,
    Fabric,
    Layout,
)
from benchmarks.scaling_memory import FLOAT32, Parameters, count_parameters
from benchmarks.variants import StepConfig, make_plan
from common.cli import UserError, describe_read_error
from training.throughput import training_flops

# Bytes of memory traffic per parameter after the backward pass (docs/performance.md).
CLIPPING_BYTES = 12
ADAMW_BYTES = 28
EMA_BYTES = 12  # per parameter of an EMA

DDP_BUCKET_BYTES = 25 * 2**20  # default of PyTorch
NUM_SMALL_REDUCTIONS = 2  # gradient norm or guard, and the flags that stop all processes together
BACKWARD_SHARE = 2 / 3  # of the FLOPs of a step


class Measurement(NamedTuple):
    """A measured training step on one GPU (benchmarks/train_step.py).

    Attributes:
        path: File of the measurement.
        result: Its content.
        variant: The variant of alignment whose step is used.
    """

    path: Path
    result: dict
    variant: str

    @property
    def gpu(self) -> str:
        """Name of the GPU, a key of GPUS."""
        return next(name for name in GPUS if name in self.result["machine"]["device"])

    @property
    def values(self) -> dict:
        """The measured values of the variant."""
        return self.result["results"][self.variant]

    @property
    def flops_per_s(self) -> float:
        """Rate of the forward and backward pass.

        The time of the update, computed from its memory traffic, is subtracted from the step time.
        """
        result = self.result
        config = StepConfig(model=result["model"], latent_size=result["latent_size"])
        plan = make_plan(config, [self.variant])
        flops = training_flops(plan.network, plan.align, plan.cache) * result["batch_size"]
        update_bytes = count_update_bytes(count_parameters(plan))
        update_s = update_bytes / (GPUS[self.gpu].bytes_per_s * MEMORY_EFFICIENCY)
        return flops / (self.values["step_s"]["median"] - update_s)


def load_measurement(path: Path, variant: str) -> Measurement:
    """Load the measurement from which the computing rate is derived.

    Raises:
        UserError: The file is not a result of benchmarks.train_step on a known GPU.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--measured {path} cannot be read ({describe_read_error(error)}); pass a result of "
            "benchmarks.train_step"
        ) from None
    device = result.get("machine", {}).get("device", "")
    if result.get("benchmark") != "train_step" or not any(name in device for name in GPUS):
        raise UserError(
            f"--measured {path}: this is not a result of benchmarks.train_step on one of "
            f"{', '.join(GPUS)}; pass such a result"
        )
    if variant not in result["results"]:
        variant = "sra2" if "sra2" in result["results"] else next(iter(result["results"]))
    return Measurement(path, result, variant)


def count_update_bytes(parameters: Parameters) -> int:
    """Return the bytes of memory traffic of clipping, AdamW and the EMAs without sharding."""
    return (CLIPPING_BYTES + ADAMW_BYTES) * parameters.trained + EMA_BYTES * parameters.emas


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step.

    Args:
        compute_s: Forward and backward passes.
        update_s: Clipping, AdamW and EMAs.
        communication: All collectives, most of which overlap with the computation.
        exposed_s: The part of the communication for which the GPU waits.
    """

    compute_s: float
    update_s: float
    communication: CollectiveTime
    exposed_s: float

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return self.compute_s + self.update_s + self.exposed_s

    @property
    def limit(self) -> str:
        """The largest part of the step: compute, update, network or latency."""
        latency_share = 0.0
        if self.communication.seconds:
            latency_share = self.communication.latency / self.communication.seconds
        seconds = {
            "compute": self.compute_s,
            "update": self.update_s,
            "network": self.exposed_s * (1 - latency_share),
            "latency": self.exposed_s * latency_share,
        }
        return max(seconds, key=lambda name: seconds[name])


@dataclass(frozen=True)
class TimeModel:
    """Computes the time of a training step.

    Args:
        flops: FLOPs of the forward and backward pass per image.
        parameters: Numbers of parameters.
        wire_bytes: Bytes of a parameter in an all-gather.
        flops_per_s: Rate of the forward and backward pass.
        fabric: The GPUs and the network.
    """

    flops: int
    parameters: Parameters
    wire_bytes: int
    flops_per_s: float
    fabric: Fabric

    def compute(
        self, layout: Layout, micro_batch: int, accumulation: int = 1, recomputed_blocks: int = 0
    ) -> StepTime:
        """Return the time of a step; the arguments are those of `MemoryModel.parts`."""
        # Recomputation adds a forward pass of these blocks, a third of their FLOPs.
        recomputed_share = recomputed_blocks / self.parameters.depth / 3
        micro_s = micro_batch * self.flops * (1 + recomputed_share) / self.flops_per_s
        update_bytes = count_update_bytes(self.parameters) / layout.num_shards
        update_s = update_bytes / (self.fabric.gpu.bytes_per_s * MEMORY_EFFICIENCY)
        communication, exposed_s = self._communicate(layout, micro_s, accumulation)
        return StepTime(accumulation * micro_s, update_s, communication, exposed_s)

    def _communicate(
        self, layout: Layout, micro_s: float, accumulation: int
    ) -> tuple[CollectiveTime, float]:
        """Return the time of all collectives, and how long the GPU waits for them."""
        ranks, nodes = layout.num_gpus, layout.num_nodes
        small = self.fabric.all_reduce(0, ranks, nodes).times(NUM_SMALL_REDUCTIONS)
        forward_s = (1 - BACKWARD_SHARE) * micro_s
        backward_s = BACKWARD_SHARE * micro_s
        reduction, last_reduction = self._reduce(layout)
        if layout.num_shards == 1:
            exposed_s = max(last_reduction.seconds, reduction.seconds - backward_s)
            return reduction.plus(small), exposed_s + small.seconds

        # Each micro-batch gathers the blocks in the forward pass, and again in the backward pass if
        # they were resharded. The gradients are reduced with the last micro-batch.
        blocks, outside, teacher = self._gather(layout)
        in_forward = outside.plus(blocks).plus(teacher)
        in_backward = blocks if layout.reshards else CollectiveTime(0, 0)
        in_last_backward = in_backward.plus(reduction)
        forward_wait = max(outside.seconds, in_forward.seconds - forward_s)
        backward_wait = max(0.0, in_backward.seconds - backward_s)
        last_wait = max(last_reduction.seconds, in_last_backward.seconds - backward_s)
        exposed_s = accumulation * forward_wait + (accumulation - 1) * backward_wait + last_wait
        gathers = in_forward.plus(in_backward).times(accumulation)
        return gathers.plus(reduction).plus(small), exposed_s + small.seconds

    def _gather(self, layout: Layout) -> tuple[CollectiveTime, CollectiveTime, CollectiveTime]:
        """Return the time to gather the blocks, the other parameters, and the teacher's blocks.

        The parameters outside the blocks are gathered in float32.
        """
        parameters = self.parameters
        shards, nodes = layout.num_shards, layout.num_shard_nodes
        block = self.fabric.gather(self.wire_bytes * parameters.block, shards, nodes)
        outside = self.fabric.gather(FLOAT32 * parameters.outside_blocks, shards, nodes)
        teacher = block.times(parameters.teacher / parameters.block)
        return block.times(parameters.depth), outside, teacher

    def _reduce(self, layout: Layout) -> tuple[CollectiveTime, CollectiveTime]:
        """Return the time to reduce all gradients in float32, and the last ones of them."""
        parameters = self.parameters
        ranks, nodes = layout.num_gpus, layout.num_nodes
        if layout.num_shards == 1:
            num_buckets = math.ceil(FLOAT32 * parameters.trained / DDP_BUCKET_BYTES)
            bytes_per_bucket = FLOAT32 * parameters.trained / num_buckets
            bucket = self.fabric.all_reduce(bytes_per_bucket, ranks, nodes)
            return bucket.times(num_buckets), bucket

        def reduce(num_parameters: int) -> CollectiveTime:
            num_bytes = FLOAT32 * num_parameters
            shards, shard_nodes = layout.num_shards, layout.num_shard_nodes
            scattered = self.fabric.gather(num_bytes, shards, shard_nodes)
            # All ranks of a node reduce their shards across the nodes at the same time.
            replicas = ranks // shards
            return scattered.plus(self.fabric.all_reduce(num_bytes, replicas, replicas))

        block = reduce(parameters.block)
        rest = reduce(parameters.outside_blocks)
        return block.times(parameters.depth).plus(rest), rest
