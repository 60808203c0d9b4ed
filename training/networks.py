"""Build the networks of a run, their previews and evaluations, and restore their weights."""

from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from checkpointing.storage import (
    CheckpointError,
    RunOwner,
    lock_run,
    read_config,
    verify_checkpoint,
)
from common.cli import UserError
from common.watchdog import waiting_for_processes
from latents.cache import CacheError, LatentCache
from latents.manifest import Manifest
from latents.remote.local_copy import resolve_local_cache
from latents.sources import copy_moments
from models.labels import TrainedLabels
from models.target import CacheInfo
from training.alignment import (
    Alignment,
    load_alignments,
    make_cache_info,
    make_run_context,
    plan_alignments,
    required_cache_inputs,
    restore_settings,
)
from training.config import (
    DataConfig,
    ObjectiveConfig,
    PeriodicEvaluationConfig,
    PreviewConfig,
    Settings,
    autocast_dtype,
    build_network_config,
)
from training.coordination import fail_together
from training.evaluation import Evaluator
from training.frozen_network import load_frozen_network
from training.preview import Preview, load_vae
from training.resume import (
    RunPosition,
    build_config_json,
    check_same_alignment,
    check_same_data,
)
from training.sharding import Sharding
from training.state import TrainState, build_state, initialize_sharded_state


class Networks(NamedTuple):
    """Parts of a run whose construction may fail on one process only."""

    config: dict  # contents of config.json
    cache_info: CacheInfo
    state: TrainState
    alignments: dict[str, Alignment]
    preview: Preview | None
    evaluator: Evaluator | None
    owner: RunOwner | None  # None on all processes but the first


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
    state = build_state(network, align, settings, accelerator.device, sharding)
    context = make_run_context(
        state.emas[0],
        settings.objective.path_type,
        accelerator.autocast,
        partial(
            load_frozen_network,
            network=network,
            path_type=settings.objective.path_type,
            manifest=manifest,
            device=accelerator.device,
        ),
        settings.device.compile,
    )
    loaded_alignments = load_alignments(settings.alignments, align, cache_info, context)
    for name in required_cache_inputs(loaded_alignments):
        cache.require_folder(name)
    return Networks(config, cache_info, state, loaded_alignments, preview, evaluator, owner)


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
        initialize_sharded_state(state, networks.config["align"], settings.run.seed)


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
