"""Images a second of sample_ddp.py, from noise to a finished .npz, against a plain loop in the shape of REPA's generate.py.

    python -m benchmarks.sampling --model SiT-XL/2 --dest /tmp --json sampling.json

The network has random weights, none of them zero; so has the VAE, of sd-vae-ft-mse's architecture, unless --vae names another.
`sample_ddp`: its own Worker, make and SampleStore, from a network in memory to NAME.npz and NAME.png; on GPUs in several
precisions. `plain`: one batch after the other, the state in float64, the network in float32 (on GPUs TF32), not compiled; each
image a PNG as soon as it is there, and at the end all of them read back for np.savez. The steps themselves are samplers.py's in
both. `network alone` and `VAE alone`: the same evaluations and decodings, on as many threads as sample_ddp has, and nothing
else: what it cannot be faster than. The fastest round of each is given too: neighbours disturb it least.
"""

import argparse
import copy
import itertools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample_ddp
from benchmarks.encode import make_random_vae
from benchmarks.measure import (
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    time_in_turn,
)
from checkpointing.pretrained import PretrainedModel
from common import cli
from common.cli import UserError
from common.processes import World
from interpolant import INTERPOLANTS
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.sit import PRESETS, SiT, SiTBlock, SiTConfig
from samplers import GuidedVelocity, euler, euler_maruyama, ode_times, sde_times
from sampling.store import SampleStore
from sampling.worker import Worker, run_batches
from training.throughput import backbone_flops, matmul_rate

VARIANTS = {  # flags of sample_ddp.py; on CPUs only the first
    "fp32": [],
    "tf32": ["--allow-tf32"],
    "bf16": ["--allow-tf32", "--mixed-precision", "bf16"],
    "bf16, compiled": ["--allow-tf32", "--mixed-precision", "bf16", "--compile"],
}


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.sampling", "--dest PATH")
    cuda = torch.cuda.is_available()

    add = parser.add_argument
    add("--dest", type=Path, required=True, help="folder to write to, and to empty afterwards")
    add(
        "--model",
        choices=PRESETS,
        default="SiT-XL/2",
        metavar="NAME",
        help="a preset of models/sit.py",
    )
    add("--resolution", type=cli.positive_int, default=256, help="pixels a side")
    add("--vae", help="hub id or folder (default: random weights)")
    add("--mode", choices=("sde", "ode"), default="sde", help="as sample_ddp.py's")
    add(
        "--num-steps",
        type=cli.positive_int,
        default=250 if cuda else 10,
        help="steps from noise to data",
    )
    add(
        "--cfg-scale",
        type=cli.non_negative_float,
        default=1.5,
        help="classifier-free guidance; 1 is none",
    )
    add("--images", type=cli.positive_int, default=512 if cuda else 8, help="images of one timing")
    add(
        "--batch-size",
        type=cli.positive_int,
        default=128 if cuda else 4,
        help="images made at once",
    )
    add(
        "--rounds",
        type=cli.positive_int,
        default=5,
        help="timings of each, of which the median counts",
    )
    add("--warm-up", type=cli.non_negative_int, default=1, help="rounds before those")
    add("--json", type=Path, help="file for the result")

    return parser.parse_args()


def make_random_source(name: str, vae: Autoencoder, resolution: int) -> PretrainedModel:
    """Of ImageNet's classes. Zeros, of which a fresh network has many, are drawn as well: speed may depend on them."""
    torch.manual_seed(0)
    config = SiTConfig(
        **PRESETS[name], latent_size=resolution // vae.downsampling_factor, channels=vae.channels
    )
    model = SiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    who = {"checkpoint": "random weights", "ema_sha256": "", "model": name, "step": None}
    return PretrainedModel(
        model,
        "linear",
        "v",
        vae.name,
        None,
        [str(k) for k in range(config.num_classes)],
        "random",
        who,
    )


def sampling_flags(args: argparse.Namespace) -> list:
    """Those of sample_ddp.py."""
    flags = ["--mode", args.mode, "--num-steps", args.num_steps, "--cfg-scale", args.cfg_scale]
    return [*flags, "--num-fid-samples", args.images, "--per-proc-batch-size", args.batch_size]


class Sampler:
    """sample_ddp.py's own work with these flags, from a network in memory to an .npz."""

    def __init__(self, flags: list, source: PretrainedModel, vae: Autoencoder, world: World):
        config = sample_ddp.parse_args(["--ckpt", ".", *map(str, flags)])
        self.precision = config.precision
        self.device = world.select_device()
        self.vae = vae
        self.model = copy.deepcopy(source.model).to(self.device)
        if self.precision.compile:
            for module in self.model.modules():
                if isinstance(module, SiTBlock):
                    module.compile()
        self.count = config.output.num_fid_samples
        self.size = config.output.per_proc_batch_size
        self.recipe = sample_ddp.make_recipe(config, source)
        self.dtype = self.precision.dtype
        self.what = sample_ddp.build_record(config, source, vae, self.recipe, self.device)
        self.threads = 2 if self.device.type == "cuda" else world.cores

    def __call__(self, folder: Path) -> Path:
        """Writes samples.npz and its company into the folder; returns its path."""
        set_up(self.device, self.precision.allow_tf32, 1)
        labels = self.recipe.compute_labels(
            torch.arange(self.count), self.model.config.num_classes
        ).numpy()
        store = SampleStore(folder, "samples", self.what, {})
        store.choose_grid_images(labels)
        with ExitStack() as held, tqdm(total=self.count, disable=True) as bar:
            done = store.claim(held)
            worker = Worker(self.model, self.vae, self.recipe, self.dtype, store, done, {})
            pending = store.pending_batches(done)
            run_batches(worker, pending, self.threads, self.precision.compile, bar, self.size)
            store.finalize(labels)
            store.remove_parts()
        return store.npz_path

    @torch.no_grad()
    def evaluate(self, k: int) -> None:
        """The network's part of a batch."""
        t, y = (
            torch.full((self.size,), 0.5, device=self.device),
            torch.arange(self.size, device=self.device),
        )
        x, y = self._latents(), y % self.model.config.num_classes
        if self.recipe.cfg_scale > 1:
            x, t, y = (torch.cat((part, part)) for part in (x, t, y))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for _ in range(self.recipe.num_steps):
                self.model(x, t, y)

    def decode(self, k: int) -> None:
        """The VAE's."""
        self.vae.decode(self._latents())

    def alone(self, part: Callable[[int], None]) -> None:
        """One of the two for all batches, on as many threads as sampling has."""
        set_up(self.device, self.precision.allow_tf32, 1)
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(part, range(-(-self.count // self.size))))

    def _latents(self) -> Tensor:
        config = self.model.config
        return torch.randn(
            self.size, config.channels, config.latent_size, config.latent_size, device=self.device
        )


def set_up(device: torch.device, tf32: bool, threads: int) -> None:
    """For the whole process: TF32 on GPUs, threads inside one operation on CPUs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu":
        torch.set_num_threads(threads)


@torch.no_grad()
def sample_plain(
    model: SiT, vae: Autoencoder, args: argparse.Namespace, device: torch.device, folder: Path
) -> Path:
    """What `plain` is: writes folder/INDEX.png and then folder.npz."""
    config, size = model.config, args.batch_size
    shape = (size, config.channels, config.latent_size, config.latent_size)
    folder.mkdir(parents=True)

    def brownian(step: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64)

    for first in range(0, args.images, size):
        noise = torch.randn(shape, device=device).double()
        labels = torch.randint(config.num_classes, (size,), device=device)
        velocity = GuidedVelocity(model, labels, config.num_classes, args.cfg_scale)
        if args.mode == "ode":
            latents = euler(velocity, noise, ode_times(args.num_steps))
        else:
            latents = euler_maruyama(
                velocity, INTERPOLANTS["linear"], noise, sde_times(args.num_steps), brownian
            )
        decoded = vae.vae.decode(vae.scale.denormalize(latents.float())).sample
        pixels = (
            ((decoded + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        )
        for i, image in enumerate(pixels, first):
            Image.fromarray(image).save(folder / f"{i:06d}.png")
    whole = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(args.images)])
    np.savez(folder.with_suffix(".npz"), arr_0=whole)
    return folder.with_suffix(".npz")


def main() -> None:
    args = parse()
    root, world, threads = args.dest / "benchmark-sampling", World(), torch.get_num_threads()
    device = world.select_device()
    shutil.rmtree(root, ignore_errors=True)
    try:
        vae = Autoencoder(args.vae or str(make_random_vae(root / "vae")), device)
    except FieldError as error:
        raise UserError(f"--vae {error.reason}") from None
    step = vae.downsampling_factor * PRESETS[args.model]["patch"]
    if args.resolution % step:
        raise UserError(
            f"--resolution {args.resolution} is no multiple of {step}, the pixels of a token of {args.model}"
        )
    source = make_random_source(args.model, vae, args.resolution)
    config, flags = source.model.config, sampling_flags(args)
    cuda = device.type == "cuda"
    variants = VARIANTS if cuda else {"fp32": []}
    ours = {
        variant: Sampler([*flags, *more], source, vae, world) for variant, more in variants.items()
    }
    network = source.model.to(device)

    folders = (root / f"samples{k}" for k in itertools.count())

    def theirs() -> None:
        set_up(device, True, threads)
        sample_plain(network, vae, args, device, next(folders))

    actions: dict[str, Callable[[], object]] = {"plain": theirs}
    for variant, work in ours.items():
        actions[f"sample_ddp, {variant}"] = lambda work=work: work(next(folders))
        actions[f"network alone, {variant}"] = partial(work.alone, work.evaluate)
        actions[f"VAE alone, {variant}"] = partial(work.alone, work.decode)

    def rates() -> dict[str, float]:
        found = {}
        for variant, work in ours.items():
            set_up(device, work.precision.allow_tf32, threads)
            found[variant] = matmul_rate(device, work.dtype, seconds=0.5)
        return found

    before, load = rates(), os.getloadavg()[0]
    try:
        seconds, peak = time_in_turn(actions, device, args.rounds, 1, args.warm_up)
    finally:
        shutil.rmtree(root)
    rate = {variant: max(before[variant], after) for variant, after in rates().items()}
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(1, vae.channels, *2 * [config.latent_size], device=device))
    flops = {
        "network": args.num_steps * (2 if args.cfg_scale > 1 else 1) * backbone_flops(config),
        "VAE": counter.get_total_flops(),
    }
    results, ratios = {}, {}
    for name, values in seconds.items():
        way, _, variant = name.partition(", ")
        images_per_s = args.images / median_and_quartiles(values)["median"]
        needed = flops.get(way.removesuffix(" alone"), sum(flops.values()))
        results[name] = {
            "image_s": median_and_quartiles([value / args.images for value in values]),
            "fastest_image_s": min(values) / args.images,
            "images_per_s": images_per_s,
            "share_of_matmul_rate": needed
            * images_per_s
            / rate[variant or ("tf32" if cuda else "fp32")],
            "peak_memory_gib": peak[name],
        }
    for variant in ours:
        own, least = (
            seconds[f"sample_ddp, {variant}"],
            zip(*(seconds[f"{part} alone, {variant}"] for part in flops)),
        )
        ratios[f"plain/sample_ddp, {variant}"] = ratio_per_round(seconds["plain"], own)
        ratios[f"alone/sample_ddp, {variant}"] = ratio_per_round(
            [sum(parts) for parts in least], own
        )
    report(
        {
            "benchmark": "sampling",
            "machine": describe_machine(device),
            "load_average": [load, os.getloadavg()[0]],
            "model": args.model,
            "resolution": args.resolution,
            "latent_size": config.latent_size,
            "vae": args.vae or "random weights of sd-vae-ft-mse's shape",
            "mode": args.mode,
            "num_steps": args.num_steps,
            "cfg_scale": args.cfg_scale,
            "images": args.images,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "flops_per_image": flops,
            "matmul_flops_per_s": rate,
            "results": results,
            "ratios": ratios,
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
