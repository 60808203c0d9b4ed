"""Builds the objects of a run from its settings: networks, targets, log, previews, evaluation."""

import copy
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from checkpointing.storage import CheckpointError, lock_run, read_config, verify_checkpoint
from common.cli import UserError
from latents.cache import CacheError, LatentCache
from latents.manifest import Manifest
from models.flops import backbone_flops
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
    DeviceConfig,
    OptimizerConfig,
    Settings,
    autocast_dtype,
    build_network_config,
)
from training.config_files import (
    build_args_json,
    build_config_json,
    check_cache,
    check_same_data,
)
from training.evaluation import Evaluator
from training.guard import NonFiniteGuard
from training.log import Console, MetricMeans, MetricsFile, RunLog
from training.preview import Preview, load_vae
from training.schedule import RunPosition, find_position
from training.state import TrainState
from training.throughput import Throughput, measure_matmul_rate, training_flops
from training.trackers import Trackers


def build_state(
    network: SiTConfig,
    align: list[dict],
    optimizer: OptimizerConfig,
    options: DeviceConfig,
    device: torch.device,
    seed: int = 0,
) -> TrainState:
    """Build the networks and the optimizer at step 0.

    Args:
        network: Architecture of the backbone.
        align: config.json's "align", which describes the heads.
        optimizer: Settings of AdamW and the EMAs.
        options: Compilation and activation checkpointing.
        device: Device of the state.
        seed: Seed of the initial weights.
    """
    torch.manual_seed(seed)
    backbone = SiT(network)  # before the heads, so that its weights do not depend on them
    model = build_aligned_network(backbone, align).to(device)
    emas = [copy.deepcopy(backbone).eval().requires_grad_(False) for _ in optimizer.ema_decay]
    adamw = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optimizer.learning_rate,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        weight_decay=optimizer.adam_weight_decay,
        eps=optimizer.adam_epsilon,
        fused=True,
    )
    backbone.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        # DDP's buckets would split the graph of a block; the blocks are reduced separately anyway.
        torch._dynamo.config.optimize_ddp = False
        for block in backbone.blocks:  # not those of the EMAs, which are sampled with other shapes
            block.compile()
    return TrainState(model, emas, adamw)


class Run(NamedTuple):
    """The objects of a run after set-up."""

    cache: LatentCache
    config: dict  # contents of config.json
    cache_info: CacheInfo
    state: TrainState
    alignments: dict[str, Alignment]
    preview: Preview | None
    evaluator: Evaluator | None


def open_cache(settings: Settings) -> LatentCache:
    """Open the latent cache and check it against the flags."""
    try:
        cache = LatentCache(*settings.data.data_dir)
    except CacheError as error:
        raise UserError(f"--data-dir: {error}") from None
    check_cache(settings.data, settings.model, cache.manifest)
    return cache


def read_position(settings: Settings, accelerator: Accelerator) -> RunPosition:
    """Find out where the run stopped.

    Only the first process looks, because on a network disk others may see files later.
    """
    position = [RunPosition()]
    if accelerator.is_main_process:
        position = [
            find_position(
                settings.run.folder,
                settings.optimizer.ema_decay,
                settings.loop.num_steps,
                settings.preview,
                settings.evaluation,
            )
        ]
    return broadcast_object_list(position)[0]


def build_run(
    settings: Settings,
    accelerator: Accelerator,
    cache: LatentCache,
    position: RunPosition,
    resources: ExitStack,
) -> Run:
    """Build everything that may fail on one process only; contains no collective.

    Args:
        settings: Settings of the run.
        accelerator: The accelerator.
        cache: The latent cache.
        position: Where the run stopped.
        resources: Receives the lock of the run folder.
    """
    device, manifest, folder = accelerator.device, cache.manifest, settings.run.folder
    checkpoint = position.checkpoints[-1] if position.checkpoints else None
    alignments = settings.alignments
    if checkpoint:
        with suppress(CheckpointError):  # a damaged checkpoint is reported by verify_checkpoint
            alignments = restore_settings(alignments, read_config(checkpoint).get("align", []))
    network = build_network_config(settings.model, manifest)
    cache_info = make_cache_info(manifest, cache.read_feature_metadata())
    align = plan_alignments(alignments, network, cache_info)
    config = build_config_json(settings, network, align, manifest)

    preview, evaluator = build_monitors(settings, accelerator, manifest)
    if accelerator.is_main_process:
        resources.enter_context(lock_run(folder, position.checkpoints))
    state = build_state(
        network, align, settings.optimizer, settings.device, device, settings.run.seed
    )
    context = make_run_context(
        settings.objective.path_type,
        state.emas[0],
        device,
        accelerator.autocast,
        settings.device.compile,
    )
    loaded = load_alignments(alignments, align, network, cache_info, context)
    for name in required_cache_inputs(loaded):
        cache.require_folder(name)
    if checkpoint:
        progress = verify_checkpoint(checkpoint)
        check_same_data(settings.data, folder, read_config(checkpoint), config)
        state.load(checkpoint, progress)
        if accelerator.scaler is not None and "scaler" in state.progress:
            accelerator.scaler.load_state_dict(state.progress["scaler"])
    return Run(cache, config, cache_info, state, loaded, preview, evaluator)


def build_monitors(
    settings: Settings, accelerator: Accelerator, manifest: Manifest
) -> tuple[Preview | None, Evaluator | None]:
    """Build the preview of the first process and the evaluator, as far as they are enabled."""
    objective = settings.objective
    preview, evaluator = None, None
    has_preview = settings.preview.every > 0 and accelerator.is_main_process
    has_evaluation = settings.evaluation.every > 0
    if not has_preview and not has_evaluation:
        return preview, evaluator
    vae = load_vae(settings.preview.vae, manifest, accelerator.device)
    if has_preview:
        preview = Preview(
            vae,
            manifest.class_names,
            settings.preview.cfg_scale,
            objective.path_type,
            objective.prediction,
            settings.run.seed,
        )
    if has_evaluation:
        evaluator = Evaluator(
            settings.evaluation,
            objective,
            vae,
            manifest,
            autocast_dtype(accelerator.mixed_precision),
            accelerator.process_index,
            accelerator.num_processes,
        )
    return preview, evaluator


def build_run_or_exit(
    settings: Settings,
    accelerator: Accelerator,
    cache: LatentCache,
    position: RunPosition,
    resources: ExitStack,
) -> Run:
    """Call `build_run` on every process; if it fails on one, end all of them."""
    run = None
    error: UserError | None = None
    try:
        run = build_run(settings, accelerator, cache, position, resources)
    except (UserError, CheckpointError, CacheError) as setup_error:
        error = UserError(str(setup_error))
    if any(gather_object([error is not None])):
        raise error or SystemExit(2)  # the process that failed prints the reason
    assert run is not None
    return run


def load_cache_into_ram(cache: LatentCache, accelerator: Accelerator) -> None:
    """Load the cache into memory that the processes of a machine share."""
    try:
        cache.load_into_ram(accelerator.process_index, lambda value: gather_object([value]))
    except CacheError as error:
        raise UserError(str(error)) from None


def open_log(settings: Settings, accelerator: Accelerator, run: Run) -> RunLog:
    """Open the log at the run's position and start the trackers."""
    state, folder = run.state, settings.run.folder
    is_main, device = accelerator.is_main_process, accelerator.device
    batch_size = settings.loop.batch_size
    total = settings.loop.num_steps * batch_size
    names = ["loss", "denoising"]
    for method in run.alignments:
        names += [f"align/{method}", f"cosine/{method}", f"token_norm/{method}"]
    means = MetricMeans([*names, "grad_norm"], device, accelerator.reduce, state.progress)
    guard = NonFiniteGuard(
        state.optimizer,
        accelerator.mixed_precision == "fp16",
        *state.progress.get("bad_in_a_row", ()),
    )
    flops = training_flops(SiTConfig(**run.config["model"]), run.config["align"], run.cache_info)
    rate = measure_matmul_rate(device, autocast_dtype(accelerator.mixed_precision))
    throughput = Throughput(
        batch_size, device, state.step, flops / rate / accelerator.num_processes
    )
    console = Console(folder, total, state.step * batch_size, is_main)
    trackers = Trackers(accelerator, console.info)
    trackers.start(
        settings.log.wandb_project,
        settings.run.exp_name,
        folder,
        run.config | build_args_json(settings),
    )
    log = RunLog(
        console, MetricsFile(folder), trackers, means, throughput, guard, settings.log.log_every
    )
    log.restore(state.step, state.progress)
    return log


def summary(settings: Settings, accelerator: Accelerator, run: Run) -> str:
    """Return what is about to run, in four lines and one more per further method."""
    loop, objective = settings.loop, settings.objective
    backbone = run.state.model.backbone
    size = sum(parameter.numel() for parameter in backbone.parameters())
    flops = backbone_flops(backbone.config)
    methods = [
        describe_alignment(entry, run.state.model, run.cache_info) for entry in run.config["align"]
    ]
    num_processes, accumulation = accelerator.num_processes, loop.gradient_accumulation_steps
    local = loop.batch_size // num_processes // accumulation
    num_images = len(run.cache)
    epochs = loop.num_steps * loop.batch_size / num_images
    return "\n".join(
        [
            f"{settings.model.model}: {size / 1e6:.1f}M parameters, {flops / 1e9:.4g} GFLOPs "
            f"({flops / 2e9:.4g} GMAC) forward",
            *(methods or ["no alignment"]),
            f"global batch {loop.batch_size} = {num_processes} (processes) x {local} (local) x "
            f"{accumulation} (accumulated) on {accelerator.device.type}, precision "
            f"{accelerator.mixed_precision}; {objective.prediction} prediction on the "
            f"{objective.path_type} path, {objective.weighting} timesteps",
            f"{num_images:,} images per epoch, {run.cache.manifest.num_classes} classes; "
            f"{loop.num_steps:,} steps are {epochs:.1f} epochs",
        ]
    )
