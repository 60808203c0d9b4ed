"""Times train.py's own step without and with alignment, in turn, in one run.

    python -m benchmarks.train_step --model SiT-XL/2 --batch-size 256 --precision bf16 --compile --json xl2.json

Random latents of ImageNet's shape start in host memory, as a loader leaves them. `none` and `sra2` share backbone, averages
and optimizer. `plain` is the least that trains the aligned network: forward, both losses, backward, AdamW, on a batch
interpolated beforehand; without clipping, EMA, random numbers, gauges and guard. What is compiled is compiled in the
first step of the first of them."""

import argparse
import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import alignment
import cli
from benchmarks.measure import first_call, in_turn, machine, ratio, report, spread
from cli import UserError
from flags import check_args, make_config, parse_args, precision
from flops import matmul_rate, training_flops
from guard import Guard
from interpolant import PATHS, interpolate
from keyed_random import Purpose, normal, uniform
from latent_cache import Manifest
from models.flops import backbone_flops, head_flops
from models.projector import AlignedSiT
from models.sit import PRESETS, SiTConfig
from models.targets import latent_tokens
from train import Step, build


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.train_step", "[--model NAME]")
    # fmt: off
    add = parser.add_argument
    add("--model", choices=PRESETS, default="SiT-XL/2", metavar="NAME", help="a preset of models/sit.py")
    add("--batch-size", type=cli.positive, default=256, help="images of one update")
    add("--align", choices=("none", "sra2"), nargs="+", default=["none", "sra2"], help="what to time, in turn")
    add("--plain", action="store_true", help="time forward, backward and AdamW alone as well; its AdamW has moments of its own")
    add("--precision", choices=("auto", "no", "fp16", "bf16"), default="auto", help="as train.py's --mixed-precision")
    add("--compile", action="store_true", help="as train.py's")
    add("--activation-checkpointing", action="store_true", help="as train.py's")
    add("--allow-tf32", action="store_true", help="as train.py's")
    add("--gradient-accumulation-steps", type=cli.positive, default=1, help="as train.py's")
    add("--latent-size", type=cli.positive, default=32, help="side of the latents: 32 for 256 pixels, 64 for 512")
    add("--rounds", type=cli.positive, default=20, help="timings of each, of which the median counts")
    add("--steps", type=cli.positive, help="steps of one timing (default: 10 on a GPU, 1 on CPUs)")
    add("--warm-up", type=cli.count, default=2, help="rounds before those")
    add("--json", type=Path, help="file for the result")
    # fmt: on
    return parser.parse_args()


def flags_of_training(given: list) -> argparse.Namespace:
    """train.py's flags, at their defaults but for those given here."""
    flags = parse_args("", ["--exp-name", "benchmark", "--data-dir", ".", *map(str, given)])
    check_args(flags, processes=1)
    return flags


def synthetic_manifest(latent_size: int = 32) -> Manifest:
    """Of a cache of ImageNet's latents, as far as a step reads it."""
    return Manifest(
        source="synthetic", count=1_281_167, num_classes=1000, class_names=[], resolution=8 * latent_size, crop="", vae="",
        vae_fingerprint="", scale=0.18215, shift=0.0, latent_shape=[4, latent_size, latent_size], dtype="float16",
        mean=[], std=[],
    )  # fmt: skip


def random_batch(manifest: Manifest, size: int, pinned: bool) -> tuple[torch.Tensor, ...]:
    """Numbers, moments and labels as the loader hands them to a step."""
    torch.manual_seed(0)
    channels, height, width = manifest.latent_shape
    moments = torch.randn(size, 2 * channels, height, width)
    moments[:, channels:] = 0.05
    batch = torch.arange(size), moments.half(), torch.randint(manifest.num_classes, (size,))
    return tuple(tensor.pin_memory() for tensor in batch) if pinned else batch


def plain_step(flags, accelerator: Accelerator, manifest: Manifest, model: AlignedSiT, batch) -> Callable[[], None]:
    """What `plain` is."""
    device, shape = accelerator.device, tuple(manifest.latent_shape)
    number, moments, labels = (tensor.to(device) for tensor in batch)
    latent, t = moments.float().chunk(2, 1)[0] * manifest.scale, uniform(0, Purpose.TIME, number).float()
    x_t, v = interpolate(PATHS["linear"], latent, normal(0, Purpose.NOISE, number, shape).float(), t)
    target = latent_tokens(latent, PRESETS[flags.model]["patch"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0, fused=True)
    scaler, parts = accelerator.scaler, flags.gradient_accumulation_steps
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)

    def step() -> None:
        for x, s, y, u, z in zip(*(tensor.chunk(parts) for tensor in (x_t, t, labels, v, target))):
            with torch.autocast(device.type, dtype) if dtype else nullcontext():
                velocity, kept = model.backbone(x, s, y, return_blocks=(model.blocks["sra2"],))
                projected = model.heads["sra2"](kept[model.blocks["sra2"]])
            loss = F.mse_loss(velocity.float(), u) + 1 - F.cosine_similarity(projected.float(), z, dim=-1).mean()
            (scaler.scale(loss) if scaler else loss).div(parts).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    args = parse()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("benchmarks.train_step runs on one process; train.py's own gauges tell the speed of several")
    given = ["--model", args.model, "--batch-size", args.batch_size, "--mixed-precision", args.precision]
    given += ["--gradient-accumulation-steps", args.gradient_accumulation_steps]
    given += [
        flag
        for flag in ("--compile", "--activation-checkpointing", "--allow-tf32")
        if getattr(args, flag[2:].replace("-", "_"))
    ]
    flags, manifest = flags_of_training(given), synthetic_manifest(args.latent_size)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision(args.precision))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    device, config = accelerator.device, make_config(flags, manifest)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    rate = matmul_rate(device, dtype, seconds=1.0)  # before and after, as machines heat up and neighbours come and go

    state = build(flags, config, device)
    batch = random_batch(manifest, args.batch_size, pinned=device.type == "cuda")
    guard, autocast = Guard(state.optimizer, accelerator.mixed_precision == "fp16"), accelerator.autocast
    targets = alignment.load(flags, config, alignment.data_of(manifest), state.emas[0], device, autocast)
    aligned = Step(flags, accelerator, manifest, state, targets, guard)
    actions: dict[str, Callable[[], object]] = {}
    if args.plain:
        actions["plain"] = plain_step(flags, accelerator, manifest, state.model, batch)
    if "none" in args.align:
        vanilla = copy.copy(aligned)
        vanilla.model, vanilla.targets, vanilla.stop = accelerator.prepare(AlignedSiT(state.model.backbone)), {}, {}
        actions["none"] = lambda: vanilla(batch)
    if "sra2" in args.align:
        actions["sra2"] = lambda: aligned(batch)
    steps = args.steps or (10 if device.type == "cuda" else 1)
    first = {name: first_call(action, device) for name, action in actions.items()}
    seconds, peak = in_turn(actions, device, args.rounds, steps, args.warm_up)
    rate = max(rate, matmul_rate(device, dtype, seconds=1.0))

    network = SiTConfig(**config["model"])
    results = {}
    for name, values in seconds.items():
        images_per_s = args.batch_size / spread(values)["median"]
        flops = training_flops(network, [] if name == "none" else config["align"])
        results[name] = {
            "step_s": spread(values), "images_per_s": images_per_s, "mfu": flops * images_per_s / rate,
            "peak_memory_gib": peak[name], "first_step_s": first[name],
        }  # fmt: skip
    ratios = {
        f"{a}/{b}": ratio(seconds[a], seconds[b]) for a, b in (("sra2", "none"), ("sra2", "plain")) if {a, b} <= {*seconds}
    }
    report(
        {
            "benchmark": "train_step", "machine": machine(device), "model": args.model, "batch_size": args.batch_size,
            "latent_size": args.latent_size, "precision": accelerator.mixed_precision, "compile": args.compile,
            "activation_checkpointing": args.activation_checkpointing, "allow_tf32": args.allow_tf32,
            "gradient_accumulation_steps": args.gradient_accumulation_steps, "rounds": args.rounds, "steps": steps,
            "matmul_flops_per_s": rate, "forward_flops_per_image": backbone_flops(network),
            "head_flops_share": head_flops(network, config["align"][0]["head"]) / backbone_flops(network),
            "results": results, "ratios": ratios,
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
