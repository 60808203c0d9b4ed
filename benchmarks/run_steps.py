"""Counts the arithmetic of runs of train.py, and times a step of each in turn, by their own flags on their own data.

For studies that set a method's gain against its price (experiments/convergence.py). All are held at once: for small
networks.
"""

import argparse
from functools import partial

import torch
from accelerate import Accelerator

from benchmarks.measure import median_and_quartiles, time_in_turn
from dataset import TrainingStream
from latents.cache import LatentCache
from models.sit import SiTConfig
from models.targets import Data
from train import Step, build
from training import alignment
from training.config import check_cache, make_config, precision
from training.guard import NonFiniteGuard
from training.throughput import training_flops


def planned(args: argparse.Namespace) -> tuple[LatentCache, Data, dict]:
    """A run's cache, what methods may ask of it, and its config.json. Raises UserError."""
    cache = LatentCache(*args.data_dir)
    check_cache(args, cache)
    data = alignment.data_of(cache.manifest, cache.read_feature_metadata())
    return cache, data, make_config(args, cache.manifest, data)


def count_flops(args: argparse.Namespace) -> int:
    """FLOPs of training on one image. Raises UserError."""
    _, data, config = planned(args)
    return training_flops(SiTConfig(**config["model"]), config["align"], data)


def time_runs(
    runs: dict[str, argparse.Namespace], rounds: int, calls: int, warm_up: int = 2
) -> dict[str, dict]:
    """Seconds of an update: median and quartiles over `rounds` of `calls` updates of a batch that is in memory, without waiting
    between them. Raises UserError.
    """
    precisions = {precision(args.mixed_precision) for args in runs.values()}
    assert len(precisions) == 1, precisions
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precisions.pop())
    device, actions = accelerator.device, {}
    for name, args in runs.items():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        cache, data, config = planned(args)
        state = build(args, config, device)
        targets = alignment.load(args, config, data, state.emas[0], device, accelerator.autocast)
        step = Step(
            args,
            accelerator,
            cache.manifest,
            state,
            targets,
            NonFiniteGuard(state.optimizer, args.mixed_precision == "fp16"),
        )
        batch = TrainingStream(
            cache, args.seed, args.batch_size, inputs=[x for x in [alignment.extra(targets)] if x]
        )[0]
        actions[name] = partial(step, batch.pin_memory() if device.type == "cuda" else batch)
    seconds, _ = time_in_turn(actions, device, rounds, calls, warm_up)
    return {name: median_and_quartiles(values) for name, values in seconds.items()}
