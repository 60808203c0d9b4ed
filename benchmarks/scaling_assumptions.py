"""List the assumptions of benchmarks/scaling.py, which its result and docs/scale.md contain."""

from benchmarks.scaling_hardware import (
    BASE_LATENCY,
    GPUS,
    GPUS_PER_NODE,
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    NETWORKS,
    NVLINK_EFFICIENCY,
    RESERVED_GIB,
    RING_LATENCIES,
    TREE_LATENCIES,
)
from benchmarks.scaling_time import Measurement


def list_assumptions(measurement: Measurement) -> list[dict[str, str]]:
    """Return the assumptions of the computation, each with its value and its source."""
    result = measurement.result
    rate = measurement.flops_per_s
    ring_within, ring_between = (1e6 * seconds for seconds in RING_LATENCIES)
    tree_within, tree_between = (1e6 * seconds for seconds in TREE_LATENCIES)
    networks = "; ".join(
        f"`{name}`: {network.adapters} x {network.gbit_per_s} Gb/s ({network.description})"
        for name, network in NETWORKS.items()
        if network.adapters
    )
    rows = [
        (
            "rate of forward and backward passes",
            f"{rate / 1e12:.0f} TFLOP/s in {result['precision']}, "
            f"{rate / result['matmul_flops_per_s']:.0%} of the measured rate of matrix products, "
            "for all models and batch sizes; other GPUs and precisions in proportion to peak rates",
            f"`{measurement.path.name}`: {result['model']}, batch {result['batch_size']}, "
            f"compiled, {result['machine']['device']}",
        ),
        (
            "memory bandwidth",
            f"{MEMORY_EFFICIENCY:.0%} of "
            + ", ".join(f"{gpu.bytes_per_s / 1e12:g} TB/s ({name})" for name, gpu in GPUS.items()),
            "data sheets; the share is assumed",
        ),
        (
            "memory of a GPU",
            ", ".join(f"{gpu.memory_gib:g} GiB ({name})" for name, gpu in GPUS.items())
            + f", of which {RESERVED_GIB} GiB are reserved",
            "nvidia-smi; CUDA, NCCL and cuBLAS need the rest (assumed)",
        ),
        (
            "NVLink within a node",
            f"{GPUS_PER_NODE} GPUs, {NVLINK_EFFICIENCY:.0%} of 450 GB/s per direction",
            "data sheets; the share is assumed",
        ),
        (
            "network between nodes",
            f"{NETWORK_EFFICIENCY:.0%} of the line rate; {networks}",
            "nccl-tests, issue 290: 46 of 50 GB/s per adapter with InfiniBand",
        ),
        (
            "latency of an all-gather or a reduce-scatter",
            f"{1e6 * BASE_LATENCY:g} us, and per hop {ring_within:g} us in a node and "
            f"{ring_between:g} us between nodes; as many hops as GPUs (ring)",
            "cost model of NCCL, src/graph/tuning.cc",
        ),
        (
            "latency of an all-reduce",
            f"{1e6 * BASE_LATENCY:g} us, and per hop {tree_within:g} us in a node and "
            f"{tree_between:g} us between nodes; log2(nodes) hops between nodes (tree)",
            "cost model of NCCL, src/graph/tuning.cc",
        ),
        (
            "overlap",
            "collectives overlap with the forward or backward pass that they belong to, except for "
            "the first or the last one, and do not slow it down",
            "assumed",
        ),
        (
            "not included",
            "waiting for data, launching kernels, uneven GPUs, fragmented memory, previews, "
            "checkpoints",
            "",
        ),
    ]
    return [{"name": name, "value": value, "source": source} for name, value, source in rows]
