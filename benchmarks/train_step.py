"""Times train.py's own step without and with alignment, in turn, in one run.

    python -m benchmarks.train_step --model SiT-XL/2 --batch-size 256 --precision bf16 --compile --json xl2.json

Random latents of ImageNet's shape start in host memory, as a loader leaves them, and for repa random images; its encoder has
random weights, as the arithmetic is the same. All that is timed shares backbone, averages and optimizer; peak memory on a GPU
is measured afterwards, of each without the others. `plain` is the least that trains the network of sra2: forward, both
losses, backward, AdamW, on a batch interpolated beforehand; without clipping, EMA, random numbers, gauges and guard. What is
compiled is compiled in the first step of the first of them. What each adds in parameters and FLOPs: benchmarks/cost.py.
"""

import argparse
import copy
import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import models.targets
from benchmarks.measure import (
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    time_first_call,
    time_in_turn,
)
from common import cli
from common.cli import UserError
from common.keyed_random import Purpose, normal, uniform
from dataset import CachedBatch
from interpolant import INTERPOLANTS, interpolate
from latents.cache import Manifest
from models.flops import backbone_flops, head_flops
from models.projector import AlignedSiT
from models.sit import PRESETS, SiTConfig
from models.targets import TARGETS, Data, latent_tokens
from train import Step, build
from training import alignment
from training.config import check_args, make_config, parse_args, precision
from training.guard import NonFiniteGuard
from training.throughput import matmul_rate, training_flops


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What to time and how; benchmarks/cost.py takes them too."""
    add = parser.add_argument
    add(
        "--model",
        choices=PRESETS,
        default="SiT-XL/2",
        metavar="NAME",
        help="a preset of models/sit.py",
    )
    add(
        "--align",
        type=way,
        nargs="+",
        default=["none", "sra2"],
        metavar="WAY",
        help=f"what to compare: none, {', '.join(TARGETS)}, or several of these as in sra2+repa",
    )
    add("--repa-encoder", metavar="NAME", help="as train.py's")
    add("--batch-size", type=cli.positive_int, default=256, help="images of one update")
    add(
        "--precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="as train.py's --mixed-precision",
    )
    add("--compile", action="store_true", help="as train.py's")
    add("--activation-checkpointing", action="store_true", help="as train.py's")
    add("--allow-tf32", action="store_true", help="as train.py's")
    add("--gradient-accumulation-steps", type=cli.positive_int, default=1, help="as train.py's")
    add(
        "--latent-size",
        type=cli.positive_int,
        default=32,
        help="side of the latents: 32 for 256 pixels, 64 for 512",
    )
    add(
        "--rounds",
        type=cli.positive_int,
        default=20,
        help="timings of each, of which the median counts",
    )
    add(
        "--steps",
        type=cli.positive_int,
        help="steps of one timing (default: 10 on a GPU, 1 on CPUs)",
    )
    add("--warm-up", type=cli.non_negative_int, default=2, help="rounds before those")
    add("--json", type=Path, help="file for the result")


def way(text: str) -> str:
    """An argparse type: none, or methods joined by +."""
    names = text.split("+")
    if text != "none" and (not {*names} <= {*TARGETS} or len({*names}) < len(names)):
        raise argparse.ArgumentTypeError(
            f"{text} is neither none nor some of {', '.join(TARGETS)} joined by +"
        )
    return text


def alignment_methods(name: str) -> list[str]:
    """'sra2+repa' -> sra2 and repa; of none no method."""
    return {"none": [], "plain": ["sra2"]}.get(name, name.split("+"))


def parse_training_flags(given: list) -> argparse.Namespace:
    """train.py's flags, at their defaults but for those given here."""
    flags = parse_args("", ["--exp-name", "benchmark", "--data-dir", ".", *map(str, given)])
    check_args(flags, processes=1)
    return flags


class Plan(NamedTuple):
    """A run of train.py with every method of the ways compared."""

    flags: argparse.Namespace
    manifest: Manifest
    data: Data
    config: dict
    network: SiTConfig

    def align(self, name: str) -> list[dict]:
        """The entries of config.json's "align" that this way has."""
        return [
            entry for entry in self.config["align"] if entry["method"] in alignment_methods(name)
        ]


def make_plan(args: argparse.Namespace, names: list[str]) -> Plan:
    """Nothing is built yet. Raises UserError."""
    every = dict.fromkeys(method for name in names for method in alignment_methods(name))
    given = [
        "--model",
        args.model,
        "--batch-size",
        args.batch_size,
        "--mixed-precision",
        args.precision,
    ]
    given += [
        "--gradient-accumulation-steps",
        args.gradient_accumulation_steps,
        "--align",
        *(every or ["none"]),
    ]
    given += ["--repa-encoder", args.repa_encoder] if args.repa_encoder else []
    given += [
        flag
        for flag in ("--compile", "--activation-checkpointing", "--allow-tf32")
        if getattr(args, flag[2:].replace("-", "_"))
    ]
    flags, manifest = parse_training_flags(given), synthetic_manifest(args.latent_size)
    if args.latent_size % PRESETS[args.model]["patch"]:
        raise UserError(
            f"--latent-size {args.latent_size}: {args.model} cannot cut it into patches"
        )
    data = replace(alignment.data_of(manifest), images=True)
    config = make_config(flags, manifest, data)
    return Plan(flags, manifest, data, config, SiTConfig(**config["model"]))


def synthetic_manifest(latent_size: int = 32) -> Manifest:
    """Of a cache of ImageNet's latents, as far as a step reads it."""
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
    )


def random_batch(manifest: Manifest, size: int, pinned: bool) -> CachedBatch:
    """Numbers, moments and labels as the loader hands them to a step."""
    torch.manual_seed(0)
    channels, height, width = manifest.latent_shape
    moments = torch.randn(size, 2 * channels, height, width)
    moments[:, channels:] = 0.05
    labels = torch.randint(manifest.num_classes, (size,))
    batch = CachedBatch(torch.arange(size), moments.half(), labels)
    return batch.pin_memory() if pinned else batch


def random_images(data: Data, size: int, pinned: bool) -> tuple[torch.Tensor]:
    """What the loader hands over beside those where a target asks for images: (B, 3, S, S) uint8."""
    images = torch.randint(256, (size, 3, data.resolution, data.resolution), dtype=torch.uint8)
    return (images.pin_memory() if pinned else images,)


def plain_step(
    flags, accelerator: Accelerator, manifest: Manifest, model: AlignedSiT, batch
) -> Callable[[], None]:
    """What `plain` is."""
    device, shape = accelerator.device, tuple(manifest.latent_shape)
    number, moments, labels = (tensor.to(device) for tensor in batch)
    latent, t = (
        moments.float().chunk(2, 1)[0] * manifest.scale,
        uniform(0, Purpose.TIMESTEP, number).float(),
    )
    x_t, v = interpolate(
        INTERPOLANTS["linear"], latent, normal(0, Purpose.NOISE, number, shape).float(), t
    )
    target = latent_tokens(latent, PRESETS[flags.model]["patch"])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0, fused=True
    )
    scaler, parts = accelerator.scaler, flags.gradient_accumulation_steps
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)

    def step() -> None:
        for x, s, y, u, z in zip(*(tensor.chunk(parts) for tensor in (x_t, t, labels, v, target))):
            with torch.autocast(device.type, dtype) if dtype else nullcontext():
                velocity, kept = model.backbone(x, s, y, return_blocks=(model.blocks["sra2"],))
                projected = model.heads["sra2"](kept[model.blocks["sra2"]])
            loss = (
                F.mse_loss(velocity.float(), u)
                + 1
                - F.cosine_similarity(projected.float(), z, dim=-1).mean()
            )
            (scaler.scale(loss) if scaler else loss).div(parts).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def build_steps(
    args: argparse.Namespace, accelerator: Accelerator, names: list[str]
) -> dict[str, Callable[[], object]]:
    """Of each way one update of train.py's on a batch of its own kind. Raises UserError."""
    flags, manifest, data, config, _ = make_plan(args, names)
    device, actions = accelerator.device, {}
    state, pinned = build(flags, config, device), device.type == "cuda"
    with patch.object(models.targets, "Encoder", partial(models.targets.Encoder, pretrained=False)):
        targets = alignment.load(flags, config, data, state.emas[0], device, accelerator.autocast)
    guard = NonFiniteGuard(state.optimizer, accelerator.mixed_precision == "fp16")
    whole, network = Step(flags, accelerator, manifest, state, targets, guard), state.model
    latents = random_batch(manifest, args.batch_size, pinned)
    images = random_images(data, args.batch_size, pinned) if alignment.extra(targets) else ()
    for name in names:
        if name == "plain":
            actions[name] = plain_step(flags, accelerator, manifest, network, latents)
            continue
        step = copy.copy(whole)
        heads, blocks, step.targets, step.stop = (
            {method: each[method] for method in alignment_methods(name)}
            for each in (network.heads, network.blocks, targets, whole.stop)
        )
        step.model = accelerator.prepare(AlignedSiT(network.backbone, heads, blocks))
        actions[name] = partial(
            step, (*latents, *images) if alignment.extra(step.targets) else latents
        )
    return actions


def measure_peak_memory(args: argparse.Namespace, accelerator: Accelerator, name: str) -> float:
    """GiB on the GPU of this way's update, where no other's heads, moments and encoder are held beside it."""
    accelerator.free_memory()
    gc.collect()
    held = torch.cuda.memory_allocated(accelerator.device) / 2**30
    _, peak = time_in_turn(
        build_steps(args, accelerator, [name]), accelerator.device, rounds=1, calls=1, warm_up=2
    )
    return peak[name] - held


def measure(args: argparse.Namespace, names: list[str]) -> dict:
    """Seconds, memory and rates of each way, and how they compare. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "this benchmark runs on one process; train.py's own gauges tell the speed of several"
        )
    planned = make_plan(args, names)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=precision(args.precision)
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    device, network = accelerator.device, planned.network
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        accelerator.mixed_precision, torch.float32
    )
    rate = matmul_rate(
        device, dtype, seconds=1.0
    )  # before and after, as machines heat up and neighbours come and go

    actions = build_steps(args, accelerator, names)
    calls = args.steps or (10 if device.type == "cuda" else 1)
    first = {name: time_first_call(action, device) for name, action in actions.items()}
    seconds, peak = time_in_turn(actions, device, args.rounds, calls, args.warm_up)
    rate = max(rate, matmul_rate(device, dtype, seconds=1.0))
    actions.clear()
    if device.type == "cuda":
        peak = {name: measure_peak_memory(args, accelerator, name) for name in names}

    results = {}
    for name, values in seconds.items():
        images_per_s = args.batch_size / median_and_quartiles(values)["median"]
        flops = training_flops(network, planned.align(name), planned.data)
        results[name] = {
            "step_s": median_and_quartiles(values),
            "images_per_s": images_per_s,
            "mfu": flops * images_per_s / rate,
            "peak_memory_gib": peak[name],
            "first_step_s": first[name],
        }
    aligned = [name for name in seconds if name not in ("none", "plain")]
    pairs = [
        (a, b)
        for a in aligned
        for b in ("none", "plain")
        if b in seconds and (b == "none" or a == "sra2")
    ]
    return {
        "benchmark": "train_step",
        "machine": describe_machine(device),
        "model": args.model,
        "batch_size": args.batch_size,
        "latent_size": args.latent_size,
        "precision": accelerator.mixed_precision,
        "compile": args.compile,
        "activation_checkpointing": args.activation_checkpointing,
        "allow_tf32": args.allow_tf32,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "rounds": args.rounds,
        "steps": calls,
        "encoder_weights": "random" if "repa" in planned.flags.align else None,
        "matmul_flops_per_s": rate,
        "forward_flops_per_image": backbone_flops(network),
        "results": results,
        "ratios": {f"{a}/{b}": ratio_per_round(seconds[a], seconds[b]) for a, b in pairs},
    }


def main() -> None:
    parser = cli.Parser(__doc__, "python -m benchmarks.train_step", "[--model NAME]")
    add_flags(parser)
    plain = "time forward, backward and AdamW alone as well; its AdamW has moments of its own"
    parser.add_argument("--plain", action="store_true", help=plain)
    args = parser.parse_args()
    names = [*["plain"] * args.plain, *dict.fromkeys(args.align)]
    planned, result = make_plan(args, names), measure(args, names)
    heads = sum(head_flops(planned.network, entry["head"]) for entry in planned.config["align"])
    report(result | {"head_flops_share": heads / backbone_flops(planned.network)}, args.json)


if __name__ == "__main__":
    cli.run(main)
