"""Encode images to a latent cache.

    python -m preprocessing.encode_latents --source data/imagenet/train --dest data/imagenet256
    torchrun --nproc_per_node 8 -m preprocessing.encode_latents --source ... (the same flags)

Shards are distributed over the processes and written atomically, and the manifest is written last.
After an interruption, rerun the same command with any number of processes; it encodes only the
missing shards. The bytes of the cache do not depend on interruptions.
"""

import argparse
from pathlib import Path

from common import cli
from common.cli import UserError
from common.config import add_flags, read_flags
from common.processes import World
from preprocessing.build import build_and_report
from preprocessing.encoding import EncodingJob, EncodingSettings
from preprocessing.foreign_flags import FOREIGN_FLAGS


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(
        __doc__, "python -m preprocessing.encode_latents", "--source PATH --dest PATH"
    )
    add = parser.add_argument
    add("--dest", type=Path, required=True, help="folder of the cache to create")
    add_flags(parser, EncodingSettings)
    cli.add_device_flag(add, "device of the VAE; with cuda, each process uses a different GPU")
    add(
        "--num-workers",
        type=int,
        default=-1,
        help="decoding workers per process; -1: one worker per core, up to 16",
    )
    return FOREIGN_FLAGS.parse(parser)


def main() -> None:
    """Run the command."""
    args = parse_args()
    dest = args.dest.resolve()
    if args.source.is_dir() and args.source.resolve() in (dest, *dest.parents):
        raise UserError(
            f"--dest {args.dest} is inside --source {args.source}, so preview.png would be read as "
            "an image; choose another folder"
        )
    world = World()
    settings = read_flags(EncodingSettings, args)
    job = EncodingJob(settings, args.device, args.num_workers, world)
    build_and_report(args.dest, job, world)


if __name__ == "__main__":
    cli.run(main)
