"""Samples against a reference: FID, sFID, Inception score, precision and recall, FD-DINOv2, or the offline FD-fashion.

    python -m evaluations.evaluate samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m evaluations.evaluate samples/NAME.npz --reference assets/fashion-mnist/images.zip --features fashion

On several GPUs: torchrun --nproc_per_node 8 -m evaluations.evaluate ... Writes metrics.json: the numbers with everything that
identifies them.
"""

import argparse
from pathlib import Path

from common import cli
from common.cli import UserError
from common.processes import World
from evaluations.extractors import extract_all
from evaluations.image_batches import NpzFile
from evaluations.suite import (
    EvaluationSuite,
    add_flags,
    build_identity,
    check_sample_count,
    drop_results,
    format_results,
    read_object,
    read_result,
    write_result,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m evaluations.evaluate", "SAMPLES --reference PATH")

    add = parser.add_argument
    add(
        "samples",
        type=Path,
        help=".npz of sample_ddp.py or of any code that writes ADM's format (arr_0, uint8 NHWC)",
    )
    add(
        "--reference",
        type=Path,
        required=True,
        help="ADM's .npz, an .npz of statistics alone (mu, sigma), or images: a tree class/image.ext, a zip, tar or parquet",
    )
    add_flags(add)
    add("--batch-size", type=cli.positive_int, default=64, help="images a forward pass")
    add(
        "--device",
        type=cli.device,
        help="where features are taken (default: a GPU for each process, if there is one)",
    )
    add("--out", type=Path, help="where the numbers go (default: SAMPLES with .metrics.json)")

    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    world = World()
    device = args.device or world.select_device()
    if not args.samples.exists():
        raise UserError(f"{args.samples} does not exist")
    npz = NpzFile(args.samples, "samples")
    images = npz.open_images()
    check_sample_count(images.count, str(args.samples))
    labels = npz.read_array("arr_1")
    if labels is not None and labels.shape != (images.count,):
        raise UserError(
            f"{args.samples}: arr_1 must be the classes of {images.count} images, it is of shape {labels.shape}"
        )
    sampling = read_object(args.samples.with_suffix(".json"), "solver", "record of samples")
    out = args.out or args.samples.with_suffix(".metrics.json")
    suite = EvaluationSuite(
        args,
        args.reference,
        "--reference",
        images.size,
        str(args.samples),
        args.batch_size,
        device,
        world,
    )
    identity = world.run_on_first_rank(
        lambda: build_identity(suite, args.samples, sampling, images.count)
    )
    result = world.run_on_first_rank(lambda: read_result(out, identity))
    if drop_results(result) != identity:
        suite.load_reference()
        features = extract_all(suite.networks, images, args.batch_size, "samples", device, world)
        if features:
            result = {**suite.compute_results(features, labels), **identity}
            write_result(out, result)
    if world.rank == 0:
        print(format_results(result) + f"\n  written to {out}")
    world.close()


if __name__ == "__main__":
    cli.run(main)
