r"""Compute FID, sFID, Inception score, precision, recall, FD-DINOv2 or FD-fashion of samples.

    python -m evaluations.evaluate samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m evaluations.evaluate samples/NAME.npz --features fashion \
        --reference assets/fashion-mnist/images.zip

On several GPUs: torchrun --nproc_per_node 8 -m evaluations.evaluate ...

The metrics are written to NAME.metrics.json, with the settings and file hashes that determine them.
FD-fashion needs no download.
"""

import argparse
from pathlib import Path

import numpy as np

from common import cli
from common.cli import UserError
from common.config import add_flags, read_flags
from common.files import check_writable
from common.machine import describe_busy_cores
from common.processes import World
from evaluations.extractors import extract_features
from evaluations.fashion import GarmentClassifier
from evaluations.image_batches import NpzImages
from evaluations.suite import (
    EvaluationConfig,
    EvaluationSuite,
    check_sample_count,
    format_results,
    read_json_object,
    read_result,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = cli.Parser(__doc__, "python -m evaluations.evaluate", "SAMPLES --reference PATH")

    add = parser.add_argument
    add(
        "samples",
        type=Path,
        help=".npz of samples from sample_ddp.py or any code that writes ADM's format (arr_0, "
        "uint8 NHWC)",
    )
    add(
        "--reference",
        type=Path,
        required=True,
        help="ADM's .npz, an .npz with statistics only (mu, sigma), or images: a folder tree "
        "class/image.ext, a zip, tar or parquet",
    )
    add_flags(parser, EvaluationConfig)
    add("--batch-size", type=cli.positive_int, default=64, help="images per forward pass")
    add(
        "--device",
        type=cli.device,
        help="device of the feature networks (default: one GPU per process if available)",
    )
    add(
        "--out",
        type=Path,
        help="file for the metrics (default: SAMPLES with the suffix .metrics.json)",
    )

    return parser.parse_args(argv)


def check_fashion_labels(labels: np.ndarray, samples: Path) -> None:
    """Raise UserError unless all labels (n,) are classes of the bundled classifier."""
    last_class = GarmentClassifier.num_classes - 1
    low, high = labels.min(), labels.max()
    if low < 0 or high > last_class:
        raise UserError(
            f"{samples}: arr_1 has labels from {low} to {high}, but --features fashion compares "
            f"them with classes 0 to {last_class}: correct or remove arr_1"
        )


def main() -> None:
    """Run the command."""
    args = parse_args()
    world = World()
    device = args.device or world.select_device()
    if str(device) == "cpu" and world.num_processes == 1:
        cli.print_warning(describe_busy_cores())

    # Open the samples, their labels, and the record of the sampling settings.
    if not args.samples.exists():
        raise UserError(f"{args.samples} does not exist")
    if args.samples.is_dir() or args.samples.suffix in (".npy", ".zip"):
        raise UserError(
            f"{args.samples} is not an .npz in ADM's format: convert it as described in "
            "docs/evaluation.md, Samples in other formats"
        )
    images = NpzImages(args.samples, "samples")
    check_sample_count(images.count, str(args.samples))
    labels = images.read_labels()
    record = args.samples.with_suffix(".json")
    sampling = read_json_object(record, "solver", "record of samples")

    # Evaluate the samples, unless all results are already stored.
    config = read_flags(EvaluationConfig, args)
    if "fashion" in config.features and labels is not None:
        check_fashion_labels(labels, args.samples)
    suite = EvaluationSuite(config, args.reference, images.size, args.batch_size, device, world)
    out = args.out or args.samples.with_suffix(".metrics.json")
    identity = world.run_on_first_rank(
        lambda: suite.build_identity(args.samples, sampling, images.count)
    )
    result = world.run_on_first_rank(lambda: read_result(out, identity))
    if not result or suite.find_missing_results(result):
        world.run_on_first_rank(lambda: check_writable(out))
        suite.load_reference()
        features = extract_features(
            suite.networks, images, args.batch_size, "samples", device, world
        )
        if features:
            result = suite.write_results(out, identity, features, labels, result)

    if world.rank == 0:
        print(f"{format_results(result)}\n  written to {out}")
    world.close()


if __name__ == "__main__":
    cli.run(main)
