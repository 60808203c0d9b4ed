"""Plan runs of train.py on synthetic data, with several variants of alignment.

A variant is "none", "plain", a key of `VARIANT_FLAGS`, or the names of alignment methods joined by
"+". Variants whose methods have the same settings share one network.
"""

import argparse
from dataclasses import dataclass, replace

import torch

from benchmarks.run_steps import Plan, plan_run
from common import cli
from common.cli import UserError
from common.config import setting
from dataset import CachedBatch
from latents.manifest import Manifest
from models.sit import PRESETS
from models.targets import TARGETS
from training.config import (
    SHARD_MODES,
    DeviceConfig,
    LoopConfig,
    ModelConfig,
    check_batch_size,
    check_compiler,
    parse_settings,
)

# Variant -> flags of train.py that differ from the defaults of its method.
VARIANT_FLAGS = {
    "irepa": [
        *("--align", "repa", "--align-weight", "1"),
        *("--projector-type", "conv", "--target-norm", "zscore"),
    ],
}


def parse_variant(text: str) -> str:
    """Return the name of a variant if the name is valid. Used as an argparse type."""
    names = text.split("+")
    is_known = set(names) <= set(TARGETS) and len(set(names)) == len(names)
    if text not in ("none", *VARIANT_FLAGS) and not is_known:
        raise argparse.ArgumentTypeError(
            f"{text} must be none, {', '.join(VARIANT_FLAGS)}, or distinct methods out of "
            f"{', '.join(TARGETS)} joined by +"
        )
    return text


@dataclass(frozen=True)
class StepConfig(ModelConfig, DeviceConfig):
    """Settings of the timed steps."""

    mixed_precision: str = setting(
        "auto",
        help="same as --mixed-precision of train.py",
        flags=("--precision",),
        choices=("auto", "no", "fp16", "bf16"),
    )
    batch_size: int = setting(256, help="images per update", type=cli.positive_int)
    gradient_accumulation_steps: int = setting(
        1, help="number of micro-batches per update", type=cli.positive_int
    )
    latent_size: int = setting(
        32,
        help="height and width of the latents: 32 for 256 pixels, 64 for 512 pixels",
        type=cli.positive_int,
    )
    shard: str = setting(
        "none",
        help="also time the step of each variant with this sharding over one process, which shows "
        "what FSDP costs apart from communication",
        choices=SHARD_MODES,
    )
    repa_encoder: str | None = setting(
        None, help="same as --repa-encoder of train.py", metavar="NAME"
    )


def split_variant(variant: str) -> list[str]:
    """Return the alignment methods of a variant."""
    special = {"none": [], "plain": ["sra2"], "irepa": ["repa"]}
    return special.get(variant, variant.split("+"))


def plan_groups(config: StepConfig, variants: list[str]) -> list[tuple[list[str], Plan]]:
    """Return groups of variants that share a network, with the plan of each group.

    Raises:
        UserError: If the settings contradict each other.
    """
    groups = [[variant] for variant in variants if variant in VARIANT_FLAGS]
    shared = [variant for variant in variants if variant not in VARIANT_FLAGS]
    if shared:
        groups.insert(0, shared)
    use_repa = [any("repa" in split_variant(variant) for variant in group) for group in groups]
    plans = []
    for group, uses_repa in zip(groups, use_repa):
        group_config = config
        if any(use_repa) and not uses_repa:
            group_config = replace(config, repa_encoder=None)  # for another group
        plans.append((group, make_plan(group_config, group)))
    return plans


def make_plans(config: StepConfig, variants: list[str]) -> dict[str, Plan]:
    """Return the plan of each variant.

    Raises:
        UserError: If the settings contradict each other.
    """
    plans: dict[str, Plan] = {}
    for group, plan in plan_groups(config, variants):
        plans |= {variant: select_variant(plan, variant) for variant in group}
    return {variant: plans[variant] for variant in variants}


def select_variant(plan: Plan, variant: str) -> Plan:
    """Return the plan of one variant, given the plan of all variants."""
    methods = split_variant(variant)
    alignments = tuple(
        alignment for alignment in plan.settings.alignments if alignment.method in methods
    )
    return plan._replace(
        settings=plan.settings._replace(alignments=alignments),
        align=[entry for entry in plan.align if entry["method"] in methods],
    )


def make_plan(config: StepConfig, variants: list[str]) -> Plan:
    """Plan a run with the alignment methods of a group of variants.

    Raises:
        UserError: If the settings contradict each other.
    """
    if config.latent_size % PRESETS[config.model]["patch"]:
        raise UserError(
            f"--latent-size {config.latent_size}: {config.model} cannot divide these latents into "
            "patches; pass a multiple of the patch size"
        )
    # Include every method once, in the order of the variants.
    methods = dict.fromkeys(name for variant in variants for name in split_variant(variant))
    flags = ["--exp-name", "benchmark", "--data-dir", ".", "--model", config.model]
    flags += VARIANT_FLAGS.get(variants[0], ["--align", *(methods or ["none"])])
    if "selftrans" in methods:  # the benchmarks use random weights in place of a checkpoint
        flags += ["--selftrans-checkpoint", "random"]
    if config.repa_encoder:
        flags += ["--repa-encoder", config.repa_encoder]
    loop = LoopConfig(
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    check_compiler(config)
    check_batch_size(loop, num_processes=1)
    settings = parse_settings(flags)._replace(loop=loop, device=config)
    return plan_run(settings, make_synthetic_manifest(config.latent_size))


def make_synthetic_manifest(latent_size: int = 32) -> Manifest:
    """Return a manifest like that of ImageNet. Only the fields that steps use have real values."""
    return Manifest(
        source="synthetic",
        count=1_281_167,
        num_classes=1000,
        class_names=[str(k) for k in range(1000)],
        resolution=8 * latent_size,
        crop="",
        vae="",
        vae_fingerprint="",
        scale=0.18215,
        shift=0.0,
        latent_shape=[4, latent_size, latent_size],
        dtype="float16",
        mean=[],
        std=[],
        images=True,
    )


def make_random_batch(manifest: Manifest, size: int) -> CachedBatch:
    """Return a batch of random moments, labels and images, in the format of a loader.

    Args:
        manifest: Manifest of the latent cache.
        size: Number of images.
    """
    torch.manual_seed(0)
    channels, height, width = manifest.latent_shape
    moments = torch.randn(size, 2 * channels, height, width)
    moments[:, channels:] = 0.05
    labels = torch.randint(manifest.num_classes, (size,))
    shape = (size, 3, manifest.resolution, manifest.resolution)
    images = torch.randint(256, shape, dtype=torch.uint8)
    return CachedBatch(torch.arange(size), moments.half(), labels, {"images": images})
