"""A data folder of REPA's or SRA's -> latent cache, without encoding anything again.

    python -m preprocessing.import_repa data/repa-imagenet256 data/imagenet256

Moments and classes are paired by name. preview.png shows some of them decoded, beside the images if those are there: a folder
that another VAE made is seen at once. Stopped, the same command goes on.
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
    parser = cli.Parser(__doc__, "python -m preprocessing.import_repa", "SRC DEST")

    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        type=Path,
        help="REPA's data folder, with vae-sd/**/img-mean-std-*.npy and its dataset.json",
    )
    add("dest", metavar="DEST", type=Path, help="folder of the cache to make")
    add(
        "--vae",
        default=DEFAULT_VAE,
        help="the VAE that made SRC: hub id or folder; its scale and fingerprint are recorded",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="of the stored moments; SRC's are float32",
    )
    add("--shard-size", type=cli.positive_int, default=8192, help="images a shard")
    add(
        "--keep-images",
        action="store_true",
        help="take SRC's images too, as uint8, for --align repa; an imported cache gets "
        "them by the same command again with this flag",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="list files that cannot be used in DEST/skipped.jsonl and go on",
    )
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="decodes the preview",
    )

    return parser.parse_args()


def main() -> None:
    args = parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(ImportSettings)} | {
        "source": str(args.source)
    }
    world = World()
    path = args.dest / "manifest.json"
    before = path.read_bytes() if path.exists() else b""
    manifest = build_cache(args.dest, ImportJob(ImportSettings(**given), args.device), world)
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
