"""Time sample_ddp.py, from noise to the .npz, and a plain loop like generate.py of REPA.

    python -m benchmarks.sampling --model SiT-XL/2 --dest /tmp --json sampling.json

The network has random nonzero weights. Unless --vae is passed, the VAE has the architecture of
sd-vae-ft-mse and random weights. `sample_ddp` is the code of the command, from a network in memory
to NAME.npz and NAME.png; on GPUs it is timed in several precisions. `plain` samples one batch after
another, with the state in float64 and the uncompiled network in float32 (TF32 on GPUs); it writes
each image to a PNG file, and finally reads all files for np.savez. Both use the solvers of
samplers.py. `network alone` and `VAE alone` only evaluate the network or only decode, as often and
on as many threads as sample_ddp; the sum of their times is a lower bound. The fastest round is also
reported, because it is least affected by other programs.
"""

import argparse
import copy
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

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
from benchmarks.run_steps import allow_tf32
from checkpointing.pretrained import PretrainedModel
from common import cli
from common.cli import UserError
from common.machine import count_available_cores
from common.processes import World
from evaluations.suite import EvaluationConfig
from interpolant import INTERPOLANTS
from models.autoencoder import Autoencoder
from models.flops import backbone_flops
from models.sit import PRESETS, SiT, SiTConfig
from sample_ddp import (
    CheckpointConfig,
    OutputConfig,
    PrecisionConfig,
    SamplingConfig,
    build_record,
    convert_field_errors,
    make_recipe,
    prepare_model,
    set_up_arithmetic,
)
from samplers import GuidedVelocity, euler, euler_maruyama, ode_times, sde_times
from sampling.recipe import SamplerConfig
from sampling.store import SampleStore
from sampling.worker import Worker, run_batches
from training.throughput import measure_matmul_rate

PRECISIONS = {  # CPUs use only the first precision
    "fp32": PrecisionConfig(),
    "tf32": PrecisionConfig(allow_tf32=True),
    "bf16": PrecisionConfig("bf16", allow_tf32=True),
    "bf16, compiled": PrecisionConfig("bf16", allow_tf32=True, compile=True),
}


def parse_args() -> argparse.Namespace:
    """Parse the flags."""
    has_gpu = torch.cuda.is_available()
    parser = make_parser(
        __doc__,
        "sampling",
        "dest",
        model="SiT-XL/2",
        vae=None,
        images=512 if has_gpu else 8,
        resolution=256,
        batch_size=128 if has_gpu else 4,
        num_steps=250 if has_gpu else 10,
        rounds=5,
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


def make_config(
    sampler: SamplerConfig, num_images: int, batch_size: int, precision: PrecisionConfig
) -> SamplingConfig:
    """Return settings of sample_ddp.py.

    Raises:
        UserError: If the settings of the sampler contradict each other.
    """
    with convert_field_errors(SamplerConfig):
        sampler.validate()
    output = OutputConfig(num_fid_samples=num_images, per_proc_batch_size=batch_size)
    return SamplingConfig(CheckpointConfig(Path()), sampler, precision, output, EvaluationConfig())


def make_random_source(model_name: str, vae: Autoencoder, resolution: int) -> PretrainedModel:
    """Return a network with random weights for the classes of ImageNet.

    Parameters that are initialised to zero are also set to random values, because zeros may affect
    the speed.
    """
    torch.manual_seed(0)
    config = SiTConfig(
        **PRESETS[model_name],
        latent_size=resolution // vae.downsampling_factor,
        channels=vae.channels,
    )
    model = SiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return PretrainedModel(
        model=model,
        path_type="linear",
        prediction="v",
        vae=vae.name,
        vae_fingerprint=None,
        class_names=[str(k) for k in range(config.num_classes)],
        name="random",
        identity={
            "checkpoint": "random weights",
            "ema_sha256": "",
            "model": model_name,
            "step": None,
        },
    )


class Sampler:
    """Runs the sampling of sample_ddp.py, from a network in memory to an .npz, or parts of it.

    Args:
        config: Settings of sample_ddp.py.
        source: The network.
        vae: The decoder, on the device of the sampler.
    """

    def __init__(self, config: SamplingConfig, source: PretrainedModel, vae: Autoencoder):
        self.config = config
        self.vae = vae
        self.device = vae.vae.device
        self.model = prepare_model(copy.deepcopy(source.model), config.precision, self.device)
        self.settings = make_recipe(config, source)
        self.record = build_record(config, source, vae, self.settings, self.device)
        self.num_threads = 2 if self.device.type == "cuda" else count_available_cores()

    def __call__(self, folder: Path) -> Path:
        """Write samples.npz with its record and image grid to a folder, and return the path."""
        precision = self.config.precision
        set_up_arithmetic(precision, self.device)
        store = SampleStore(folder, "samples", self.record, {})
        num_classes = self.model.config.num_classes
        labels = self.settings.compute_labels(torch.arange(store.count), num_classes).numpy()
        store.choose_grid_images(labels)
        with ExitStack() as resources, tqdm(total=store.count, disable=True) as bar:
            stored = store.claim(resources)
            worker = Worker(
                self.model, self.vae, self.settings, precision.dtype, store, stored, networks={}
            )
            pending = store.pending_batches(stored)
            run_batches(worker, pending, self.num_threads, precision.compile, bar, store.batch_size)
            store.finalize(labels)
            store.remove_parts()
        return store.npz_path

    @torch.no_grad()
    def evaluate_network(self) -> None:
        """Evaluate the network as often as in sampling one batch."""
        dtype = self.config.precision.dtype
        x = self.random_latents()
        if self.settings.cfg_scale > 1:  # guidance doubles the batch
            x = torch.cat((x, x))
        t = torch.full((len(x),), 0.5, device=self.device)
        labels = torch.arange(len(x), device=self.device) % self.model.config.num_classes
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            for _ in range(self.settings.num_steps):
                self.model(x, t, labels)

    def decode(self) -> None:
        """Decode one batch."""
        self.vae.decode(self.random_latents())

    def run_alone(self, part: Action) -> None:
        """Run a part of the sampling for all batches, on as many threads as sampling uses."""
        set_up_arithmetic(self.config.precision, self.device)
        output = self.config.output
        num_batches = -(-output.num_fid_samples // output.per_proc_batch_size)
        with ThreadPoolExecutor(self.num_threads) as pool:
            for future in [pool.submit(part) for _ in range(num_batches)]:
                future.result()

    def random_latents(self) -> Tensor:
        """Return random latents for one batch."""
        network = self.model.config
        size = (network.channels, network.latent_size, network.latent_size)
        return torch.randn(self.config.output.per_proc_batch_size, *size, device=self.device)


@torch.no_grad()
def sample_plain(model: SiT, vae: Autoencoder, config: SamplingConfig, folder: Path) -> Path:
    """Sample as generate.py of REPA does: write folder/INDEX.png and then folder.npz.

    Args:
        model: The network, on the device of the VAE.
        vae: The decoder.
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

    def brownian_noise(step: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64)

    for start in range(0, num_images, batch_size):
        noise = torch.randn(shape, device=device).double()
        labels = torch.randint(num_classes, (batch_size,), device=device)
        velocity = GuidedVelocity(model, labels, num_classes, sampler.cfg_scale)
        if sampler.mode == "ode":
            latents = euler(velocity, noise, ode_times(sampler.num_steps))
        else:
            times = sde_times(sampler.num_steps)
            latents = euler_maruyama(velocity, INTERPOLANTS["linear"], noise, times, brownian_noise)
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
    """One row of the result."""

    run: Action  # processes all images
    precision: str  # a key of PRECISIONS
    flops: int  # FLOPs per image


def make_methods(
    samplers: dict[str, Sampler], source: PretrainedModel, flops: dict[str, int], root: Path
) -> dict[str, Method]:
    """Return the methods to time, by name.

    Args:
        samplers: Samplers by the name of the precision. The plain loop uses the settings and the
            VAE of "fp32".
        source: The network of the plain loop.
        flops: FLOPs per image of the network and of the VAE.
        root: Folder for temporary files.
    """
    first = samplers["fp32"]
    network = source.model.to(first.device)
    num_threads = torch.get_num_threads()
    folders = (root / f"samples{k}" for k in itertools.count())

    def run_plain() -> None:
        allow_tf32(True)
        torch.set_num_threads(num_threads)
        sample_plain(network, first.vae, first.config, next(folders))

    def run_sampler(sampler: Sampler) -> None:
        sampler(next(folders))

    total = sum(flops.values())
    precision = "tf32" if first.device.type == "cuda" else "fp32"
    methods = {"plain": Method(run_plain, precision, total)}
    for name, sampler in samplers.items():
        methods[f"sample_ddp, {name}"] = Method(partial(run_sampler, sampler), name, total)
        for part, run in (("network", sampler.evaluate_network), ("VAE", sampler.decode)):
            run_alone = partial(sampler.run_alone, run)
            methods[f"{part} alone, {name}"] = Method(run_alone, name, flops[part])
    return methods


def measure_rates(samplers: dict[str, Sampler], num_threads: int) -> dict[str, float]:
    """Return the rate of large matrix products in each precision, in FLOP/s."""
    rates = {}
    for name, sampler in samplers.items():
        precision = sampler.config.precision
        allow_tf32(precision.allow_tf32)
        torch.set_num_threads(num_threads)
        rates[name] = measure_matmul_rate(sampler.device, precision.dtype, seconds=0.5)
    return rates


def flops_per_image(sampler: Sampler) -> dict[str, int]:
    """Return the FLOPs per image of the network and of the VAE."""
    evaluations = sampler.settings.num_steps * (2 if sampler.settings.cfg_scale > 1 else 1)
    return {
        "network": evaluations * backbone_flops(sampler.model.config),
        "VAE": count_flops(partial(sampler.vae.decode, sampler.random_latents()[:1])),
    }


def compare_methods(
    seconds: dict[str, list[float]], samplers: dict[str, Sampler]
) -> dict[str, dict]:
    """Return the times of `plain` and of the two parts relative to the time of sample_ddp."""
    ratios = {}
    for name in samplers:
        total = seconds[f"sample_ddp, {name}"]
        alone = np.add(seconds[f"network alone, {name}"], seconds[f"VAE alone, {name}"])
        for other, values in (("plain", seconds["plain"]), ("alone", alone)):
            ratio = median_and_quartiles(np.divide(values, total))
            ratios[f"{other}/sample_ddp, {name}"] = ratio
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

        # Create the methods.
        sampler_config = SamplerConfig(
            mode=args.mode, num_steps=args.num_steps, cfg_scale=args.cfg_scale
        )
        precisions = PRECISIONS if device.type == "cuda" else {"fp32": PRECISIONS["fp32"]}
        samplers = {}
        for name, precision in precisions.items():
            config = make_config(sampler_config, args.images, args.batch_size, precision)
            samplers[name] = Sampler(config, source, vae)
        flops = flops_per_image(samplers["fp32"])
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
