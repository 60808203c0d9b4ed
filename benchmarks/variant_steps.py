"""Build the training steps that benchmarks/train_step.py times."""

import copy
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import models.encoder_target
from benchmarks.measure import Action
from benchmarks.run_steps import Plan, build_sharded_step, build_step
from benchmarks.variants import make_random_batch, select_variant, split_variant
from common.keyed_random import Purpose, normal, uniform
from dataset import CachedBatch
from interpolant import INTERPOLANTS, interpolate
from models.aligned_sit import AlignedSiT
from models.targets import latent_tokens
from train import Step
from training.alignment import required_cache_inputs
from training.config import autocast_dtype


def make_plain_step(
    plan: Plan, accelerator: Accelerator, model: AlignedSiT, batch: CachedBatch
) -> Action:
    """Return a minimal training step for the network of sra2.

    Args:
        plan: The plan of the run.
        accelerator: Accelerator that determines the device, the precision and the gradient scaler.
        model: The network, with a head for sra2.
        batch: The batch that all steps use.
    """
    device = accelerator.device
    accumulation = plan.settings.loop.gradient_accumulation_steps

    # Compute the inputs, which are the same in all steps: noisy latents and targets of the losses.
    batch = replace(batch, inputs={}).to(device)
    latents = plan.cache.scale.mean(batch.moments)
    shape = tuple(plan.manifest.latent_shape)
    noise = normal(0, Purpose.NOISE, batch.stream_position, shape).float()
    t = uniform(0, Purpose.TIMESTEP, batch.stream_position).float()
    x_t, velocity = interpolate(INTERPOLANTS["linear"], latents, noise, t)
    inputs = (x_t, t, batch.labels, velocity, latent_tokens(latents, plan.network.patch))
    micro_batches = list(zip(*(tensor.chunk(accumulation) for tensor in inputs)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=True)
    scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
    dtype = autocast_dtype(accelerator.mixed_precision)
    block = model.blocks["sra2"]

    def step() -> None:
        for x_t, t, labels, velocity, target in micro_batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                prediction, tokens = model.backbone(x_t, t, labels, return_blocks=(block,))
                projected = model.heads["sra2"](tokens[block])
            cosine = F.cosine_similarity(projected.float(), target, dim=-1)
            loss = F.mse_loss(prediction.float(), velocity) + 1 - cosine.mean()
            scaler.scale(loss).div(accumulation).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def make_accumulated_step(step: Step, batch: CachedBatch, num_parts: int) -> Action:
    """Return a step with the same state that runs in `num_parts` micro-batches.

    It does not recompute activations.
    """
    accumulated_step = copy.copy(step)
    accumulated_step.accumulation = num_parts
    backbone = step.state.model.backbone

    def run() -> None:
        num_recomputed_blocks = backbone.num_recomputed_blocks
        backbone.num_recomputed_blocks = 0
        accumulated_step(batch)
        backbone.num_recomputed_blocks = num_recomputed_blocks

    return run


def name_accumulated_step(variant: str, num_parts: int) -> str:
    """Return the name of a variant whose step runs in `num_parts` micro-batches."""
    return f"{variant} in {num_parts} parts"


def build_steps(
    plan: Plan, accelerator: Accelerator, variants: list[str], accumulated_parts: int | None = None
) -> dict[str, Action]:
    """Build the step of each variant, as a function without arguments.

    Args:
        plan: The plan of the run.
        accelerator: Accelerator that determines the device and the precision.
        variants: Names of the variants.
        accumulated_parts: Number of micro-batches of an additional step per variant.
    """
    with patch_encoder():
        full_step = build_step(plan, accelerator)
    batch = make_host_batch(plan, accelerator.device)
    actions: dict[str, Action] = {}
    for variant in variants:
        if variant == "plain":
            model = full_step.state.model
            actions[variant] = make_plain_step(plan, accelerator, model, batch)
            continue
        step = select_methods(full_step, split_variant(variant))
        variant_batch = select_inputs(batch, step)
        actions[variant] = partial(step, variant_batch)
        if accumulated_parts:
            name = name_accumulated_step(variant, accumulated_parts)
            actions[name] = make_accumulated_step(step, variant_batch, accumulated_parts)
    return actions


def build_sharded_steps(
    plan: Plan, accelerator: Accelerator, variants: list[str]
) -> dict[str, Action]:
    """Build a step with a sharded state for each variant, or none if the plan does not shard."""
    actions: dict[str, Action] = {}
    if plan.settings.device.shard == "none":
        return actions
    batch = make_host_batch(plan, accelerator.device)
    for variant in variants:
        with patch_encoder():
            step = build_sharded_step(select_variant(plan, variant), accelerator)
        actions[name_sharded_step(variant)] = partial(step, select_inputs(batch, step))
    return actions


def make_host_batch(plan: Plan, device: torch.device) -> CachedBatch:
    """Return a random batch in host memory, which is pinned if the device is a GPU."""
    batch = make_random_batch(plan.manifest, plan.settings.loop.batch_size)
    return batch.pin_memory() if device.type == "cuda" else batch


def select_inputs(batch: CachedBatch, step: Step) -> CachedBatch:
    """Return a batch with only those cache inputs that the alignment methods of a step use."""
    inputs = {name: batch.inputs[name] for name in required_cache_inputs(step.alignments)}
    return replace(batch, inputs=inputs)


def name_sharded_step(variant: str) -> str:
    """Return the name of a variant whose state is sharded."""
    return f"{variant} sharded"


def name_steps(variant: str, accumulated_parts: int | None) -> list[str]:
    """Return the names that the steps of a variant may have."""
    names = [variant, name_sharded_step(variant)]
    if accumulated_parts:
        names.append(name_accumulated_step(variant, accumulated_parts))
    return names


def patch_encoder() -> AbstractContextManager:
    """Return a context in which encoders are built with random weights."""
    encoder = partial(models.encoder_target.Encoder, pretrained=False)
    return patch.object(models.encoder_target, "Encoder", encoder)


def select_methods(step: Step, methods: list[str]) -> Step:
    """Return a step with the same state that applies only the listed alignment methods."""
    selected = copy.copy(step)
    selected.alignments = {method: step.alignments[method] for method in methods}
    network = step.state.model
    names = [name for alignment in selected.alignments.values() for name in alignment.head_names]
    heads = {name: network.heads[name] for name in names}
    blocks = {name: network.blocks[name] for name in names}
    selected.model = step.accelerator.prepare(AlignedSiT(network.backbone, heads, blocks))
    return selected
