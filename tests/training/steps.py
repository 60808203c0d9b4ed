"""Builds a `Step` without accelerate's set-up, on any device."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import train
from latents.cache import LatentCache
from training.alignment import (
    load_alignments,
    make_cache_info,
    make_run_context,
    plan_alignments,
)
from training.config import Settings, build_network_config, parse_settings
from training.frozen_network import load_frozen_network
from training.guard import NonFiniteGuard
from training.sharding import make_sharding
from training.state import build_state, initialize_sharded_state


def make_settings(cache: Path, *flags: Any) -> Settings:
    """Parse train.py's flags for the smallest model."""
    defaults = ["--exp-name", "x", "--data-dir", cache, "--model", "SiT-Ti/2", "--batch-size", "8"]
    return parse_settings([str(flag) for flag in (*defaults, *flags)])


def make_step(
    settings: Settings,
    device: torch.device,
    no_sync: Callable[[Any], AbstractContextManager] = lambda model: nullcontext(),
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    accelerator: Accelerator | None = None,
) -> train.Step:
    """Build a Step with an Accelerator, by default a plain stand-in for one."""
    accelerator = accelerator or SimpleNamespace(
        device=device,
        num_processes=1,
        prepare=lambda *parts: parts,
        prepare_model=lambda model, **options: model,
        prepare_optimizer=lambda optimizer, **options: optimizer,
        no_sync=no_sync,
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        backward=backward,
    )
    cache = LatentCache(*settings.data.data_dir)
    network = build_network_config(settings.model, cache.manifest)
    cache_info = make_cache_info(cache.manifest, cache.read_feature_metadata())
    align = plan_alignments(settings.alignments, network, cache_info)
    sharding = make_sharding(settings.device.shard, accelerator, torch.float32)
    state = build_state(network, align, settings, device, sharding)
    if sharding:
        initialize_sharded_state(state, align, settings.run.seed)
    load_network = partial(
        load_frozen_network,
        network=network,
        path_type=settings.objective.path_type,
        manifest=cache.manifest,
        device=device,
    )
    context = make_run_context(
        state.emas[0],
        settings.objective.path_type,
        nullcontext,
        load_network,
        settings.device.compile,
    )
    alignments = load_alignments(settings.alignments, align, cache_info, context)
    guard = NonFiniteGuard(state.optimizer)
    return train.make_step(settings, accelerator, state, cache.manifest, alignments, guard)


class OperationCounter(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, except views, which launch no kernel."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))
