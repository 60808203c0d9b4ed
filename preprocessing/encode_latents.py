"""Encode images to a latent cache.

    python -m preprocessing.encode_latents --source data/imagenet/train --dest data/imagenet256
    torchrun --nproc_per_node 8 -m preprocessing.encode_latents --source ... (the same flags)

Shards are distributed over the processes and written atomically, and the manifest is written last.
After an interruption, rerun the same command with any number of processes; it encodes only the
missing shards. The bytes of the cache do not depend on interruptions.
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
    """Return the command-line arguments."""
    parser = cli.Parser(
        __doc__, "python -m preprocessing.encode_latents", "--source PATH --dest PATH"
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--source",
        type=Path,
        required=True,
        help="images: a folder tree class/image.ext, an EDM zip, a tar or WebDataset tars, "
        "Hugging Face parquet files, or a quoted pattern of such files",
    )
    add("--dest", type=Path, required=True, help="folder of the cache to create")
    add(
        "--labels",
        type=Path,
        help="CSV with rows image,class or a JSON like EDM's dataset.json (default: the labels of "
        "the source)",
    )
    add(
        "--limit",
        type=cli.non_negative_int,
        default=0,
        help="number of images to encode, from the first one; 0 encodes all",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="record images that cannot be used in DEST/skipped.jsonl instead of stopping",
    )

    add = parser.add_argument_group("images").add_argument
    add(
        "--resolution",
        type=cli.positive_int,
        default=256,
        help="width and height in pixels; images of other sizes are resized and cropped",
    )
    add(
        "--crop",
        choices=CROPS,
        default="center",
        help="ADM's crops; random-seeded: one random crop per image, 80%% to 100%% of its shorter "
        "side",
    )
    add("--seed", type=cli.seed, default=0, help="seed of the random crops")
    add(
        "--background",
        choices=BACKGROUNDS,
        default="white",
        help="color that transparent images are composited over",
    )
    add(
        "--flip",
        action="store_true",
        help="also encode the horizontally flipped images; training picks one of the two versions "
        "of an image in every epoch",
    )
    add(
        "--keep-images",
        action="store_true",
        help="also store the cropped images as uint8, for --align repa; to add them to a complete "
        "cache, rerun the same command with this flag",
    )

    add = parser.add_argument_group("autoencoder").add_argument
    add("--vae", default=DEFAULT_VAE, help="a diffusers AutoencoderKL: hub id or folder")
    add("--precision", choices=PRECISIONS, default="fp32", help="arithmetic precision of the VAE")
    add(
        "--batch-size",
        type=cli.non_negative_int,
        default=0,
        help="images per forward pass; 0: 64 images of 256 pixels on a GPU, 4 on the CPU",
    )
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the VAE; cuda gives each process its own GPU",
    )

    add = parser.add_argument_group("files").add_argument
    add("--dtype", choices=DTYPES, default="float16", help="dtype of the stored moments")
    add(
        "--shard-size",
        type=cli.positive_int,
        default=8192,
        help="images per shard; an interruption loses at most one shard per process",
    )
    add(
        "--num-workers",
        type=int,
        default=-1,
        help="decoding processes per process; -1: one per core, up to 16",
    )

    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    dest = args.dest.resolve()
    if args.source.is_dir() and args.source.resolve() in (dest, *dest.parents):
        raise UserError(
            f"--dest {args.dest} is inside --source {args.source}, so preview.png would be read as "
            "an image; choose another folder"
        )
    settings = {field.name: getattr(args, field.name) for field in fields(EncodingSettings)}
    settings["source"] = str(args.source)
    settings["labels"] = str(args.labels) if args.labels else None

    world = World()
    job = EncodingJob(EncodingSettings(**settings), args.device, args.num_workers, world)
    path = args.dest / "manifest.json"
    old_manifest = path.read_bytes() if path.exists() else b""
    manifest = build_cache(args.dest, job, world)
    if world.rank == 0:
        if path.read_bytes() == old_manifest:
            print(f"{args.dest} is complete: {manifest.count:,} images")
        else:
            print(format_summary(args.dest, manifest))
    world.close()


if __name__ == "__main__":
    cli.run(main)
