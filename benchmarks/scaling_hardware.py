"""GPUs, networks between them, and how a run is spread over them, for benchmarks/scaling.py."""

import math
from dataclasses import dataclass
from typing import NamedTuple

GPUS_PER_NODE = 8
# CUDA context, NCCL's buffers and cuBLAS's workspaces, which PyTorch does not count.
RESERVED_GIB = 3

# Share of the bandwidth on the data sheet that is assumed to be reached.
MEMORY_EFFICIENCY = 0.8
NVLINK_EFFICIENCY = 0.8
# NVIDIA states 46 of 50 GB/s per 400 Gb/s adapter (github.com/NVIDIA/nccl-tests, issue 290).
NETWORK_EFFICIENCY = 0.92

# Seconds per collective and per hop in NCCL's cost model (src/graph/tuning.cc, protocol Simple).
BASE_LATENCY = 8.4e-6
RING_LATENCIES = (3.4e-6, 14e-6)  # per hop within a node, per hop between nodes
TREE_LATENCIES = (4e-6, 14e-6)


class GPU(NamedTuple):
    """A GPU.

    Attributes:
        memory_gib: Memory that nvidia-smi reports.
        bytes_per_s: Memory bandwidth on the data sheet.
        nvlink_bytes_per_s: NVLink bandwidth in one direction on the data sheet.
    """

    memory_gib: float
    bytes_per_s: float
    nvlink_bytes_per_s: float


# Data sheets: nvidia.com/en-us/data-center/h100 (SXM) and h200. Both have the same peak rates.
GPUS = {"H100": GPU(79.6, 3.35e12, 450e9), "H200": GPU(140.4, 4.8e12, 450e9)}


class Network(NamedTuple):
    """The network between nodes.

    Attributes:
        adapters: Network adapters per node.
        gbit_per_s: Line rate of an adapter.
        description: Hardware that has this network.
    """

    adapters: int
    gbit_per_s: int
    description: str

    @property
    def node_bytes_per_s(self) -> float:
        """Line rate of all adapters of a node, in one direction."""
        return self.adapters * self.gbit_per_s * 1e9 / 8


NETWORKS = {
    "nvlink": Network(0, 0, "a single node"),
    "ib-400": Network(8, 400, "InfiniBand NDR, one adapter per GPU: DGX H100; also AWS p5 (EFA)"),
    "ib-200": Network(8, 200, "InfiniBand HDR, one adapter per GPU: DGX A100"),
    "ethernet-100": Network(1, 100, "one adapter per node"),
    "ethernet-25": Network(1, 25, "one adapter per node"),
}


@dataclass(frozen=True)
class Layout:
    """The number of GPUs of a run, and the sharding of its state over them.

    Args:
        num_gpus: Number of GPUs, one process each.
        shard: As --shard of train.py: "none" (DDP), "full" (sharded over all GPUs), "optimizer" (as
            full, but parameters stay gathered from the forward to the backward pass) or "hybrid"
            (sharded within each node and replicated across nodes).
    """

    num_gpus: int
    shard: str

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return math.ceil(self.num_gpus / GPUS_PER_NODE)

    @property
    def num_shards(self) -> int:
        """Number of GPUs over which the state is sharded."""
        if self.shard == "none":
            return 1
        return min(self.num_gpus, GPUS_PER_NODE) if self.shard == "hybrid" else self.num_gpus

    @property
    def reshards(self) -> bool:
        """Whether gathered parameters are freed after the forward pass."""
        return self.shard != "optimizer"

    @property
    def num_shard_nodes(self) -> int:
        """Number of nodes over which the state is sharded."""
        return math.ceil(self.num_shards / GPUS_PER_NODE)


@dataclass(frozen=True)
class Fabric:
    """The links of a cluster, and the time of collectives on them.

    A collective is a ring that enters and leaves each node once per adapter, so a node sends and
    receives at the rate of NVLink or of all of its adapters, whichever is lower.

    Args:
        gpu: The GPU.
        network: The network between nodes.
    """

    gpu: GPU
    network: Network

    def bandwidth(self, num_nodes: int) -> float:
        """Return the bytes per second that a ring over `num_nodes` nodes is assumed to reach."""
        nvlink = self.gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY
        if num_nodes == 1:
            return nvlink
        return min(nvlink, self.network.node_bytes_per_s * NETWORK_EFFICIENCY)

    def gather(self, num_bytes: float, ranks: int, num_nodes: int) -> "CollectiveTime":
        """Return the time of an all-gather, or of a reduce-scatter, of `num_bytes` in total."""
        if ranks == 1:
            return CollectiveTime(0, 0)
        transfer = (ranks - 1) / ranks * num_bytes / self.bandwidth(num_nodes)
        inner, outer = RING_LATENCIES
        hops_between_nodes = num_nodes - 1
        hops_within_nodes = ranks - 1 - hops_between_nodes
        latency = BASE_LATENCY + hops_within_nodes * inner + hops_between_nodes * outer
        return CollectiveTime(transfer, latency)

    def all_reduce(self, num_bytes: float, ranks: int, num_nodes: int) -> "CollectiveTime":
        """Return the time of an all-reduce of `num_bytes` on each rank."""
        if ranks == 1:
            return CollectiveTime(0, 0)
        transfer = 2 * (ranks - 1) / ranks * num_bytes / self.bandwidth(num_nodes)
        inner, outer = TREE_LATENCIES
        ranks_per_node = math.ceil(ranks / num_nodes)
        latency = BASE_LATENCY
        latency += 2 * ((ranks_per_node - 1) * inner + math.log2(num_nodes) * outer)
        return CollectiveTime(transfer, latency)


class CollectiveTime(NamedTuple):
    """Seconds of one or several collectives."""

    transfer: float  # number of bytes divided by the bandwidth
    latency: float  # does not depend on the number of bytes

    def times(self, count: float) -> "CollectiveTime":
        """Return the time of `count` such collectives, one after the other."""
        return CollectiveTime(self.transfer * count, self.latency * count)

    def plus(self, other: "CollectiveTime") -> "CollectiveTime":
        """Return the time of both, one after the other."""
        return CollectiveTime(self.transfer + other.transfer, self.latency + other.latency)

    @property
    def seconds(self) -> float:
        """Total seconds."""
        return self.transfer + self.latency
