"""Time preprocessing.encode_latents, and encoding of one image at a time as in REPA.

    python -m benchmarks.encode --dest /tmp --json encode.json

The images are synthetic JPEGs with the average size of ImageNet's images. Unless --vae is passed,
the VAE has the architecture of sd-vae-ft-mse and random weights, which do not affect the speed.
`encode_latents` is the code of the command, from the image files to a complete cache. `one at a
time` decodes, crops, encodes and saves (np.save) one image after the other. `VAE alone` encodes the
same batches from decoded images; its time relative to `encode_latents` is the utilization of the
VAE. `decoding alone` decodes and crops the images in one process, at the rate of one worker.
"""

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import (
    Action,
    compare_times,
    compute_per_image_results,
    count_flops,
    make_parser,
    report,
    scratch_folder,
    time_interleaved,
)
from common import cli
from common.ordered_map import map_in_order
from common.processes import World
from common.progress import ProgressBar
from models.autoencoder import Autoencoder
from preprocessing.build import build_cache
from preprocessing.cache_job import Batch
from preprocessing.encoding import PRECISIONS, EncodingJob, EncodingSettings, get_default_batch_size
from training.throughput import measure_matmul_rate


def parse_args() -> argparse.Namespace:
    """Parse the flags of the benchmark."""
    has_gpu = torch.cuda.is_available()
    parser = make_parser(
        __doc__,
        "encode",
        "dest",
        vae=None,
        images=512 if has_gpu else 16,
        resolution=256,
        device="cuda" if has_gpu else "cpu",
        rounds=5,
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="same as --precision of encode_latents",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.non_negative_int,
        default=0,
        help="same as --batch-size of encode_latents",
    )
    parser.add_argument(
        "--num-workers", type=int, default=-1, help="same as --num-workers of encode_latents"
    )
    return parser.parse_args()


def make_random_vae(folder: Path) -> Path:
    """Save an autoencoder with the architecture of sd-vae-ft-mse and random weights to a folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
    )
    vae.save_pretrained(folder)  # type: ignore[attr-defined]  # inherited from an untyped class
    return folder


def make_photographs(folder: Path, num_images: int) -> None:
    """Write JPEGs of 500x375 pixels and about 110 KB, which is the average size in ImageNet."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in ProgressBar(range(num_images), desc="images"):
        colours = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        smooth_image = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC))
        noise = rng.integers(-16, 17, (375, 500, 3))
        pixels = (smooth_image + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=90)


def decode_batches(job: EncodingJob) -> list[Batch]:
    """Read all images into memory, and split them into the batches of the job."""
    images = [job.reader.read(job.source, i).pixels for i in range(job.num_images)]
    batches = []
    for pixels in torch.from_numpy(np.stack(images)).split(job.batch_size):
        batch = Batch(range(len(pixels)), pixels)
        batches.append(batch.pin_memory() if job.device.type == "cuda" else batch)
    return batches


def make_actions(
    job: EncodingJob, world: World, folder: Path, num_threads: int
) -> dict[str, Action]:
    """Return the functions to time, by name. Each function processes all images.

    Args:
        job: The job of encode_latents.
        world: Processes that share the job.
        folder: Folder for temporary files.
        num_threads: Number of threads per operation in `one at a time`.
    """
    job_threads = torch.get_num_threads()
    batches = decode_batches(job)

    def encode_latents() -> None:
        torch.set_num_threads(job_threads)
        build_cache(folder / "cache", job, world)
        shutil.rmtree(folder / "cache")

    def encode_decoded_images() -> None:
        torch.set_num_threads(job_threads)
        with ThreadPoolExecutor(job.num_threads, initializer=job.init_thread) as pool:
            for batch in map_in_order(pool, job.encode_batch, batches, job.num_threads):
                if batch.copy_done:
                    batch.copy_done.synchronize()

    def encode_one_at_a_time() -> None:
        torch.set_num_threads(num_threads)
        (folder / "moments").mkdir(exist_ok=True)
        is_bf16 = job.settings.precision == "bf16"
        for i in range(job.num_images):
            image = torch.from_numpy(job.reader.read(job.source, i).pixels[None].copy())
            with torch.autocast(job.device.type, torch.bfloat16, enabled=is_bf16):
                moments = job.vae.encode(image.to(job.device))
            np.save(folder / "moments" / f"{i}.npy", moments[0].cpu().numpy())

    def decode_images() -> None:
        torch.set_num_threads(1)
        for i in range(job.num_images):
            job.reader.read(job.source, i)

    return {
        "encode_latents": encode_latents,
        "VAE alone": encode_decoded_images,
        "one at a time": encode_one_at_a_time,
        "decoding alone": decode_images,
    }


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    world = World()
    num_threads = torch.get_num_threads()
    batch_size = args.batch_size or get_default_batch_size(
        args.resolution, torch.device(args.device)
    )
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with scratch_folder(args.dest / "benchmark-encode") as root:
        make_photographs(root / "images/class", args.images)
        settings = EncodingSettings(
            root / "images",
            resolution=args.resolution,
            vae=args.vae or str(make_random_vae(root / "vae")),
            precision=args.precision,
            batch_size=batch_size,
            shard_size=batch_size * -(-args.images // (2 * batch_size)),  # two shards
        )
        job = EncodingJob(settings, args.device, args.num_workers, world)
        actions = make_actions(job, world, root, num_threads)
        image = torch.zeros(1, 3, args.resolution, args.resolution, dtype=torch.uint8)
        flops = count_flops(partial(Autoencoder(settings.vae).encode, image))

        # Measure the matmul rate before and after the timings, because machine speed drifts.
        torch.set_num_threads(num_threads)
        rate_before = measure_matmul_rate(job.device, dtype, seconds=1.0)
        # Omit the preview, which is drawn once per cache and would dominate a small one.
        with patch.object(job, "make_preview", lambda: (Image.new("RGB", (8, 8)), "omitted")):
            timings = time_interleaved(actions, job.device, args.rounds)
        torch.set_num_threads(num_threads)
        rate = max(rate_before, measure_matmul_rate(job.device, dtype, seconds=1.0))

    results = {}
    for name in actions:
        action_flops = 0 if name == "decoding alone" else flops
        results[name] = compute_per_image_results(timings, name, args.images, action_flops, rate)
    pairs = [(name, "encode_latents") for name in ("one at a time", "VAE alone")]
    report(
        args,
        job.device,
        ("images", "resolution", "precision", "rounds"),
        vae=args.vae or "random weights of sd-vae-ft-mse's shape",
        batch_size=job.batch_size,
        num_workers=job.num_workers,
        flops_per_image=flops,
        matmul_flops_per_s=rate,
        results=results,
        ratios=compare_times(timings.seconds, pairs),
    )


if __name__ == "__main__":
    cli.run(main)
