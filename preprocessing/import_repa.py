"""Create a latent cache from a data folder of REPA or SRA, without encoding images again.

    python -m preprocessing.import_repa data/repa-imagenet256 data/imagenet256

The command pairs moments and classes by file name. preview.png shows a few decoded moments next to
the images, if these exist, so that a wrong VAE is easy to see. After an interruption, rerun the
same command to resume.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from common import cli
from common.processes import World
from models.autoencoder import DEFAULT_VAE
from preprocessing.build import build_cache, format_summary
from preprocessing.encoding import DTYPES
from preprocessing.repa_files import ImportJob, ImportSettings


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__, "python -m preprocessing.import_repa", "SRC DEST")

    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        type=Path,
        help="REPA's data folder, with vae-sd/**/img-mean-std-*.npy and vae-sd/dataset.json",
    )
    add("dest", metavar="DEST", type=Path, help="folder of the new cache")
    add(
        "--vae",
        default=DEFAULT_VAE,
        help="VAE that encoded SRC: hub id or folder; the cache records its scale and fingerprint",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="data type of the stored moments; those of SRC are float32",
    )
    add("--shard-size", type=cli.positive_int, default=8192, help="images per shard")
    add(
        "--keep-images",
        action="store_true",
        help="also store the images of SRC as uint8, for --align repa; to add them to a finished "
        "cache, rerun its command with this flag",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="skip unusable files and list them in DEST/skipped.jsonl",
    )
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device that decodes the preview",
    )

    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    flags = {field.name: getattr(args, field.name) for field in fields(ImportSettings)}
    flags["source"] = str(args.source)
    world = World()
    job = ImportJob(ImportSettings(**flags), args.device)

    manifest_path = args.dest / "manifest.json"
    previous = manifest_path.read_bytes() if manifest_path.exists() else b""
    manifest = build_cache(args.dest, job, world)
    if world.rank == 0:
        if manifest_path.read_bytes() == previous:
            print(f"{args.dest} is complete: {manifest.count:,} images")
        else:
            print(format_summary(args.dest, manifest))
    world.close()


if __name__ == "__main__":
    cli.run(main)
