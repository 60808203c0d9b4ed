"""Time sample_ddp.py, from noise to the .npz, and a plain loop like REPA's generate.py.

    python -m benchmarks.sampling --model SiT-XL/2 --dest /tmp --json sampling.json

The network has random nonzero weights. Unless --vae is passed, the VAE has the architecture of
sd-vae-ft-mse and random weights. `sample_ddp` is the code of the command, from a network in memory
to NAME.npz and NAME.png; on GPUs it is timed in several precisions. `plain` samples one batch after
another, with the state in float64 and the uncompiled network in float32 (TF32 on GPUs); it writes
each image to a PNG file, and finally reads all files for np.savez. Both use the solvers of
samplers.py. `network alone` only evaluates the network and `VAE alone` only decodes, as often and
on as many threads as sample_ddp; the sum of the two times is a lower bound. The time of the fastest
round is also reported, because other programs affect it least.
"""

import argparse
import itertools
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.encode import make_random_vae
from benchmarks.measure import (
    Action,
    compute_per_image_results,
    count_flops,
    make_parser,
    median_and_quartiles,
    report,
    scratch_folder,
    time_interleaved,
)
from benchmarks.sampler import Sampler, make_config, make_random_source
from checkpointing.pretrained import PretrainedModel
from common import cli
from common.cli import UserError
from common.processes import World
from common.tf32 import set_tf32
from interpolant import INTERPOLANTS
from models.autoencoder import Autoencoder
from models.flops import backbone_flops
from models.sit import PRESETS, SiT
from sample_ddp import CheckpointConfig, PrecisionConfig, SamplingConfig, convert_field_errors
from samplers import GuidedVelocity, euler, euler_maruyama, ode_times, sde_times
from sampling.recipe import SamplerConfig
from training.throughput import measure_matmul_rate

PRECISIONS = {  # CPUs use only the first precision
    "fp32": PrecisionConfig(allow_tf32=False),
    "tf32": PrecisionConfig(),
    "bf16": PrecisionConfig("bf16"),
    "bf16, compiled": PrecisionConfig("bf16", compile=True),
}


def parse_args() -> argparse.Namespace:
    """Parse the flags of the benchmark."""
    has_gpu = torch.cuda.is_available()
    parser = make_parser(
        __doc__,
        "sampling",
        "dest",
        model="SiT-XL/2",
        vae=None,
        images=128 if has_gpu else 8,
        resolution=256,
        batch_size=64 if has_gpu else 4,
        num_steps=10,
        rounds=2 if has_gpu else 5,
        warm_up=1,
    )
    parser.add_argument(
        "--mode", choices=("sde", "ode"), default="sde", help="same as --mode of sample_ddp.py"
    )
    parser.add_argument(
        "--cfg-scale",
        type=cli.non_negative_float,
        default=1.5,
        help="classifier-free guidance scale; 1 disables guidance",
    )
    return parser.parse_args()


@torch.no_grad()
def sample_plain(model: SiT, vae: Autoencoder, config: SamplingConfig, folder: Path) -> Path:
    """Sample as REPA's generate.py does: write folder/INDEX.png and then folder.npz.

    Args:
        model: The network, on the device of the VAE.
        vae: The VAE.
        config: Solver, guidance scale, number of images and batch size.
        folder: The folder to create.

    Returns:
        The path of the .npz.
    """
    sampler = config.sampler
    num_images = config.output.num_fid_samples
    batch_size = config.output.per_proc_batch_size
    num_classes = model.config.num_classes
    size = model.config.latent_size
    shape = (batch_size, model.config.channels, size, size)
    device = vae.vae.device
    folder.mkdir(parents=True)

    def draw_brownian_noise(step: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64)

    for start in range(0, num_images, batch_size):
        noise = torch.randn(shape, device=device).double()
        labels = torch.randint(num_classes, (batch_size,), device=device)
        velocity = GuidedVelocity(model, labels, num_classes, sampler.cfg_scale)
        if sampler.mode == "ode":
            latents = euler(velocity, noise, ode_times(sampler.num_steps))
        else:
            times = sde_times(sampler.num_steps)
            latents = euler_maruyama(
                velocity, INTERPOLANTS["linear"], noise, times, draw_brownian_noise
            )
        decoded = vae.vae.decode(vae.scale.denormalize(latents.float())).sample
        pixels = ((decoded + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
        for index, image in enumerate(pixels.to("cpu", torch.uint8).numpy(), start):
            Image.fromarray(image).save(folder / f"{index:06d}.png")
    paths = sorted(folder.iterdir())[:num_images]  # the last batch may exceed num_images
    np.savez(
        folder.with_suffix(".npz"), arr_0=np.stack([np.asarray(Image.open(path)) for path in paths])
    )
    return folder.with_suffix(".npz")


class Method(NamedTuple):
    """A method to time, which is one row of the result.

    Attributes:
        run: Function that processes all images.
        precision: A key of PRECISIONS.
        flops: FLOPs per image.
    """

    run: Action
    precision: str
    flops: int


def make_methods(
    samplers: dict[str, Sampler], source: PretrainedModel, flops: dict[str, int], root: Path
) -> dict[str, Method]:
    """Return all methods to time, by name.

    Args:
        samplers: Samplers by the name of the precision. The plain loop uses the settings and the
            VAE of "fp32".
        source: The network of the plain loop.
        flops: FLOPs per image of the network and of the VAE.
        root: Folder for temporary files.
    """
    fp32_sampler = samplers["fp32"]
    network = source.model.to(fp32_sampler.device)
    num_threads = torch.get_num_threads()
    folders = (root / f"samples{k}" for k in itertools.count())

    def run_plain() -> None:
        set_tf32(True)
        torch.set_num_threads(num_threads)
        sample_plain(network, fp32_sampler.vae, fp32_sampler.config, next(folders))

    def run_sampler(sampler: Sampler) -> None:
        sampler(next(folders))

    total = sum(flops.values())
    precision = "tf32" if fp32_sampler.device.type == "cuda" else "fp32"
    methods = {"plain": Method(run_plain, precision, total)}
    for name, sampler in samplers.items():
        methods[f"sample_ddp, {name}"] = Method(partial(run_sampler, sampler), name, total)
        for part, run in (("network", sampler.evaluate_network), ("VAE", sampler.decode)):
            run_alone = partial(sampler.run_alone, run)
            methods[f"{part} alone, {name}"] = Method(run_alone, name, flops[part])
    return methods


def measure_rates(samplers: dict[str, Sampler], num_threads: int) -> dict[str, float]:
    """Measure the rate of large matrix products in each precision, in FLOP/s."""
    rates = {}
    for name, sampler in samplers.items():
        precision = sampler.config.precision
        set_tf32(precision.allow_tf32)
        torch.set_num_threads(num_threads)
        rates[name] = measure_matmul_rate(sampler.device, precision.dtype, seconds=0.5)
    return rates


def count_flops_per_image(sampler: Sampler) -> dict[str, int]:
    """Count the FLOPs per image of the network and of the VAE."""
    evaluations = sampler.recipe.num_steps * (2 if sampler.recipe.cfg_scale > 1 else 1)
    return {
        "network": evaluations * backbone_flops(sampler.model.config),
        "VAE": count_flops(partial(sampler.vae.decode, sampler.draw_latents()[:1])),
    }


def compare_methods(
    seconds: dict[str, list[float]], samplers: dict[str, Sampler]
) -> dict[str, dict]:
    """Return the times of `plain` and of both parts together, relative to that of sample_ddp."""
    ratios = {}
    for precision in samplers:
        name = f"sample_ddp, {precision}"
        alone = np.add(seconds[f"network alone, {precision}"], seconds[f"VAE alone, {precision}"])
        for other, values in (("plain", seconds["plain"]), ("alone", alone)):
            ratios[f"{other}/{name}"] = median_and_quartiles(np.divide(values, seconds[name]))
    return ratios


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    device = World().select_device()
    num_threads = torch.get_num_threads()
    with scratch_folder(args.dest / "benchmark-sampling") as root:
        # Load the VAE and create the network.
        with convert_field_errors(CheckpointConfig):
            vae = Autoencoder(args.vae or str(make_random_vae(root / "vae")), device)
        multiple = vae.downsampling_factor * PRESETS[args.model]["patch"]
        if args.resolution % multiple:
            raise UserError(
                f"--resolution {args.resolution} is not a multiple of {multiple}, the token size "
                f"of {args.model} in pixels; pass a multiple"
            )
        source = make_random_source(args.model, vae, args.resolution)

        # Build the samplers and the methods to time.
        sampler_config = SamplerConfig(
            mode=args.mode, num_steps=args.num_steps, cfg_scale=args.cfg_scale
        )
        precisions = PRECISIONS if device.type == "cuda" else {"fp32": PRECISIONS["fp32"]}
        samplers = {}
        for name, precision in precisions.items():
            config = make_config(sampler_config, args.images, args.batch_size, precision)
            samplers[name] = Sampler(config, source, vae)
        flops = count_flops_per_image(samplers["fp32"])
        methods = make_methods(samplers, source, flops, root)

        # Time the methods. Measure the rates before and after, because machine speed drifts.
        load_before = os.getloadavg()[0]
        rates_before = measure_rates(samplers, num_threads)
        actions = {name: method.run for name, method in methods.items()}
        timings = time_interleaved(actions, device, args.rounds, warm_up=args.warm_up)
        rates_after = measure_rates(samplers, num_threads)
        rates = {name: max(rates_before[name], rates_after[name]) for name in samplers}

    results = {}
    for name, method in methods.items():
        rate = rates[method.precision]
        results[name] = compute_per_image_results(timings, name, args.images, method.flops, rate)
        results[name]["fastest_image_s"] = min(timings.seconds[name]) / args.images
    report(
        args,
        device,
        ("model", "resolution", "mode", "num_steps", "cfg_scale", "images", "batch_size", "rounds"),
        load_average=[load_before, os.getloadavg()[0]],
        latent_size=source.model.config.latent_size,
        vae=args.vae or "random weights of sd-vae-ft-mse's shape",
        flops_per_image=flops,
        matmul_flops_per_s=rates,
        results=results,
        ratios=compare_methods(timings.seconds, samplers),
    )


if __name__ == "__main__":
    cli.run(main)
