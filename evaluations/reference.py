r"""Write a reference in ADM's format: statistics of Inception features, and some of the images.

    python -m evaluations.reference --images data/imagenet/train --resolution 256 \
        --out imagenet256.npz

On several GPUs: torchrun --nproc_per_node 8 -m evaluations.reference ...
"""

import argparse
from pathlib import Path

import torch

from common import cli
from common.cli import UserError
from common.evenly_spaced import make_evenly_spaced_indices
from common.files import check_writable, sha256, write_npz
from common.processes import World
from evaluations.extractors import add_network_flags, iterate_batches, load_extractor
from evaluations.features import FeatureNetwork
from evaluations.image_batches import Images, open_images
from evaluations.metrics import MANIFOLD_NEIGHBOURS, Device
from evaluations.moments import RunningMoments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and validate the flags of the command.

    Raises:
        UserError: A value is invalid, or the output file exists.
        OSError: The output file cannot be written.
    """
    parser = cli.Parser(
        __doc__, "python -m evaluations.reference", "--images PATH --resolution N --out FILE"
    )

    add = parser.add_argument
    add(
        "--images",
        type=Path,
        required=True,
        help="source of images: a folder tree class/image.ext, a zip, tar files, parquet, or an "
        ".npz",
    )
    add(
        "--resolution",
        type=cli.positive_int,
        required=True,
        help="height and width in pixels; images are centre-cropped as in ADM, unless the source "
        "is an .npz",
    )
    add("--out", type=Path, required=True, help=".npz file to write")
    add(
        "--keep-images",
        type=cli.non_negative_int,
        default=10_000,
        help="number of evenly spaced images to store for precision and recall (ADM: 10,000)",
    )
    add_network_flags(parser)
    add(
        "--device",
        type=cli.device,
        help="device of the network (default: one GPU per process if available)",
    )

    args = parser.parse_args(argv)
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out} must end in .npz")
    if 0 < args.keep_images <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"--keep-images {args.keep_images}: precision and recall need more than "
            f"{MANIFOLD_NEIGHBOURS}; pass 0 to store no images"
        )
    if args.out.exists():
        raise UserError(f"--out {args.out} exists: remove it or choose another file")
    check_writable(args.out)
    return args


def compute_moments(
    network: FeatureNetwork,
    images: Images,
    batch_size: int,
    device: Device,
    world: World,
) -> dict[str, RunningMoments] | None:
    """Compute the moments of the pool and spatial features of all images.

    The processes share the images.

    Returns:
        On the first process, the moments by the name of the output; on the others, None.
    """
    moments = {"pool": RunningMoments(), "spatial": RunningMoments()}
    for _, batch in iterate_batches(images, batch_size, "reference", world):
        outputs = network(torch.from_numpy(batch).to(device)).as_dict()
        for name, output_moments in moments.items():
            output_moments.add(outputs[name])
    gathered = world.gather(
        {name: output_moments.cpu() for name, output_moments in moments.items()}
    )
    if gathered is None:
        return None
    total, *others = gathered
    for other in others:
        for name, output_moments in total.items():
            output_moments.merge(other[name])
    return total


def write_reference(
    out: Path, images: Images, max_images: int, moments: dict[str, RunningMoments]
) -> int:
    """Write statistics and at most `max_images` evenly spaced images in ADM's format.

    Args:
        out: The .npz file to write.
        images: All images of the reference.
        max_images: Maximum number of images to store.
        moments: Moments of the features, from `compute_moments`.

    Returns:
        The number of stored images.
    """
    indices = make_evenly_spaced_indices(images.count, max_images)
    rows = None
    if len(indices):
        rows = (images.read_batch(i, i + 1).transpose(0, 2, 3, 1) for i in indices)
    mu, sigma = moments["pool"].compute_statistics()
    mu_s, sigma_s = moments["spatial"].compute_statistics()
    shape = (len(indices), *images.size, 3)
    write_npz(out, rows, shape, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    return len(indices)


def main() -> None:
    """Run the command."""
    args = parse_args()
    world = World()
    device = args.device or world.select_device()
    images = open_images(args.images, args.resolution, "--images")
    network = load_extractor(
        "inception", args.inception_weights, images.size, device, str(args.images)
    )
    moments = compute_moments(network, images, args.batch_size, device, world)
    if moments is not None:
        num_stored = write_reference(args.out, images, args.keep_images, moments)
        print(
            f"{args.out}: statistics of {images.count:,} images, {num_stored:,} of them stored; "
            f"sha256 {sha256(args.out)}"
        )
    world.close()


if __name__ == "__main__":
    cli.run(main)
