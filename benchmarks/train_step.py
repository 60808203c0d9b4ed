r"""Time the step of train.py without and with alignment, in turn, in one process.

    python -m benchmarks.train_step --model SiT-XL/2 --batch-size 256 --precision bf16 --compile \
        --json xl2.json

The inputs are random latents of ImageNet's shape in host memory, where a loader leaves them, and
random images for repa. The encoder of repa has random weights, because the arithmetic is the same.
All variants share the backbone, the EMA and the optimizer; on a GPU, the peak memory of each
variant is measured separately afterwards. `--plain` adds the minimal step that trains the network
of sra2: forward, both losses, backward and AdamW, on a batch that is already interpolated; without
clipping, EMA, random numbers, gauges and guard. The first step of the first variant includes
compilation. benchmarks/cost.py adds parameters and FLOPs of each variant.
"""

import argparse
import copy
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import models.targets
from benchmarks.measure import (
    add_result_flags,
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    time_call,
    time_in_turn,
)
from benchmarks.run_steps import allow_tf32, build_step, make_accelerator
from common import cli
from common.cli import UserError
from common.config import add_flags, read_flags, setting
from common.keyed_random import Purpose, normal, uniform
from dataset import CachedBatch
from interpolant import INTERPOLANTS, interpolate
from latents.manifest import Manifest
from models.flops import backbone_flops, head_flops
from models.projector import AlignedSiT
from models.sit import PRESETS, SiTConfig
from models.targets import TARGETS, CacheInfo, latent_tokens
from train import Step
from training.alignment import (
    head_specs,
    make_cache_info,
    plan_alignments,
    required_cache_inputs,
)
from training.alignment_config import default_alignment
from training.config import (
    DeviceConfig,
    LoopConfig,
    Settings,
    autocast_dtype,
    build_network_config,
    check_batch_size,
    check_compiler,
    parse_settings,
)
from training.throughput import measure_matmul_rate, training_flops


@dataclass(frozen=True)
class StepConfig:
    """Settings of the steps."""

    model: str = setting(
        "SiT-XL/2", help="a preset of models/sit.py", choices=PRESETS, metavar="NAME"
    )
    repa_encoder: str | None = setting(
        None, help="same as --repa-encoder of train.py", metavar="NAME"
    )
    batch_size: int = setting(256, help="images per update", type=cli.positive_int)
    precision: str = setting(
        "auto",
        help="same as --mixed-precision of train.py",
        choices=("auto", "no", "fp16", "bf16"),
    )
    compile: bool = setting(False, help="same as --compile of train.py")
    activation_checkpointing: bool = setting(
        False, help="same as --activation-checkpointing of train.py"
    )
    allow_tf32: bool = setting(False, help="same as --allow-tf32 of train.py")
    gradient_accumulation_steps: int = setting(
        1, help="same as --gradient-accumulation-steps of train.py", type=cli.positive_int
    )
    latent_size: int = setting(
        32,
        help="height and width of the latents: 32 for 256 pixels, 64 for 512",
        type=cli.positive_int,
    )


def make_parser(description: str, command: str) -> cli.Parser:
    """Return a parser of the flags that this benchmark shares with benchmarks/cost.py."""
    parser = cli.Parser(description, command, "[--model NAME]")
    add_flags(parser, StepConfig)
    parser.add_argument(
        "--align",
        type=variant_name,
        nargs="+",
        default=["none", "sra2"],
        metavar="VARIANT",
        help=f"variants to compare: none, {', '.join(TARGETS)}, or several joined by +, such as "
        "sra2+repa",
    )
    parser.add_argument(
        "--steps",
        type=cli.positive_int,
        help="steps per timed round (default: 10 on a GPU, 1 on a CPU)",
    )
    add_result_flags(parser, rounds=20, warm_up=2)
    return parser


def variant_name(text: str) -> str:
    """Check the name of a variant; an argparse type."""
    names = text.split("+")
    is_known = set(names) <= set(TARGETS) and len(set(names)) == len(names)
    if text != "none" and not is_known:
        raise argparse.ArgumentTypeError(
            f"{text} must be none, or different methods out of {', '.join(TARGETS)} joined by +"
        )
    return text


def alignment_methods(variant: str) -> list[str]:
    """Return the alignment methods of a variant."""
    if variant == "none":
        return []
    if variant == "plain":
        return ["sra2"]
    return variant.split("+")


def default_settings(model: str) -> Settings:
    """Return the settings of train.py for a model, with all flags at their defaults."""
    return parse_settings(["--exp-name", "benchmark", "--data-dir", ".", "--model", model])


class Plan(NamedTuple):
    """A training run that has the methods of all variants."""

    settings: Settings
    manifest: Manifest
    cache: CacheInfo
    network: SiTConfig
    align: list[dict]  # config.json's "align"

    def entries(self, variant: str) -> list[dict]:
        """Return the entries of "align" that belong to a variant."""
        methods = alignment_methods(variant)
        return [entry for entry in self.align if entry["method"] in methods]


def make_plan(config: StepConfig, variants: list[str]) -> Plan:
    """Plan the run of several variants, without building anything.

    Raises:
        UserError: The settings contradict each other.
    """
    if config.latent_size % PRESETS[config.model]["patch"]:
        raise UserError(
            f"--latent-size {config.latent_size}: {config.model} cannot cut these latents into "
            "patches; choose a multiple of its patch size"
        )
    # Each method once, in the order of the variants.
    methods = dict.fromkeys(name for variant in variants for name in alignment_methods(variant))
    alignments = {method: default_alignment(method, config.model) for method in methods}
    if config.repa_encoder:
        if "repa" not in alignments:
            raise UserError("--repa-encoder needs repa in --align: add it, or remove the flag")
        encoder = replace(alignments["repa"].settings, encoder=config.repa_encoder)
        alignments["repa"] = replace(alignments["repa"], settings=encoder)
    settings = default_settings(config.model)._replace(
        alignments=tuple(alignments.values()),
        loop=LoopConfig(
            batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        ),
        device=DeviceConfig(
            config.precision,
            config.compile,
            config.activation_checkpointing,
            config.allow_tf32,
        ),
    )
    check_compiler(settings.device)
    check_batch_size(settings.loop, num_processes=1)

    manifest = synthetic_manifest(config.latent_size)
    cache = make_cache_info(manifest)
    network = build_network_config(settings.model, manifest)
    align = plan_alignments(settings.alignments, network, cache)
    return Plan(settings, manifest, cache, network, align)


def synthetic_manifest(latent_size: int = 32) -> Manifest:
    """Return the manifest of a cache with ImageNet's latents and images, as far as steps use it."""
    return Manifest(
        source="synthetic",
        count=1_281_167,
        num_classes=1000,
        class_names=[],
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


def random_batch(manifest: Manifest, size: int, with_images: bool) -> CachedBatch:
    """Return a batch of random moments and labels, as a loader returns it.

    Args:
        manifest: Manifest of the cache.
        size: Number of images.
        with_images: Whether the batch contains images, (B, 3, S, S) uint8.
    """
    torch.manual_seed(0)
    channels, height, width = manifest.latent_shape
    moments = torch.randn(size, 2 * channels, height, width)
    moments[:, channels:] = 0.05
    labels = torch.randint(manifest.num_classes, (size,))
    inputs = {}
    if with_images:
        shape = (size, 3, manifest.resolution, manifest.resolution)
        inputs["images"] = torch.randint(256, shape, dtype=torch.uint8)
    return CachedBatch(torch.arange(size), moments.half(), labels, inputs)


def make_plain_step(
    plan: Plan, accelerator: Accelerator, model: AlignedSiT, batch: CachedBatch
) -> Callable[[], None]:
    """Return the minimal step that trains the network of sra2.

    Args:
        plan: The run.
        accelerator: Determines device, precision and gradient scaler.
        model: The network, with a head for sra2.
        batch: The batch of all steps.
    """
    device = accelerator.device
    accumulation = plan.settings.loop.gradient_accumulation_steps

    # The inputs of all steps: noisy latents, and what the outputs are compared with.
    batch = batch.to(device)
    latents = plan.cache.scale.mean(batch.moments)
    shape = tuple(plan.manifest.latent_shape)
    noise = normal(0, Purpose.NOISE, batch.stream_position, shape).float()
    t = uniform(0, Purpose.TIMESTEP, batch.stream_position).float()
    x_t, velocity = interpolate(INTERPOLANTS["linear"], latents, noise, t)
    inputs = (x_t, t, batch.labels, velocity, latent_tokens(latents, plan.network.patch))
    micro_batches = list(zip(*(tensor.chunk(accumulation) for tensor in inputs)))

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    scaler = accelerator.scaler
    dtype = autocast_dtype(accelerator.mixed_precision)
    block, head = model.blocks["sra2"], model.heads["sra2"]

    def compute_loss(x_t: Tensor, t: Tensor, labels: Tensor, v: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction, tokens = model.backbone(x_t, t, labels, return_blocks=(block,))
            projected = head(tokens[block])
        cosine = F.cosine_similarity(projected.float(), target, dim=-1)
        return F.mse_loss(prediction.float(), v) + 1 - cosine.mean()

    def step() -> None:
        for micro_batch in micro_batches:
            loss = compute_loss(*micro_batch)
            if scaler:
                loss = scaler.scale(loss)
            loss.div(accumulation).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def build_steps(
    config: StepConfig, accelerator: Accelerator, variants: list[str]
) -> dict[str, Callable[[], object]]:
    """Build the step of each variant, with its batch.

    Raises:
        UserError: The settings contradict each other.
    """
    plan = make_plan(config, variants)
    with patch.object(models.targets, "Encoder", partial(models.targets.Encoder, pretrained=False)):
        full_step = build_step(plan.settings, accelerator, plan.manifest, plan.cache)
    with_images = "images" in required_cache_inputs(full_step.alignments)
    batch = random_batch(plan.manifest, config.batch_size, with_images)
    if accelerator.device.type == "cuda":
        batch = batch.pin_memory()
    actions: dict[str, Callable[[], object]] = {}
    for variant in variants:
        if variant == "plain":
            model = full_step.state.model
            actions[variant] = make_plain_step(plan, accelerator, model, batch)
            continue
        step = select_methods(full_step, alignment_methods(variant))
        needed = required_cache_inputs(step.alignments)
        inputs = {name: batch.inputs[name] for name in needed}
        actions[variant] = partial(step, replace(batch, inputs=inputs))
    return actions


def select_methods(step: Step, methods: list[str]) -> Step:
    """Return a step with the same state that applies only some of the alignment methods."""
    selected = copy.copy(step)
    selected.alignments = {method: step.alignments[method] for method in methods}
    network = step.state.model
    names = [name for a in selected.alignments.values() for name in a.head_names]
    heads = {name: network.heads[name] for name in names}
    blocks = {name: network.blocks[name] for name in names}
    selected.model = step.accelerator.prepare(AlignedSiT(network.backbone, heads, blocks))
    return selected


def measure_peak_memory(config: StepConfig, accelerator: Accelerator, variant: str) -> float:
    """Return the peak GPU memory of a variant in GiB, without the other variants in memory."""
    accelerator.free_memory()
    gc.collect()
    allocated = torch.cuda.memory_allocated(accelerator.device) / 2**30
    steps = build_steps(config, accelerator, [variant])
    timings = time_in_turn(steps, accelerator.device, rounds=1, warm_up=2)
    return timings.peak_memory_gib[variant] - allocated


def measure(
    config: StepConfig, variants: list[str], rounds: int, steps: int | None, warm_up: int
) -> dict:
    """Time the variants in turn and compare them.

    Args:
        config: Settings of the steps.
        variants: Names of the variants.
        rounds: Number of timed rounds.
        steps: Steps per round, by default 10 on a GPU and 1 on a CPU.
        warm_up: Number of rounds before the timed ones.

    Returns:
        The result of the benchmark.

    Raises:
        UserError: The settings contradict each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "this benchmark runs on one process: run it without a launcher; the log of train.py "
            "shows the speed of several processes"
        )
    plan = make_plan(config, variants)
    accelerator = make_accelerator(config.precision)
    allow_tf32(config.allow_tf32)
    device = accelerator.device
    dtype = autocast_dtype(accelerator.mixed_precision)
    calls = steps or (10 if device.type == "cuda" else 1)

    # Measure the rate of matrix products before and after, because the speed of machines drifts.
    rate_before = measure_matmul_rate(device, dtype, seconds=1.0)
    actions = build_steps(config, accelerator, variants)
    first_step_s = {variant: time_call(action, device) for variant, action in actions.items()}
    timings = time_in_turn(actions, device, rounds, calls, warm_up)
    rate = max(rate_before, measure_matmul_rate(device, dtype, seconds=1.0))
    actions.clear()
    peak_memory_gib = timings.peak_memory_gib
    if device.type == "cuda":
        peak_memory_gib = {
            variant: measure_peak_memory(config, accelerator, variant) for variant in variants
        }

    results = {}
    for variant in variants:
        step_s = median_and_quartiles(timings.seconds[variant])
        images_per_s = config.batch_size / step_s["median"]
        flops = training_flops(plan.network, plan.entries(variant), plan.cache)
        results[variant] = {
            "step_s": step_s,
            "images_per_s": images_per_s,
            "mfu": flops * images_per_s / rate,
            "peak_memory_gib": peak_memory_gib[variant],
            "first_step_s": first_step_s[variant],
        }
    return {
        "benchmark": "train_step",
        "machine": describe_machine(device),
        "model": config.model,
        "batch_size": config.batch_size,
        "latent_size": config.latent_size,
        "precision": accelerator.mixed_precision,
        "compile": config.compile,
        "activation_checkpointing": config.activation_checkpointing,
        "allow_tf32": config.allow_tf32,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "rounds": rounds,
        "steps": calls,
        "encoder_weights": "random" if plan.entries("repa") else None,
        "matmul_flops_per_s": rate,
        "forward_flops_per_image": backbone_flops(plan.network),
        "results": results,
        "ratios": compare_variants(timings.seconds),
    }


def compare_variants(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Return the time of each aligned variant relative to `none`, and of sra2 to `plain`."""
    pairs = []
    for variant in seconds:
        if variant not in ("none", "plain"):
            pairs.append((variant, "none"))
        if variant == "sra2":
            pairs.append((variant, "plain"))
    return {f"{a}/{b}": ratio_per_round(seconds[a], seconds[b]) for a, b in pairs if b in seconds}


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "python -m benchmarks.train_step")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="also time forward, backward and AdamW alone; this AdamW has its own moments",
    )
    args = parser.parse_args()
    config = read_flags(StepConfig, args)
    variants = list(dict.fromkeys(args.align))
    if args.plain:
        variants.insert(0, "plain")
    result = measure(config, variants, args.rounds, args.steps, args.warm_up)
    plan = make_plan(config, variants)
    specs = [spec for entry in plan.align for spec in head_specs(entry).values()]
    heads = sum(head_flops(plan.network, spec) for spec in specs)
    result["head_flops_share"] = heads / backbone_flops(plan.network)
    report(result, args.json)


if __name__ == "__main__":
    cli.run(main)
