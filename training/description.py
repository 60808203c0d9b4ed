"""Describe a run in its log."""

from accelerate import Accelerator

from latents.cache import LatentCache
from models.flops import backbone_flops
from models.labels import TrainedLabels, describe_empty_classes
from training.alignment import describe_alignment
from training.config import LoopConfig, ObjectiveConfig, PreviewConfig, Settings
from training.networks import Networks


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
    if model.backbone.config.qk_norm:
        backbone += ", QK normalization"
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
