"""Images -> a reference in ADM's format: mu, sigma, mu_s and sigma_s of Inception's features, and some of the images.

    python -m evaluations.reference --images data/imagenet/train --resolution 256 --out imagenet256.npz

On several GPUs: torchrun --nproc_per_node 8 -m evaluations.reference ...
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.cli import UserError
from common.files import sha256, write_npz
from common.processes import World
from evaluations.extractors import batches, load_extractor
from evaluations.image_batches import open_images
from evaluations.metrics import MANIFOLD_NEIGHBOURS
from evaluations.moments import Moments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        __doc__, "python -m evaluations.reference", "--images PATH --resolution N --out FILE"
    )

    add = parser.add_argument
    add(
        "--images",
        type=Path,
        required=True,
        help="a folder tree class/image.ext, a zip, tar files, parquet, or an .npz",
    )
    add(
        "--resolution",
        type=cli.positive_int,
        required=True,
        help="pixels; images are centre-cropped as ADM does (not an .npz's)",
    )
    add("--out", type=Path, required=True, help=".npz to write")
    add(
        "--keep-images",
        type=cli.non_negative_int,
        default=10_000,
        help="so many images, evenly spread, go into the file: precision and recall need them (ADM: 10,000)",
    )
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add("--batch-size", type=cli.positive_int, default=64, help="images a forward pass")
    add(
        "--device",
        type=cli.device,
        help="where features are taken (default: a GPU for each process, if there is one)",
    )

    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    world = World()
    device = args.device or world.select_device()
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out} must end in .npz")
    if 0 < args.keep_images <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"--keep-images {args.keep_images}: precision and recall need more than {MANIFOLD_NEIGHBOURS}; 0 keeps none"
        )
    if args.out.exists():
        raise UserError(f"--out {args.out} is there already: remove it or name another")
    images = open_images(args.images, args.resolution, "--images")
    if images.size != (args.resolution, args.resolution):
        raise UserError(
            f"--resolution {args.resolution}: {args.images} holds images of {images.size[0]}x{images.size[1]}"
        )
    if images.count <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"--images {args.images} holds {images.count} images: there is nothing to compare with"
        )
    network = load_extractor(
        "inception", args.inception_weights, images.size, device, str(args.images)
    )
    pool, spatial = Moments(), Moments()
    for _, batch in batches(images, args.batch_size, "reference", world):
        outputs = network(torch.from_numpy(batch).to(device))
        pool.add(outputs[0])
        spatial.add(outputs[1])
    parts = world.gather((pool.cpu(), spatial.cpu()))
    if parts:
        pool, spatial = parts[0]
        for more in parts[1:]:
            pool.merge(more[0])
            spatial.merge(more[1])
        (mu, sigma), (mu_s, sigma_s) = pool.statistics(), spatial.statistics()
        kept = (
            np.linspace(0, images.count - 1, min(args.keep_images, images.count))
            .round()
            .astype(int)
        )
        rows = (
            (images.read_batch(i, i + 1).transpose(0, 2, 3, 1) for i in kept) if len(kept) else None
        )
        write_npz(
            args.out,
            rows,
            (len(kept), *images.size, 3),
            mu=mu,
            sigma=sigma,
            mu_s=mu_s,
            sigma_s=sigma_s,
        )
        print(
            f"{args.out}: statistics of {images.count:,} images, {len(kept):,} of them kept; sha256 {sha256(args.out)}"
        )
    world.close()


if __name__ == "__main__":
    cli.run(main)
