"""Prepare a run: check its settings, find where it stopped, and build its objects."""

import json
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator

from checkpointing.storage import list_checkpoints
from common.cli import UserError, format_flags, print_warning
from common.config import record_flags
from common.files import write_file
from common.log_file import logging_to
from common.logs import get_logger
from latents.cache import CacheError, LatentCache
from latents.remote.local_copy import resolve_local_cache
from training.alignment import Alignment
from training.config import (
    DataConfig,
    ModelConfig,
    Settings,
    autocast_dtype,
    check_batch_size,
    check_warmup,
    resolve_num_steps,
)
from training.coordination import broadcast_object, fail_together, gather_objects
from training.description import describe_run
from training.first_step import FirstStep, load_compile_cache
from training.guard import NonFiniteGuard
from training.joint_work import gather_on_first
from training.log import Console, MetricMeans, RunLog, log_start, make_log_path
from training.monitors import Monitors, restore_failures, run_trials
from training.networks import Networks, build_networks, set_weights
from training.optimizer import build_schedule
from training.peak_rates import find_peak_rate
from training.process_records import check_records, make_cache_record
from training.resume import (
    RunPosition,
    build_args_json,
    check_cache,
    check_resume_step,
    check_run_folder,
    check_same_run,
    find_position,
)
from training.schedule import LearningRateSchedule
from training.sharding import make_sharding
from training.shared_files import wait_for_files
from training.state import TrainState
from training.throughput import Throughput, mean_training_flops, measure_matmul_rate
from training.trackers import Trackers

logger = get_logger(__name__)


class Run(NamedTuple):
    """The objects of a run that is ready to start."""

    cache: LatentCache
    flags: dict  # contents of args.json
    config: dict  # contents of config.json
    state: TrainState
    alignments: dict[str, Alignment]
    guard: NonFiniteGuard
    log: RunLog
    monitors: Monitors
    first_step: FirstStep
    num_steps: int


def prepare_run(settings: Settings, accelerator: Accelerator, resources: ExitStack) -> Run | None:
    """Build a new run, or restore it from its newest checkpoint.

    Args:
        settings: Settings of the run.
        accelerator: The accelerator.
        resources: Receives the lock of the run folder.

    Returns:
        The run, or None if there is nothing to do.

    Raises:
        UserError: A setting is invalid, or the run was started with other settings.
    """
    # Check the flags against the cache.
    check_batch_size(settings.loop, accelerator.num_processes)
    with fail_together():
        cache = open_cache(settings.data, settings.model, make_copies=not settings.print_config)
        record = make_cache_record(accelerator.process_index, cache)
    check_records(gather_objects(record), accelerator.process_index)
    settings = settings._replace(loop=resolve_num_steps(settings.loop, len(cache)))
    check_warmup(settings.optimizer, settings.loop)
    schedule = build_schedule(settings.optimizer, settings.loop, len(cache))
    flags = build_args_json(settings)
    folder = settings.run.folder
    if settings.print_config:
        accelerator.print(format_flags(flags))
        return None

    # Compare the flags with those of the run, and find out where it stopped.
    num_steps = settings.loop.num_steps
    position = agree_on_position(settings, flags, accelerator.is_main_process)
    if position.step >= num_steps and not position.has_pending_work:
        remedy = "; raise --max-train-steps to train further"
        if schedule.depends_on_length:
            remedy = ""
        logger.info("%s has completed its %s steps%s", folder, f"{position.step:,}", remedy)
        return None

    # Build networks, targets and monitors, and restore the newest checkpoint.
    dtype = autocast_dtype(accelerator.mixed_precision)
    sharding = make_sharding(settings.device.shard, accelerator, dtype)
    with fail_together():
        if position.checkpoints:
            wait_for_files(position.checkpoints[-1], position.file_sizes)
        networks = build_networks(settings, accelerator, cache, position, resources, sharding)
    rank = accelerator.process_index
    resources.enter_context(logging_to(make_log_path(folder, rank)))
    log_start(rank, accelerator.num_processes, accelerator.device)
    set_weights(networks, settings, accelerator, position.checkpoints)
    if not position.checkpoints:  # a failed trial must not end a run that has checkpoints
        run_trials(
            networks.preview,
            networks.evaluator,
            networks.state,
            gather_on_first,
            accelerator.is_main_process,
        )
    if settings.data.cache_in_ram:
        with fail_together():
            cache.load_into_ram(accelerator.process_index, gather_objects)
    if accelerator.is_main_process:
        write_file(folder / "args.json", json.dumps(flags, indent=2).encode())

    # Open the log at the step of the checkpoint.
    with fail_together():
        log = open_log(settings, schedule, flags, accelerator, networks, position)
    for line in describe_run(settings, accelerator, cache, networks):
        log.info(line)
    if position.checkpoints:
        log.info(f"resuming from {position.checkpoints[-1]}")
    monitors = make_monitors(settings, log, networks, cache, position)
    compile_cache = load_compile_cache(settings, accelerator, networks.config)
    return Run(
        cache,
        flags,
        networks.config,
        networks.state,
        networks.alignments,
        log.guard,
        log,
        monitors,
        FirstStep(compile_cache, accelerator.device, log.info),
        num_steps,
    )


def agree_on_position(settings: Settings, flags: dict, is_main_process: bool) -> RunPosition:
    """Find out where the run stopped. All processes must call this.

    Only the first process looks at the files, because those on a network disk may become visible to
    the other processes later.

    Args:
        settings: Settings of the run.
        flags: Contents of args.json for the current command line.
        is_main_process: Whether this is the first process.

    Raises:
        UserError: On the first process, if the run was started with other flags.
        SystemExit: On the other processes in this case.
    """
    folder = settings.run.folder
    position = RunPosition()
    with fail_together():
        if is_main_process:
            check_run_folder(folder)
            check_same_run(flags, folder)
            check_resume_step(settings.run, list_checkpoints(folder))
            position = find_position(
                folder,
                settings.loop.num_steps,
                settings.optimizer.ema_decay,
                settings.preview.every,
                settings.evaluation.every,
            )
    return broadcast_object(position, "the first process to find the newest checkpoint")


def make_monitors(
    settings: Settings,
    log: RunLog,
    networks: Networks,
    cache: LatentCache,
    position: RunPosition,
) -> Monitors:
    """Build the schedule of previews and evaluations at the position of the run."""
    flags = {
        "preview": record_flags(settings.preview),
        "evaluation": record_flags(settings.evaluation),
    }
    return Monitors(
        log,
        settings.optimizer.ema_decay,
        settings.loop.num_steps,
        networks.preview,
        networks.evaluator,
        settings.preview.every,
        settings.evaluation.every,
        position.complete_evaluations,
        position.complete_previews,
        None if position.has_real_images else cache,
        restore_failures(networks.state.progress, flags),
    )


def open_cache(data: DataConfig, model: ModelConfig, make_copies: bool = True) -> LatentCache:
    """Open the latent cache and check it against the flags.

    Args:
        data: The latent cache and how it is read.
        model: The network.
        make_copies: Whether to copy remote caches to this machine.
    """
    local_cache = resolve_local_cache(data.local_cache) if make_copies else None
    try:
        cache = LatentCache(*data.data_dir, local_cache=local_cache)
    except CacheError as error:
        raise UserError(f"--data-dir: {error}") from None
    if make_copies and cache.is_remote and not (data.num_workers or data.cache_in_ram):
        print_warning(
            "each training step waits for the requests of its batch with --num-workers 0; pass "
            "--num-workers 4 to read several batches ahead"
        )
    check_cache(data, model, cache.manifest)
    return cache


def open_log(
    settings: Settings,
    schedule: LearningRateSchedule,
    flags: dict,
    accelerator: Accelerator,
    networks: Networks,
    position: RunPosition,
) -> RunLog:
    """Open the log at the position of the run and start the trackers.

    Args:
        settings: Settings of the run, with its length.
        schedule: The learning rate of each update.
        flags: Contents of args.json, for the trackers.
        accelerator: The accelerator.
        networks: The networks of the run.
        position: Position at which the run stopped.
    """
    state = networks.state
    config = networks.config
    folder = settings.run.folder
    device = accelerator.device
    dtype = autocast_dtype(accelerator.mixed_precision)
    batch_size = settings.loop.batch_size
    names = ["loss", "denoising"]
    for method in networks.alignments:
        names += [f"align/{method}", f"cosine/{method}", f"token_norm/{method}"]
    means = MetricMeans([*names, "grad_norm"], device, accelerator.reduce, state.progress)
    network = state.model.backbone.config
    mean_flops = partial(mean_training_flops, network, config["align"], networks.cache_info)
    rates = {"matmul_share": measure_matmul_rate(device, dtype) * accelerator.num_processes}
    peak_rate = find_peak_rate(device, dtype, torch.backends.cuda.matmul.allow_tf32)
    if peak_rate:
        rates["mfu"] = peak_rate * accelerator.num_processes
    console = Console(
        folder.name,
        settings.loop.num_steps,
        state.step,
        batch_size,
        accelerator.is_main_process,
    )
    trackers = Trackers(accelerator, logger.info)
    trackers.start(
        settings.log.wandb_project,
        folder,
        config | flags,
        position.step,
        position.last_logged_step,
    )
    log = RunLog(
        folder,
        console,
        trackers,
        means,
        Throughput(batch_size, device, state.step, mean_flops, rates),
        NonFiniteGuard(
            state.optimizer,
            accelerator.mixed_precision == "fp16",
            *state.progress.get("bad_in_a_row", ()),
        ),
        schedule,
        settings.log.log_every,
        networks.owner,
    )
    log.restore(state.step, state.progress)
    return log
