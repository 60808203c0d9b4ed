"""Samples against a reference: FID, sFID, Inception score, precision and recall, or the offline FD-fashion.

    python -m evaluations.evaluate samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m evaluations.evaluate samples/NAME.npz --reference assets/fashion-mnist/images.zip --features fashion

Writes metrics.json: the numbers with everything that identifies them."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import cli
from cli import UserError
from evaluations.compare import array_batches, compare, load_reference, read_npz
from evaluations.features import EXTRACTORS, extract, load_extractor
from evaluations.metrics import NEIGHBOURS
from files import sha256, write_file


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m evaluations.evaluate", "SAMPLES --reference PATH")
    # fmt: off
    add = parser.add_argument
    add("samples", type=Path, help=".npz of sample_ddp.py or of any code that writes ADM's format (arr_0, uint8 NHWC)")
    add("--reference", type=Path, required=True, help="ADM's .npz, or images: a folder tree class/image.ext or a zip")
    add("--features", choices=EXTRACTORS, default="inception", help="fashion: the shipped classifier")
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add("--batch-size", type=cli.positive, default=64, help="images a forward pass")
    add("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu", help="where features are taken")
    add("--out", type=Path, help="where the numbers go (default: SAMPLES with .metrics.json)")
    # fmt: on
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float | None]:
    """The numbers of one set of samples (n, H, W, 3)."""
    network = load_extractor(args.features, args.inception_weights, images.shape[1:3], args.device, str(args.samples))
    reference = load_reference(args.reference, args.features, network, images.shape[1], args.batch_size, args.device)
    samples = extract(network, array_batches(images, args.batch_size), len(images), "samples", args.device)
    return compare(samples, labels, reference, args.features, args.device)


def table(numbers: dict, identity: dict) -> str:
    """For the screen."""
    names = {"class_agreement": "classifier agrees with class", "inception_score": "Inception score"}
    lines = [
        f"  {names.get(key, key):<30} {value:.1%}" if key == "class_agreement" else f"  {names.get(key, key):<30} {value:.3f}"
        for key, value in numbers.items()
        if value is not None
    ]
    return "\n".join([f"{identity['count']:,} samples against {identity['reference']}", *lines])


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is True for convolutions; the numbers are fp32's
    if not args.samples.exists():
        raise UserError(f"{args.samples} does not exist")
    arrays = read_npz(args.samples, "samples")
    if "arr_0" not in arrays or len(arrays["arr_0"]) <= NEIGHBOURS:
        raise UserError(f"{args.samples} holds no arr_0 with more than {NEIGHBOURS} images: there is nothing to compare")
    if not args.reference.exists():
        raise UserError(f"--reference {args.reference} does not exist")
    record = args.samples.with_suffix(".json")
    sampling = json.loads(record.read_text()) if record.exists() else {}
    identity = {
        "samples": str(args.samples), "samples_sha256": sha256(args.samples), "count": len(arrays["arr_0"]),
        "features": args.features, "reference": str(args.reference), "reference_sha256": sha256(args.reference),
        "sampling": {key: value for key, value in sampling.items() if key != "class_names"},
    }  # fmt: skip
    out = args.out or args.samples.with_suffix(".metrics.json")
    try:
        result = json.loads(out.read_text()) if out.exists() else {}
    except ValueError:
        raise UserError(f"--out {out} is there already, and is no metrics.json") from None
    if {key: value for key, value in result.items() if key != "metrics"} != identity:
        result = {"metrics": evaluate(args, arrays["arr_0"], arrays.get("arr_1")), **identity}
        write_file(out, (json.dumps(result, indent=2) + "\n").encode())
    print(table(result["metrics"], identity) + f"\n  written to {out}")


if __name__ == "__main__":
    cli.run(main)
