"""Shard the state of a run over its processes with FSDP2 (`torch.distributed.fsdp.fully_shard`).

Every process holds some rows of each parameter, gradient, optimizer moment and EMA. The parameters
of a block are gathered before the block runs. Sharded tensors are DTensors with the same names and
shapes as without sharding.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from common.cli import UserError
from common.watchdog import waiting_for_processes
from models.aligned_sit import AlignedSiT
from models.sit import SiT
from training.coordination import gather_objects


class Rows(NamedTuple):
    """The rows of a tensor that this process holds."""

    tensor: Tensor
    first: int  # index of the first row in the whole tensor


class Sharding:
    """Places the networks of a run on a mesh of processes. All processes must construct it.

    Args:
        mode: full: shard over all processes; hybrid: shard over the processes of a node, and
            replicate over nodes; optimizer: as full, but parameters stay gathered from the forward
            to the backward pass, which saves communication and costs memory.
        device: Device of the training step.
        num_nodes: Number of nodes with the same number of processes; used with hybrid.
        dtype: Dtype of matrix products, in which the parameters of blocks are gathered.
    """

    def __init__(
        self,
        mode: str,
        device: torch.device,
        num_nodes: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.mode = mode
        self.device = device
        num_replicas = num_nodes if mode == "hybrid" else 1
        sizes = (num_replicas, dist.get_world_size() // num_replicas)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
        self.mesh = mesh if num_replicas > 1 else mesh["shard"]
        self.num_shards = sizes[1]
        self.shard_index = mesh.get_local_rank("shard")
        self.is_first_replica = mesh.get_local_rank("replicate") == 0
        self.rank = dist.get_rank()
        # Without sharding, autocast converts the same parameters, because matrix products use them.
        # Only those of QK normalization are converted here, but not by autocast. The inputs of a
        # block stay in float32, as without sharding.
        self.block_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def apply(self, model: AlignedSiT, emas: list[SiT]) -> None:
        """Shard networks on the meta device, and allocate their rows on the device of the run.

        Values are undefined afterwards; see `copy_from_first_process`.
        """
        reshard_after_forward = self.mode != "optimizer"
        for block in model.backbone.blocks:
            fully_shard(
                block,
                mesh=self.mesh,
                mp_policy=self.block_policy,
                reshard_after_forward=reshard_after_forward,
            )
        fully_shard(model, mesh=self.mesh)
        for ema in emas:
            # EMAs are resharded even after the last block, because their rows change in each step.
            for block in ema.blocks:
                fully_shard(
                    block,
                    mesh=self.mesh,
                    mp_policy=self.block_policy,
                    reshard_after_forward=True,
                )
            fully_shard(ema, mesh=self.mesh, reshard_after_forward=True)
            register_fsdp_forward_method(ema, "compute_block_tokens")
        for network in (model, *emas):
            allocate(network, self.device)

    def describe(self) -> str:
        """Return a message about the placement of the state."""
        parts = "gradients, optimizer state and EMAs"
        if self.mode != "optimizer":
            parts = f"parameters, {parts}"
        num_replicas = dist.get_world_size() // self.num_shards
        replicas = f", in {num_replicas} replicas" if num_replicas > 1 else ""
        return f"{parts} are sharded over {self.num_shards} processes{replicas}"

    def copy_from_first_process(self, target: nn.Module, source: nn.Module | None) -> None:
        """Copy the weights of an unsharded network on the first process to a sharded network.

        Args:
            target: The sharded network.
            source: The unsharded network; used only on the first process.
        """
        values = source.state_dict() if source is not None else {}
        with waiting_for_processes("the weights of the first process"):
            for name, sharded in target.state_dict().items():
                whole = torch.empty(sharded.shape, dtype=sharded.dtype, device=self.device)
                if self.rank == 0:
                    whole.copy_(values[name])
                dist.broadcast(whole, src=0)
                rows = self.get_rows(sharded)
                rows.tensor.copy_(whole[rows.first : rows.first + len(rows.tensor)])
            if self.device.type == "cuda":  # so that the wait is reported here
                torch.cuda.synchronize(self.device)

    def get_rows(self, tensor: Tensor) -> Rows:
        """Return the rows of a tensor that this process holds, which share memory with it.

        A tensor that is not sharded is the same on all processes and is returned whole.
        """
        if not isinstance(tensor, DTensor):
            return Rows(tensor, 0)
        num_rows_per_shard = math.ceil(tensor.shape[0] / self.num_shards)
        first = min(self.shard_index * num_rows_per_shard, tensor.shape[0])
        return Rows(tensor.to_local(), first)

    def stores(self, tensor: Tensor) -> bool:
        """Return whether this process writes its rows of a tensor to checkpoints."""
        if not self.is_first_replica:
            return False
        if isinstance(tensor, DTensor):
            return len(tensor.to_local()) > 0
        return self.shard_index == 0

    def gather(self, ema: SiT, network: SiT) -> None:
        """Copy a sharded EMA to an unsharded network. All processes must call this."""
        values = network.state_dict()
        with waiting_for_processes("the weights of the other processes"):
            for name, tensor in ema.state_dict().items():
                values[name].copy_(gather_tensor(tensor))
            if self.device.type == "cuda":  # so that the wait is reported here
                torch.cuda.synchronize(self.device)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Accumulate the gradients on this process, without reducing them.

        With `--shard optimizer`, the parameters also stay gathered for the next micro-batch.
        """
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(self.mode != "optimizer")
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)


def wrap_sharded(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap a sharded network and its optimizer for mixed precision, without DDP."""
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(optimizer, device_placement=False)


def wrap_with_ddp(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap an unsharded network and its optimizer for mixed precision and DDP."""
    return accelerator.prepare(model, optimizer)


def make_sharding(mode: str, accelerator: Accelerator, dtype: torch.dtype) -> Sharding | None:
    """Return the sharding of a run, or None if its networks are replicated (DDP).

    Args:
        mode: One of SHARD_MODES.
        accelerator: The accelerator.
        dtype: Dtype of matrix products.

    Raises:
        UserError: The processes cannot be divided into nodes of equal size.
    """
    if mode == "none":
        return None
    if not dist.is_initialized():  # a single process without a launcher
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    num_nodes = count_nodes() if mode == "hybrid" else 1
    return Sharding(mode, accelerator.device, num_nodes, dtype)


def count_nodes() -> int:
    """Return the number of nodes of equal size. All processes must call this.

    Raises:
        UserError: The nodes have different sizes, or the launcher does not state them.
    """
    sizes = gather_objects(os.environ.get("LOCAL_WORLD_SIZE"))
    num_processes = len(sizes)
    if num_processes == 1:
        return 1
    if None in sizes:
        raise UserError(
            "--shard hybrid needs LOCAL_WORLD_SIZE, the number of processes on this node; start "
            "the command with torchrun or accelerate launch, or use --shard full"
        )
    if len(set(sizes)) > 1 or num_processes % int(sizes[0]):
        # A node of N processes reports its size N times.
        per_node = [str(n) for n in sorted(map(int, set(sizes)))]
        raise UserError(
            f"--shard hybrid needs the same number of processes on every node, but "
            f"{num_processes} processes are on nodes of {' and '.join(per_node)}; use --shard full"
        )
    return num_processes // int(sizes[0])


def allocate(network: nn.Module, device: torch.device) -> None:
    """Allocate the parameters of a network on a device, with undefined values."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor. If it is sharded, all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
