"""Create a latent cache from a data folder of REPA or SRA, without encoding images again.

    python -m preprocessing.import_repa data/repa-imagenet256 data/imagenet256

The command pairs moments and classes by file name. preview.png shows a few decoded moments and, if
they exist, the images, so that a wrong VAE is easy to detect. After an interruption, rerun the same
command to resume.
"""

import argparse
from pathlib import Path

from common import cli
from common.config import add_flags, read_flags
from common.processes import World
from preprocessing.build import build_and_report
from preprocessing.repa_files import ImportJob, ImportSettings


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__, "python -m preprocessing.import_repa", "SRC DEST")
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        type=Path,
        help="data folder of REPA, with vae-sd/**/img-mean-std-*.npy and vae-sd/dataset.json",
    )
    add("dest", metavar="DEST", type=Path, help="folder of the new cache")
    add_flags(parser, ImportSettings)
    cli.add_device_flag(add, "device that decodes the preview")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    world = World()
    job = ImportJob(read_flags(ImportSettings, args), args.device)
    build_and_report(args.dest, job, world)


if __name__ == "__main__":
    cli.run(main)
