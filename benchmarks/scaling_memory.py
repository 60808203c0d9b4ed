"""Count the memory of a training step per GPU, for benchmarks/scaling.py.

The bytes that the backward pass needs are counted by tracing the forward pass of the network
without data (FakeTensorMode) and adding up the tensors that autograd stores. Everything else is a
number of parameters times bytes. The optimizer is AdamW, with two moments.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.run_steps import Plan
from benchmarks.scaling_hardware import Layout
from models.aligned_sit import AlignedSiT
from models.sit import SiT
from models.targets import TARGETS
from training.alignment import build_aligned_network
from training.config import autocast_dtype

FLOAT32 = 4
# A compiled block is partitioned as by torch.compile's default backend, but runs uncompiled.
PARTITION_BACKEND = "aot_eager_decomp_partition"


class Parameters(NamedTuple):
    """Numbers of parameters of a run.

    Attributes:
        backbone: Parameters of the backbone.
        heads: Parameters of the alignment heads.
        emas: Parameters of all EMAs of the backbone.
        block: Parameters of one block.
        depth: Number of blocks.
        external: Parameters of networks that only compute targets.
        teacher: Parameters of the EMA's blocks that compute targets (sra).
    """

    backbone: int
    heads: int
    emas: int
    block: int
    depth: int
    external: int
    teacher: int

    @property
    def trained(self) -> int:
        """Parameters of the backbone and the heads."""
        return self.backbone + self.heads

    @property
    def outside_blocks(self) -> int:
        """Parameters that do not belong to a block: embeddings, output layer, heads."""
        return self.trained - self.depth * self.block


class StoredBytes(NamedTuple):
    """Bytes that autograd stores for the backward pass.

    Attributes:
        block: Bytes per image and block.
        block_input: Bytes per image of the input of a block, which a recomputed block stores.
        outside_blocks: Bytes per image of the embeddings, the output layer and the heads.
        block_copies: Bytes of the weights of a block that autocast converted.
        outside_copies: Bytes of the other weights that autocast converted.
        gradients: Bytes per image of the largest gradients that the backward pass of a block holds.
    """

    block: float
    block_input: float
    outside_blocks: float
    block_copies: int
    outside_copies: int
    gradients: float


def count_parameters(plan: Plan) -> Parameters:
    """Count the parameters of a run."""
    with torch.device("meta"):
        model = build_aligned_network(SiT(plan.network), plan.align)
    backbone = model.backbone
    costs = [TARGETS[entry["method"]].cost(entry, plan.network, plan.cache) for entry in plan.align]
    block = _count(backbone.blocks[0])
    return Parameters(
        backbone=_count(backbone),
        heads=_count(model.heads),
        emas=len(plan.settings.optimizer.ema_decay) * _count(backbone),
        block=block,
        depth=plan.network.depth,
        external=sum(cost.parameters for cost in costs),
        teacher=block * sum(entry.get("teacher_block", 0) for entry in plan.align),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_stored_bytes(plan: Plan, precision: str, compile: bool = True) -> StoredBytes:
    """Count the bytes that the forward pass stores, by tracing networks with one and two blocks.

    Args:
        plan: The plan of the run.
        precision: Mixed precision: no, fp16 or bf16.
        compile: Whether the blocks are compiled, so that the compiler chooses what to recompute.
    """
    one_block = _trace(plan, 1, precision, compile)
    two_blocks = _trace(plan, 2, precision, compile)
    block = two_blocks.activations - one_block.activations
    block_copies = two_blocks.weight_copies - one_block.weight_copies
    network = plan.network
    values = network.grid_size**2 * network.width  # of the tokens of an image
    hidden_bytes = 4 * values * autocast_dtype(precision).itemsize
    return StoredBytes(
        block=block,
        block_input=FLOAT32 * values,
        outside_blocks=one_block.activations - block,
        block_copies=block_copies,
        outside_copies=one_block.weight_copies - block_copies,
        # The gradients of the input and the output of the MLP's activation, and of the tokens.
        gradients=2 * hidden_bytes + FLOAT32 * values,
    )


class TracedBytes(NamedTuple):
    """Bytes that a traced forward pass stores.

    Attributes:
        activations: Bytes of activations per image.
        weight_copies: Bytes of weights that autocast converted.
    """

    activations: float
    weight_copies: int


def _trace(plan: Plan, depth: int, precision: str, compile: bool) -> TracedBytes:
    batch_size = 2
    network = replace(plan.network, depth=depth)
    align = [entry | {"block": 1} for entry in copy.deepcopy(plan.align)]
    torch._dynamo.reset()  # a new network must not count as a recompilation of the previous one
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_aligned_network(SiT(network), align)
        if compile:
            for block in model.backbone.blocks:
                block.compile(backend=PARTITION_BACKEND, dynamic=False)
        latents = torch.zeros(
            batch_size, network.channels, network.latent_size, network.latent_size
        )
        times = torch.zeros(batch_size)
        labels = torch.zeros(batch_size, dtype=torch.long)
        with _recording_stored_tensors() as stored, _autocast(precision):
            model(latents, times, labels)
        return _sum_bytes(model, stored, batch_size)


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "no"):
        yield


@contextmanager
def _recording_stored_tensors() -> Iterator[list[Tensor]]:
    """Collect the tensors that autograd stores while the context is active."""
    stored: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield stored


def _sum_bytes(model: AlignedSiT, stored: list[Tensor], batch_size: int) -> TracedBytes:
    """Add up the storages of tensors, each once, without the parameters themselves."""
    weight_shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2}
    activations = 0
    weight_copies = 0
    counted = {_storage_key(parameter) for parameter in model.parameters()}
    for tensor in stored:
        if _storage_key(tensor) in counted:
            continue
        counted.add(_storage_key(tensor))
        num_bytes = tensor.untyped_storage().nbytes()
        if tensor.ndim == 2 and tuple(sorted(tensor.shape)) in weight_shapes:
            weight_copies += num_bytes
        else:
            activations += num_bytes
    return TracedBytes(activations / batch_size, weight_copies)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class MemoryModel:
    """Computes the peak memory of a training step per GPU.

    Args:
        parameters: Numbers of parameters.
        stored: Bytes that autograd stores.
        wire_bytes: Bytes of a parameter while its block is gathered.
    """

    parameters: Parameters
    stored: StoredBytes
    wire_bytes: int

    def parts(
        self, layout: Layout, micro_batch: int, accumulation: int = 1, recomputed_blocks: int = 0
    ) -> dict[str, float]:
        """Return the bytes of each part of the memory at the peak of a step.

        The peak is at the start of the backward pass, when all activations are stored, or at its
        end, when all gradients are.

        Args:
            layout: How the run is spread over GPUs.
            micro_batch: Images per forward pass and GPU.
            accumulation: Number of forward passes per update.
            recomputed_blocks: Blocks whose activations are recomputed.
        """
        parameters = self.parameters
        shard = FLOAT32 / layout.num_shards
        state = {
            "parameters": shard * parameters.trained,
            "moments": 2 * shard * parameters.trained,
            "emas": shard * parameters.emas,
            "external": FLOAT32 * parameters.external,
        }
        gradients = shard * parameters.trained
        transient = self.stored.gradients * micro_batch
        unsharded = self._unsharded_bytes(layout)
        start = {
            "gradients": self._kept_gradient_bytes(layout, accumulation),
            "activations": self.activation_bytes(recomputed_blocks) * micro_batch + transient,
            "gathered": unsharded,
        }
        end = {"gradients": gradients, "activations": transient, "gathered": unsharded}
        return state | max(start, end, key=lambda parts: sum(parts.values()))

    def activation_bytes(self, recomputed_blocks: int = 0) -> float:
        """Return the bytes per image that are stored at the start of the backward pass."""
        stored = self.stored
        # If all blocks are recomputed, the last one is recomputed at once.
        num_stored = max(self.parameters.depth - recomputed_blocks, 1)
        blocks = num_stored * stored.block + recomputed_blocks * stored.block_input
        return stored.outside_blocks + blocks

    def _kept_gradient_bytes(self, layout: Layout, accumulation: int) -> float:
        """Return the bytes of gradients at the start of the last backward pass.

        DDP's buckets keep their memory between steps. Accumulated gradients are not sharded.
        """
        uses_ddp = layout.num_gpus > 1 and layout.shard == "none"
        return FLOAT32 * self.parameters.trained if accumulation > 1 or uses_ddp else 0

    def _unsharded_bytes(self, layout: Layout) -> float:
        """Return the bytes of gathered weights, and of weights that autocast converted.

        Without sharding, autocast converts each weight and keeps the copy until the backward pass.
        With sharding, the parameters outside the blocks are gathered in float32 for the whole step
        and converted in the same way. Of the blocks, one is in use and one is being gathered, and
        the gradients of one are being reduced in float32.
        """
        stored = self.stored
        parameters = self.parameters
        if layout.num_shards == 1:
            return parameters.depth * stored.block_copies + stored.outside_copies
        outside = FLOAT32 * parameters.outside_blocks + stored.outside_copies
        num_gathered = 2 if layout.reshards else parameters.depth
        gathered = self.wire_bytes * num_gathered * parameters.block
        reduced = (self.wire_bytes + FLOAT32) * parameters.block
        return outside + gathered + reduced
