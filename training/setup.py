"""Build the objects of a run from its settings: networks, targets, log, previews, evaluation."""

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from checkpointing.storage import (
    CheckpointError,
    RunOwner,
    lock_run,
    read_config,
    verify_checkpoint,
)
from common.cli import UserError, format_flags, print_warning
from common.config import record_flags
from common.files import write_file
from common.log_file import logging_to
from common.logs import get_logger
from common.watchdog import waiting_for_processes
from latents.cache import CacheError, LatentCache
from latents.manifest import Manifest
from latents.remote.local_copy import resolve_local_cache
from latents.sources import copy_moments
from models.flops import backbone_flops
from models.labels import TrainedLabels, describe_empty_classes
from models.projector import AlignedSiT
from models.sit import SiT, SiTConfig
from models.targets import CacheInfo
from training.alignment import (
    Alignment,
    build_aligned_network,
    describe_alignment,
    load_alignments,
    make_cache_info,
    make_run_context,
    plan_alignments,
    required_cache_inputs,
    restore_settings,
)
from training.config import (
    DataConfig,
    DeviceConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PeriodicEvaluationConfig,
    PreviewConfig,
    Settings,
    autocast_dtype,
    build_network_config,
    check_batch_size,
    resolve_num_steps,
)
from training.coordination import broadcast_object, gather_objects, wait_for_all
from training.evaluation import Evaluator
from training.first_step import FirstStep, load_compile_cache
from training.guard import NonFiniteGuard
from training.joint_work import gather_on_first
from training.log import Console, MetricMeans, RunLog, log_start, make_log_path
from training.monitors import Monitors, restore_failures, run_trials
from training.peak_rates import find_peak_rate
from training.preview import Preview, load_vae
from training.process_records import check_records, make_cache_record
from training.resume import (
    RunPosition,
    build_args_json,
    build_config_json,
    check_cache,
    check_same_alignment,
    check_same_data,
    check_same_run,
    find_position,
)
from training.sharding import Sharding, make_sharding
from training.shared_files import wait_for_files
from training.state import TrainState
from training.throughput import Throughput, mean_training_flops, measure_matmul_rate
from training.trackers import Trackers

logger = get_logger(__name__)


def build_state(
    network: SiTConfig,
    align: list[dict],
    optimizer: OptimizerConfig,
    options: DeviceConfig,
    seed: int,
    device: torch.device,
    sharding: Sharding | None = None,
) -> TrainState:
    """Build the networks and the optimizer at step 0.

    If the state is sharded, its weights are undefined until `initialize_sharded_state` is called.

    Args:
        network: Architecture of the backbone.
        align: The "align" list of config.json, which describes the heads.
        optimizer: Settings of AdamW and the EMAs.
        options: Whether to compile, and to checkpoint activations.
        seed: Seed of the initial weights.
        device: Device of the state.
        sharding: How the state is sharded; None if each process holds all of it.
    """
    if sharding is None:
        model = build_initial_network(network, align, seed).to(device)
    else:
        with torch.device("meta"):
            model = build_initial_network(network, align, seed)
    backbone = model.backbone
    emas = [copy.deepcopy(backbone).eval().requires_grad_(False) for _ in optimizer.ema_decay]
    if options.activation_checkpointing:
        backbone.num_recomputed_blocks = options.recomputed_blocks or network.depth
    if options.compile:
        if sharding:  # only a teacher runs a sharded EMA; previews use unsharded copies
            for block in emas[0].blocks:
                block.compile(dynamic=False)
        # DDP's buckets would split the graph of a block; the blocks are reduced separately anyway.
        torch._dynamo.config.optimize_ddp = False
        # The EMAs are not compiled, because they are evaluated with different batch shapes.
        for block in backbone.blocks:
            block.compile(dynamic=False)
    if sharding:
        sharding.apply(model, emas)
    adamw = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optimizer.learning_rate,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        weight_decay=optimizer.adam_weight_decay,
        eps=optimizer.adam_epsilon,
        fused=True,
    )
    return TrainState(model, emas, adamw, sharding=sharding)


def build_initial_network(network: SiTConfig, align: list[dict], seed: int) -> AlignedSiT:
    """Build the network of a run with its initial weights.

    Args:
        network: Architecture of the backbone.
        align: The "align" list of config.json, which describes the heads.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    backbone = SiT(network)  # before the heads, so that its weights do not depend on them
    return build_aligned_network(backbone, align)


def initialize_sharded_state(
    state: TrainState, network: SiTConfig, align: list[dict], seed: int
) -> None:
    """Give a sharded state the initial weights of an unsharded one. All processes must call this.

    Only the first process builds the whole network, in host memory.
    """
    sharding = state.sharding
    assert sharding is not None
    whole = build_initial_network(network, align, seed) if sharding.rank == 0 else None
    wait_for_all("the first process to initialize the weights")
    sharding.copy_from_first_process(state.model, whole)
    for ema in state.emas:
        ema.load_state_dict(state.model.backbone.state_dict())


class Networks(NamedTuple):
    """Parts of a run whose construction may fail on one process only."""

    config: dict  # contents of config.json
    cache_info: CacheInfo
    state: TrainState
    alignments: dict[str, Alignment]
    preview: Preview | None
    evaluator: Evaluator | None
    owner: RunOwner | None  # None on all processes but the first


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
    flags = build_args_json(settings)
    folder = settings.run.folder
    if settings.print_config:
        accelerator.print(format_flags(flags))
        return None

    # Compare the flags with those of the run, and find out where it stopped.
    num_steps = settings.loop.num_steps
    position = agree_on_position(settings, flags, accelerator.is_main_process)
    if position.step >= num_steps and not position.has_pending_work:
        logger.info(
            "%s has completed its %s steps; raise --max-train-steps to train further",
            folder,
            f"{position.step:,}",
        )
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
        log = open_log(folder, settings.loop, settings.log, flags, accelerator, networks, position)
    for line in describe_run(settings, accelerator, cache, networks):
        log.info(line)
    if position.checkpoints:
        log.info(f"resuming from {position.checkpoints[-1]}")
    monitors = make_monitors(settings, log, networks, position)
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
            check_same_run(flags, folder)
            position = find_position(
                folder,
                settings.loop.num_steps,
                settings.optimizer.ema_decay,
                settings.preview.every,
                settings.evaluation.every,
            )
    return broadcast_object(position, "the first process to find the newest checkpoint")


def make_monitors(
    settings: Settings, log: RunLog, networks: Networks, position: RunPosition
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


def copy_held_out_cache(
    evaluation: PeriodicEvaluationConfig, data: DataConfig
) -> PeriodicEvaluationConfig:
    """Replace a remote --eval-latents by its local copy, if there is space for one."""
    if not isinstance(evaluation.latents, str):
        return evaluation
    try:
        latents = copy_moments(evaluation.latents, resolve_local_cache(data.local_cache))
    except CacheError as error:
        raise UserError(f"--eval-latents: {error}") from None
    return replace(evaluation, latents=latents)


@contextmanager
def fail_together() -> Iterator[None]:
    """End all processes if the block fails on one of them.

    If it may fail on only some processes, the block must contain no collective.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as setup_error:
        error = setup_error
    if any(gather_objects(error is not None)):
        raise error or SystemExit(2)  # the process that failed prints the reason


def build_networks(
    settings: Settings,
    accelerator: Accelerator,
    cache: LatentCache,
    position: RunPosition,
    resources: ExitStack,
    sharding: Sharding | None,
) -> Networks:
    """Build everything that may fail on one process only; contains no collective.

    Args:
        settings: Settings of the run.
        accelerator: The accelerator.
        cache: The latent cache.
        position: Position at which the run stopped.
        resources: Receives the lock of the run folder.
        sharding: How the networks are sharded; None if each process holds them.
    """
    manifest = cache.manifest
    folder = settings.run.folder
    checkpoint = position.checkpoints[-1] if position.checkpoints else None
    images_per_class: list[int] | None = cache.images_per_class
    if checkpoint:
        with suppress(CheckpointError):  # a damaged checkpoint is reported by verify_checkpoint
            stored_config = read_config(checkpoint)
            alignments = restore_settings(settings.alignments, stored_config.get("align", []))
            settings = settings._replace(alignments=alignments)
            # All checkpoints of a run are sampled with the same classes.
            if "images_per_class" not in stored_config.get("data", {}):
                images_per_class = None
    network = build_network_config(settings.model, manifest)
    cache_info = make_cache_info(manifest, cache.read_feature_metadata())
    align = plan_alignments(settings.alignments, network, cache_info)
    config = build_config_json(settings, network, align, manifest, images_per_class)

    preview, evaluator = build_preview_and_evaluator(
        settings.preview,
        copy_held_out_cache(settings.evaluation, settings.data),
        settings.objective,
        settings.run.seed,
        accelerator,
        manifest,
        TrainedLabels.from_config(config),
    )
    owner = None
    if accelerator.is_main_process:
        owner = resources.enter_context(lock_run(folder, position.checkpoints))
    state = build_state(
        network,
        align,
        settings.optimizer,
        settings.device,
        settings.run.seed,
        accelerator.device,
        sharding,
    )
    context = make_run_context(
        state.emas[0],
        settings.objective.path_type,
        accelerator.autocast,
        settings.device.compile,
    )
    loaded_alignments = load_alignments(settings.alignments, align, cache_info, context)
    for name in required_cache_inputs(loaded_alignments):
        cache.require_folder(name)
    return Networks(config, cache_info, state, loaded_alignments, preview, evaluator, owner)


def set_weights(
    networks: Networks, settings: Settings, accelerator: Accelerator, checkpoints: list[Path]
) -> None:
    """Restore the newest checkpoint, or initialize a sharded state. All processes must call this.

    A state that is not sharded has its initial weights already.
    """
    state = networks.state
    if checkpoints:
        restore_checkpoint(networks, settings, accelerator, checkpoints[-1])
    elif state.sharding:
        network = state.model.backbone.config
        initialize_sharded_state(state, network, networks.config["align"], settings.run.seed)


def restore_checkpoint(
    networks: Networks, settings: Settings, accelerator: Accelerator, checkpoint: Path
) -> None:
    """Restore the state of a run. All processes must call this.

    Each process verifies some of the files. If the state is sharded, each process reads its rows.
    Otherwise, only the first process reads the tensors and sends them to the others.

    Args:
        networks: The networks of the run.
        settings: Settings of the run.
        accelerator: The accelerator.
        checkpoint: Folder of the checkpoint.
    """
    state = networks.state
    share = (accelerator.process_index, accelerator.num_processes)
    with fail_together():
        progress = verify_checkpoint(checkpoint, share)
    with fail_together():
        config = read_config(checkpoint)
        check_same_data(settings.data, settings.run.folder, config, networks.config)
        check_same_alignment(settings.run.folder, config.get("align", []), networks.config["align"])
        reads_tensors = state.sharding is not None or accelerator.is_main_process
        state.load(checkpoint, progress, reads_tensors)
    if state.sharding is None and accelerator.num_processes > 1:
        with waiting_for_processes("the first process to read the checkpoint", is_slow=True):
            state.broadcast_from_first_process()
    if accelerator.scaler is not None and "scaler" in state.progress:
        accelerator.scaler.load_state_dict(state.progress["scaler"])


def build_preview_and_evaluator(
    preview_config: PreviewConfig,
    evaluation_config: PeriodicEvaluationConfig,
    objective: ObjectiveConfig,
    seed: int,
    accelerator: Accelerator,
    manifest: Manifest,
    trained_labels: TrainedLabels,
) -> tuple[Preview | None, Evaluator | None]:
    """Build the preview and the evaluator; None if they are disabled."""
    has_preview = preview_config.every > 0
    has_evaluation = evaluation_config.every > 0
    preview, evaluator = None, None
    if has_preview or has_evaluation:
        vae = load_vae(preview_config.vae, manifest, accelerator.device)
        dtype = autocast_dtype(accelerator.mixed_precision)
    if has_preview:
        preview = Preview(
            vae,
            manifest.class_names,
            trained_labels,
            preview_config.cfg_scale,
            objective,
            seed,
            dtype,
            accelerator.process_index,
            accelerator.num_processes,
        )
    if has_evaluation:
        evaluator = Evaluator(
            evaluation_config,
            objective,
            vae,
            manifest,
            trained_labels,
            dtype,
            accelerator.process_index,
            accelerator.num_processes,
        )
    return preview, evaluator


def open_log(
    folder: Path,
    loop: LoopConfig,
    log_config: LogConfig,
    flags: dict,
    accelerator: Accelerator,
    networks: Networks,
    position: RunPosition,
) -> RunLog:
    """Open the log at the position of the run and start the trackers.

    Args:
        folder: The run folder.
        loop: Length of the run and batch size.
        log_config: Settings of the log and the trackers.
        flags: Contents of args.json, for the trackers.
        accelerator: The accelerator.
        networks: The networks of the run.
        position: Position at which the run stopped.
    """
    state = networks.state
    config = networks.config
    device = accelerator.device
    dtype = autocast_dtype(accelerator.mixed_precision)
    batch_size = loop.batch_size
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
        folder.name, loop.num_steps, state.step, batch_size, accelerator.is_main_process
    )
    trackers = Trackers(accelerator, logger.info)
    trackers.start(
        log_config.wandb_project,
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
        log_config.log_every,
        networks.owner,
    )
    log.restore(state.step, state.progress)
    return log


def describe_run(
    settings: Settings, accelerator: Accelerator, cache: LatentCache, networks: Networks
) -> list[str]:
    """Return messages about the networks, the batch, the data and the labels of a run."""
    networks_text = f"{settings.model.model}: {describe_networks(networks)}"
    loop_text = describe_loop(settings.loop, settings.objective, accelerator, cache)
    messages = [f"{networks_text}\n{loop_text}"]
    if networks.state.sharding:
        messages.append(networks.state.sharding.describe())
    return messages + describe_labels(networks.config, cache, settings.preview)


def describe_networks(networks: Networks) -> str:
    """Return a line about the backbone, and one about each alignment method."""
    model = networks.state.model
    num_parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    flops = backbone_flops(model.backbone.config)
    backbone = (
        f"{num_parameters / 1e6:.1f}M parameters, {flops / 1e9:.4g} GFLOPs "
        f"({flops / 2e9:.4g} GMAC) forward"
    )
    method_lines = [
        describe_alignment(entry, model, networks.cache_info) for entry in networks.config["align"]
    ]
    return "\n".join([backbone, *(method_lines or ["no alignment"])])


def describe_loop(
    loop: LoopConfig, objective: ObjectiveConfig, accelerator: Accelerator, cache: LatentCache
) -> str:
    """Return a line about the batch, and one about the data."""
    num_processes = accelerator.num_processes
    accumulation = loop.gradient_accumulation_steps
    local_batch_size = loop.batch_size // num_processes // accumulation
    epochs = loop.num_steps * loop.batch_size / len(cache)
    return (
        f"global batch {loop.batch_size} = {num_processes} (processes) x {local_batch_size} "
        f"(local) x {accumulation} (accumulated) on {accelerator.device.type}, precision "
        f"{accelerator.mixed_precision}; {objective.prediction} prediction on the "
        f"{objective.path_type} path, {objective.weighting} timesteps\n"
        f"{len(cache):,} images per epoch, {cache.manifest.num_classes} classes; "
        f"{loop.num_steps:,} steps are {epochs:.1f} epochs"
    )


def describe_labels(config: dict, cache: LatentCache, preview: PreviewConfig) -> list[str]:
    """Return notes about classes without images, and about previews that cannot be guided.

    Args:
        config: Contents of config.json.
        cache: The latent cache.
        preview: Settings of the previews.
    """
    lines = []
    trained_labels = TrainedLabels.from_config(config)
    empty_classes = describe_empty_classes(cache.images_per_class, cache.manifest.class_names)
    if empty_classes and trained_labels.images_per_class is None:
        empty_classes += ", except in this run, which an older version started"
    if empty_classes:
        lines.append(f"the cache has {empty_classes}")
    if preview.every and preview.cfg_scale > 1 and not trained_labels.has_null_class:
        lines.append(
            f"previews are drawn without guidance (--preview-cfg-scale {preview.cfg_scale:g} is "
            "ignored), because --cfg-prob 0 does not train the null class"
        )
    return lines
