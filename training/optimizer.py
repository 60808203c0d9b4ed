"""Build the optimizer of a run and its learning rate schedule from the settings."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.aligned_sit import AlignedSiT
from models.sit import SiT
from training.config import LoopConfig, OptimizerConfig, resolve_num_steps
from training.matrix_exchange import MatrixExchange, ReplicatedExchange, ShardedExchange
from training.muon import Muon
from training.schedule import LearningRateSchedule
from training.sharding import Sharding

# Weights of a block that stack several matrices: query, key and value. Muon works better if they
# are orthogonalized separately (Jordan et al.).
STACKED_MATRICES = {"attn.qkv.weight": 3}


def build_optimizer(
    model: AlignedSiT, config: OptimizerConfig, sharding: Sharding | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer for the trainable parameters of a network.

    Args:
        model: The network.
        config: Settings of the optimizer.
        sharding: The sharding of the network; None if every process holds all parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, **options, fused=True)
    matrices = group_block_matrices(model.backbone)
    matrix_ids = {id(parameter) for parameters, _ in matrices for parameter in parameters}
    others = [parameter for parameter in trained if id(parameter) not in matrix_ids]
    return Muon(
        matrices,
        others,
        config.muon_momentum,
        config.muon_weight_decay,
        make_exchange(sharding),
        **options,
    )


def group_block_matrices(backbone: SiT) -> list[tuple[list[nn.Parameter], int]]:
    """Return the matrices that Muon updates: the weights of the blocks that multiply tokens.

    Modulations are excluded. Their input is not a token but the embedding of timestep and class,
    so AdamW updates them like the embeddings. In short runs, the loss was also higher with Muon.

    Returns:
        One group per matrix of a block: the parameters of all blocks, and the number of matrices
        that each of them stacks.
    """
    names = [
        name
        for name, value in backbone.blocks[0].named_parameters()
        if value.ndim == 2 and not name.startswith("adaLN_modulation")
    ]
    groups = []
    for name in names:
        parameters = [block.get_parameter(name) for block in backbone.blocks]
        groups.append((parameters, STACKED_MATRICES.get(name, 1)))
    return groups


def make_exchange(sharding: Sharding | None) -> MatrixExchange:
    """Return the object that divides the orthogonalization of matrices over the processes."""
    if sharding is not None:
        return ShardedExchange(sharding.mesh.get_group("shard"))
    if dist.is_initialized() and dist.get_world_size() > 1:
        return ReplicatedExchange()
    return MatrixExchange()


def build_schedule(
    config: OptimizerConfig, loop: LoopConfig, num_images: int
) -> LearningRateSchedule:
    """Return the learning rates of a run.

    Args:
        config: Settings of the optimizer.
        loop: Length of the run.
        num_images: Number of images of the training cache.
    """
    return LearningRateSchedule(
        config.learning_rate,
        config.lr_schedule,
        config.lr_warmup_steps,
        config.lr_min_factor,
        resolve_num_steps(loop, num_images).num_steps,
    )
