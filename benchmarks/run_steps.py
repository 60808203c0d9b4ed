"""Build and time the training steps of runs of train.py, and count the FLOPs of the steps.

experiments/convergence.py uses the FLOPs and the times to compute speed-ups.
"""

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from benchmarks.measure import median_and_quartiles, time_interleaved
from common.tf32 import set_tf32
from dataset import TrainingStream
from latents.cache import LatentCache
from latents.manifest import Manifest
from models.sit import SiT, SiTConfig
from models.target import CacheInfo, FrozenNetwork
from train import Step, make_step
from training.alignment import (
    load_alignments,
    make_cache_info,
    make_run_context,
    plan_alignments,
    required_cache_inputs,
)
from training.config import (
    Settings,
    autocast_dtype,
    build_network_config,
    resolve_precision,
)
from training.guard import NonFiniteGuard
from training.setup import open_cache
from training.sharding import Sharding, make_sharding
from training.state import TrainState, build_state, initialize_sharded_state
from training.throughput import mean_training_flops


class Plan(NamedTuple):
    """The settings, data and architecture of a run of train.py, before any object is built.

    Attributes:
        settings: Settings of the run.
        manifest: Manifest of the latent cache.
        cache: Properties of the latent cache that alignment methods need.
        network: Architecture of the network.
        align: The "align" entry of config.json.
    """

    settings: Settings
    manifest: Manifest
    cache: CacheInfo
    network: SiTConfig
    align: list[dict]


def plan_run(
    settings: Settings, manifest: Manifest, features: dict[str, dict] | None = None
) -> Plan:
    """Plan a run.

    Args:
        settings: Settings of the run.
        manifest: Manifest of the latent cache.
        features: Metadata of the encoder features in the cache (see `make_cache_info`).

    Raises:
        UserError: If the settings do not match the cache.
    """
    cache = make_cache_info(manifest, features)
    network = build_network_config(settings.model, manifest)
    align = plan_alignments(settings.alignments, network, cache)
    return Plan(settings, manifest, cache, network, align)


def open_and_plan(settings: Settings) -> tuple[LatentCache, Plan]:
    """Open the latent cache of a run and plan the run.

    Raises:
        UserError: If the settings do not match the cache.
    """
    cache = open_cache(settings.data, settings.model)
    return cache, plan_run(settings, cache.manifest, cache.read_feature_metadata())


def count_training_flops(settings: Settings) -> float:
    """Return the FLOPs per image of the training steps of a run, averaged over the run.

    Raises:
        UserError: If the settings do not match the cache.
    """
    _, plan = open_and_plan(settings)
    num_steps = settings.loop.num_steps
    return mean_training_flops(plan.network, plan.align, plan.cache, 0, num_steps)


def time_runs(
    runs: dict[str, Settings], rounds: int, calls: int, warm_up: int = 2
) -> dict[str, dict]:
    """Time the training steps of several runs alternately.

    Each run trains on a fixed batch of its data. All runs are in memory at the same time, so the
    networks must be small.

    Args:
        runs: Settings of the runs by name. All runs must have the same precision.
        rounds: Number of timed rounds.
        calls: Number of steps per round. The host and the device are not synchronized between them.
        warm_up: Number of untimed rounds before the timed rounds.

    Returns:
        Median and quartiles of the seconds per step, by the name of the run.

    Raises:
        UserError: If the settings of a run do not match its cache.
    """
    (precision,) = {resolve_precision(run.device.mixed_precision) for run in runs.values()}
    accelerator = make_accelerator(precision)
    actions = {}
    for name, settings in runs.items():
        set_tf32(settings.device.allow_tf32)
        cache, plan = open_and_plan(settings)
        step = build_step(plan, accelerator)
        stream = TrainingStream(
            cache,
            settings.run.seed,
            settings.loop.batch_size,
            inputs=required_cache_inputs(step.alignments),
        )
        batch = stream[0]
        if accelerator.device.type == "cuda":
            batch = batch.pin_memory()
        actions[name] = partial(step, batch)
    timings = time_interleaved(actions, accelerator.device, rounds, calls, warm_up)
    return {name: median_and_quartiles(values) for name, values in timings.seconds.items()}


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Create an Accelerator on the GPU, or on the CPU if no GPU is available.

    Raises:
        UserError: If the device does not support the precision.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=resolve_precision(mixed_precision)
    )


def build_plan_state(
    plan: Plan, device: torch.device, sharding: Sharding | None = None
) -> TrainState:
    """Build the state of a run. Its weights are newly initialized, or undefined if sharded."""
    return build_state(plan.network, plan.align, plan.settings, device, sharding)


def build_trained_state(
    plan: Plan, device: torch.device, sharding: Sharding | None = None
) -> TrainState:
    """Build the state of a run after an update with zero gradients, with optimizer moments."""
    state = build_plan_state(plan, device, sharding)
    if sharding:
        initialize_sharded_state(state, plan.align, plan.settings.run.seed)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state


def load_random_network(
    network: SiTConfig, device: torch.device, path: Path, needs_null_class: bool
) -> FrozenNetwork:
    """Return a network with random weights in place of the checkpoint `path`."""
    model = SiT(network).eval().requires_grad_(False)
    return FrozenNetwork(model.to(device), "")


def build_sharded_step(plan: Plan, accelerator: Accelerator) -> Step:
    """Build the training step of a run whose state is sharded as its settings specify.

    Raises:
        UserError: If a network cannot be loaded.
    """
    dtype = autocast_dtype(accelerator.mixed_precision)
    sharding = make_sharding(plan.settings.device.shard, accelerator, dtype)
    state = build_plan_state(plan, accelerator.device, sharding)
    initialize_sharded_state(state, plan.align, plan.settings.run.seed)
    return build_step(plan, accelerator, state)


def build_step(plan: Plan, accelerator: Accelerator, state: TrainState | None = None) -> Step:
    """Build the training step of a run.

    Args:
        plan: The plan of the run.
        accelerator: Accelerator that determines the device and the precision.
        state: The state of the run. By default, it is built with newly initialized weights.

    Raises:
        UserError: If a network cannot be loaded.
    """
    settings = plan.settings
    state = state or build_plan_state(plan, accelerator.device)
    align = copy.deepcopy(plan.align)  # load_alignments adds entries
    context = make_run_context(
        state.emas[0],
        settings.objective.path_type,
        accelerator.autocast,
        partial(load_random_network, plan.network, accelerator.device),
        settings.device.compile,
    )
    alignments = load_alignments(settings.alignments, align, plan.cache, context)
    guard = NonFiniteGuard(state.optimizer, accelerator.mixed_precision == "fp16")
    return make_step(settings, accelerator, state, plan.manifest, alignments, guard)
