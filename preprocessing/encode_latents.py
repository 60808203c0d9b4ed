"""Images -> latent cache.

    python -m preprocessing.encode_latents --source data/imagenet/train --dest data/imagenet256 --resolution 256
    torchrun --nproc_per_node 8 -m preprocessing.encode_latents --source ... (the same)

Shards are dealt to the processes, written one by one, each whole or not at all, and the manifest last. The same command run
again, on any number of processes, does what is missing; the cache is the same to the byte.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from common import cli
from common.cli import UserError
from common.processes import World
from models.autoencoder import DEFAULT_VAE
from preprocessing.build import build_cache, format_summary
from preprocessing.encoding import DTYPES, PRECISIONS, EncodingJob, EncodingSettings
from preprocessing.images import BACKGROUNDS, CROPS


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(
        __doc__, "python -m preprocessing.encode_latents", "--source PATH --dest PATH"
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--source",
        type=Path,
        required=True,
        help="images: a folder tree class/image.ext, an EDM zip, tar or WebDataset tars, "
        "Hugging Face parquet; or a pattern of such files, in quotes",
    )
    add("--dest", type=Path, required=True, help="folder of the cache to make")
    add(
        "--labels",
        type=Path,
        help="CSV of image,class or a JSON like EDM's dataset.json (default: what the source says)",
    )
    add(
        "--limit",
        type=cli.non_negative_int,
        default=0,
        help="encode the first N images only; 0 is all",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="list images that cannot be used in DEST/skipped.jsonl and go on",
    )

    add = parser.add_argument_group("images").add_argument
    add(
        "--resolution",
        type=cli.positive_int,
        default=256,
        help="side in pixels; other sizes are scaled and cropped",
    )
    add(
        "--crop",
        choices=CROPS,
        default="center",
        help="as ADM does; random-seeded: once for all, 80%% to 100%% of the side",
    )
    add("--seed", type=cli.seed, default=0, help="of random crops")
    add(
        "--background",
        choices=BACKGROUNDS,
        default="white",
        help="what transparent images are laid over",
    )
    add(
        "--flip",
        action="store_true",
        help="encode the mirror images too; training picks one of the two each time",
    )
    add(
        "--keep-images",
        action="store_true",
        help="keep the cropped images too, as uint8, for --align repa; a whole cache "
        "gets them by the same command again with this flag",
    )

    add = parser.add_argument_group("autoencoder").add_argument
    add("--vae", default=DEFAULT_VAE, help="any diffusers AutoencoderKL: hub id or folder")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the VAE's arithmetic")
    add(
        "--batch-size",
        type=cli.non_negative_int,
        default=0,
        help="images a forward pass; 0: 64 of 256 pixels on a GPU, 4 on the CPU",
    )
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where it runs",
    )

    add = parser.add_argument_group("files").add_argument
    add("--dtype", choices=DTYPES, default="float16", help="of the stored moments")
    add(
        "--shard-size",
        type=cli.positive_int,
        default=8192,
        help="images a shard; what is lost at an interruption, at most",
    )
    add(
        "--num-workers",
        type=int,
        default=-1,
        help="decoding processes, for each process; -1: one a core, up to 16",
    )

    return parser.parse_args()


def main() -> None:
    args = parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(EncodingSettings)}
    given |= {name: str(given[name]) for name in ("source", "labels") if given[name] is not None}
    if args.source.is_dir() and args.source.resolve() in (
        args.dest.resolve(),
        *args.dest.resolve().parents,
    ):
        raise UserError(
            f"--dest {args.dest} lies in --source {args.source}: its preview would be taken for an image"
        )
    world = World()
    job = EncodingJob(EncodingSettings(**given), args.device, args.num_workers, world)
    path = args.dest / "manifest.json"
    before = path.read_bytes() if path.exists() else b""
    manifest = build_cache(args.dest, job, world)
    if world.rank == 0:
        complete = path.read_bytes() == before
        print(
            f"{args.dest} is complete: {manifest.count:,} images"
            if complete
            else format_summary(args.dest, manifest)
        )
    world.close()


if __name__ == "__main__":
    cli.run(main)
