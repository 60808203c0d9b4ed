"""Images a second of preprocessing.encode_latents, against one image at a time (as REPA's preprocessing does it), in one run.

    python -m benchmarks.encode --dest /tmp --json encode.json

JPEGs of ImageNet's average size are made first. The VAE has the architecture of sd-vae-ft-mse, with random weights unless --vae
names others: speed is the same. `encode_latents`: the command's own code, from files to a whole cache. `one at a time`: decode,
crop, encode and np.save for each image in turn. `VAE alone`: the same batches, already decoded; its share of the first is how
busy the VAE is kept. `decoding alone`: files to squares, in one process: what one worker delivers.
"""

import argparse
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.measure import (
    describe_machine,
    median_and_quartiles,
    ratio_per_round,
    report,
    time_in_turn,
)
from common import cli
from common.processes import World
from models.autoencoder import Autoencoder
from preprocessing.build import build_cache
from preprocessing.encoding import (
    PRECISIONS,
    DecodedBatch,
    EncodingJob,
    EncodingSettings,
    default_batch_size,
    map_in_order,
)
from preprocessing.images import SquareReader
from training.throughput import matmul_rate


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.encode", "--dest PATH")

    add = parser.add_argument
    add("--dest", type=Path, required=True, help="folder to write to, and to empty afterwards")
    add(
        "--images",
        type=cli.positive_int,
        default=512 if torch.cuda.is_available() else 16,
        help="images",
    )
    add("--resolution", type=cli.positive_int, default=256, help="pixels a side")
    add("--vae", help="hub id or folder (default: random weights)")
    add("--precision", choices=PRECISIONS, default="fp32", help="as encode_latents'")
    add("--batch-size", type=cli.non_negative_int, default=0, help="as encode_latents'")
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="as encode_latents'",
    )
    add("--num-workers", type=int, default=-1, help="as encode_latents'")
    add(
        "--rounds",
        type=cli.positive_int,
        default=5,
        help="timings of each, of which the median counts",
    )
    add("--json", type=Path, help="file for the result")

    return parser.parse_args()


def make_random_vae(folder: Path) -> Path:
    """sd-vae-ft-mse's architecture."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
    ).save_pretrained(folder)
    return folder


def photographs(folder: Path, count: int) -> Path:
    """JPEGs of 500x375 pixels and about 110 KB, as ImageNet's are on average."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in tqdm(range(count), desc="images"):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-16, 17, (375, 500, 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{i:06d}.jpg", quality=90
        )
    return folder.parent


def main() -> None:
    args = parse()
    root, world = args.dest / "benchmark-encode", World()
    vae = args.vae or str(make_random_vae(root / "vae"))
    shutil.rmtree(root / "images", ignore_errors=True)
    source = photographs(root / "images/class", args.images)
    batch_size = args.batch_size or default_batch_size(args.resolution, torch.device(args.device))
    settings = EncodingSettings(
        str(source),
        resolution=args.resolution,
        vae=vae,
        precision=args.precision,
        batch_size=batch_size,
        shard_size=batch_size * -(-args.images // (2 * batch_size)),  # two shards
    )
    threads = torch.get_num_threads()
    job = EncodingJob(settings, args.device, args.num_workers, world)
    own_threads, device, cache = torch.get_num_threads(), job.device, root / "cache"
    reader, count = SquareReader(args.resolution), range(args.images)
    pixels = torch.from_numpy(np.stack([reader.read(job.source, i).pixels for i in count]))
    decoded = [
        DecodedBatch(
            0,
            len(part),
            part.pin_memory() if device.type == "cuda" else part,
            np.zeros(len(part)),
            [],
            Counter(),
        )
        for part in pixels.split(job.batch_size)
    ]

    def ours() -> None:
        torch.set_num_threads(own_threads)
        build_cache(cache, job, world)
        shutil.rmtree(cache)

    def alone() -> None:
        torch.set_num_threads(own_threads)
        with ThreadPoolExecutor(job.num_threads, initializer=job.init_thread) as pool:
            for batch in map_in_order(pool, job.encode_batch, decoded, job.num_threads):
                if batch.copy_done:
                    batch.copy_done.synchronize()

    def one_at_a_time() -> None:
        torch.set_num_threads(threads)
        (root / "one").mkdir(exist_ok=True)
        for i in count:
            image = torch.from_numpy(reader.read(job.source, i).pixels[None].copy())
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                moments = job.vae.encode(image.to(device))
            np.save(root / "one" / f"{i}.npy", moments[0].cpu().numpy())

    def decode() -> None:
        torch.set_num_threads(1)
        for i in count:
            reader.read(job.source, i)

    with FlopCounterMode(display=False) as counter:
        Autoencoder(vae).encode(
            torch.zeros(1, 3, args.resolution, args.resolution, dtype=torch.uint8)
        )
    flops = counter.get_total_flops()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch.set_num_threads(threads)
    rate = matmul_rate(device, dtype, seconds=1.0)
    job.make_preview = lambda: (
        Image.new("RGB", (8, 8)),
        "left out",
    )  # it is drawn once a cache, not once a shard
    try:
        actions = {
            "encode_latents": ours,
            "VAE alone": alone,
            "one at a time": one_at_a_time,
            "decoding alone": decode,
        }
        seconds, peak = time_in_turn(actions, device, args.rounds, 1, 1)
    finally:
        shutil.rmtree(root)
    torch.set_num_threads(threads)
    rate = max(rate, matmul_rate(device, dtype, seconds=1.0))
    results = {}
    for name, values in seconds.items():
        images_per_s = args.images / median_and_quartiles(values)["median"]
        results[name] = {
            "image_s": median_and_quartiles([value / args.images for value in values]),
            "images_per_s": images_per_s,
            "share_of_matmul_rate": None
            if name == "decoding alone"
            else flops * images_per_s / rate,
            "peak_memory_gib": peak[name],
        }
    report(
        {
            "benchmark": "encode",
            "machine": describe_machine(device),
            "images": args.images,
            "resolution": args.resolution,
            "vae": args.vae or "random weights of sd-vae-ft-mse's shape",
            "precision": args.precision,
            "batch_size": job.batch_size,
            "num_workers": job.num_workers,
            "rounds": args.rounds,
            "flops_per_image": flops,
            "matmul_flops_per_s": rate,
            "results": results,
            "ratios": {
                "one at a time/encode_latents": ratio_per_round(
                    seconds["one at a time"], seconds["encode_latents"]
                ),
                "VAE alone/encode_latents": ratio_per_round(
                    seconds["VAE alone"], seconds["encode_latents"]
                ),
            },
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
