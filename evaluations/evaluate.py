"""Samples against a reference: FID, sFID, Inception score, precision and recall, or the offline FD-fashion.

    python -m evaluations.evaluate samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m evaluations.evaluate samples/NAME.npz --reference assets/fashion-mnist/images.zip --features fashion

Writes metrics.json: the numbers with everything that identifies them."""

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cli
from cli import UserError
from evaluations.fashion import RESOLUTION, load_classifier
from evaluations.inception import InceptionFeatures
from evaluations.metrics import NEIGHBOURS, Statistics, frechet_distance, inception_score, precision_recall, statistics
from files import sha256, write_file
from preprocessing.images import ImageSource, open_source, read_or_name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m evaluations.evaluate", "SAMPLES --reference PATH")
    # fmt: off
    add = parser.add_argument
    add("samples", type=Path, help=".npz of sample_ddp.py or of any code that writes ADM's format (arr_0, uint8 NHWC)")
    add("--reference", type=Path, required=True, help="ADM's .npz, or images: a folder tree class/image.ext or a zip")
    add("--features", choices=("inception", "fashion"), default="inception", help="fashion: the shipped classifier")
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add("--batch-size", type=cli.positive, default=64, help="images a forward pass")
    add("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu", help="where features are taken")
    add("--out", type=Path, help="where the numbers go (default: SAMPLES with .metrics.json)")
    # fmt: on
    return parser.parse_args(argv)


class Features(NamedTuple):
    """What a network says of n images."""

    pool: np.ndarray  # (n, F)
    spatial: np.ndarray | None  # (n, 2023), Inception only
    scores: np.ndarray  # (n, K) class probabilities or logits


class Reference(NamedTuple):
    """What samples are compared with. An ADM .npz may hold statistics, images or both; statistics win, as in ADM."""

    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None  # (n, F) for precision and recall; None where only statistics are known


def read_npz(path: Path, flag: str) -> dict[str, np.ndarray]:
    """Every array of an .npz. Raises UserError if it cannot be read, or if arr_0 is not images."""
    try:
        with np.load(path) as content:
            arrays = dict(content)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{flag} {path} cannot be read as .npz ({error})") from None
    images = arrays.get("arr_0")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise UserError(f"{flag} {path}: arr_0 must be uint8 of shape (n, H, W, 3), it is {images.dtype} {images.shape}")
    return arrays


def array_batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """(n, H, W, 3) -> batches (B, 3, H, W)."""
    for start in range(0, len(images), size):
        yield np.ascontiguousarray(images[start : start + size].transpose(0, 3, 1, 2))


def source_batches(source: ImageSource, side: int, size: int) -> Iterator[np.ndarray]:
    """Images of a folder or zip, centre-cropped to `side` -> batches (B, 3, side, side)."""
    numbers = range(len(source.entries))
    for start in numbers[::size]:
        yield np.stack([read_or_name(source, i, side) for i in numbers[start : start + size]])


def extract(network: torch.nn.Module, batches: Iterator[np.ndarray], count: int, desc: str, device: str) -> Features:
    """Batches (B, 3, H, W) uint8 through the network."""
    outputs = []
    with tqdm(total=count, unit="img", desc=desc, leave=False) as bar:
        for batch in batches:
            outputs.append([output.cpu().numpy() for output in network(torch.from_numpy(batch).to(device))])
            bar.update(len(batch))
    pool, *spatial, scores = (np.concatenate(column) for column in zip(*outputs))
    return Features(pool, spatial[0] if spatial else None, scores)


def load_reference(args: argparse.Namespace, network: torch.nn.Module, side: int) -> Reference:
    """--reference, whatever it is. Raises UserError."""
    path, arrays = args.reference, {}
    if path.suffix == ".npz":
        arrays = read_npz(path, "--reference")
        if "arr_0" not in arrays and "mu" not in arrays:
            raise UserError(f"--reference {path} holds neither images (arr_0) nor statistics (mu, sigma)")
        if args.features == "fashion" and "arr_0" not in arrays:
            raise UserError(f"--reference {path} holds Inception statistics; --features fashion needs images")
    features = None
    if "arr_0" in arrays:
        images = arrays["arr_0"]
        features = extract(network, array_batches(images, args.batch_size), len(images), "reference", args.device)
    elif not arrays:
        source = open_source(path, "--reference")
        batches = source_batches(source, side, args.batch_size)
        features = extract(network, batches, len(source.entries), "reference", args.device)

    def of(key: str, own: np.ndarray | None) -> Statistics | None:
        if args.features == "inception" and f"mu{key}" in arrays:
            return Statistics(arrays[f"mu{key}"].astype(np.float64), arrays[f"sigma{key}"].astype(np.float64))
        return None if own is None else statistics(own)

    if features is not None and len(features.pool) <= NEIGHBOURS:
        raise UserError(f"--reference {path} holds {len(features.pool)} images: there is nothing to compare with")
    own = features or Features(None, None, None)
    return Reference(of("", own.pool), of("_s", own.spatial), own.pool)


def evaluate(args: argparse.Namespace, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float | None]:
    """The numbers of one set of samples, by the names they are known under; None where the reference cannot give one."""
    fashion = args.features == "fashion"
    if fashion and images.shape[1:3] != (RESOLUTION, RESOLUTION):
        side = "x".join(map(str, images.shape[1:3]))
        raise UserError(f"--features fashion needs {RESOLUTION}x{RESOLUTION} images, {args.samples} holds {side}")
    network = (load_classifier() if fashion else InceptionFeatures(args.inception_weights)).to(args.device)
    reference = load_reference(args, network, images.shape[1])
    samples = extract(network, array_batches(images, args.batch_size), len(images), "samples", args.device)

    distance = frechet_distance(statistics(samples.pool), reference.pool)
    precision, recall = (None, None)
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, samples.pool)
    if fashion:
        agreement = None if labels is None else float((samples.scores.argmax(1) == labels).mean())
        return {"FD-fashion": distance, "class_agreement": agreement, "precision": precision, "recall": recall}
    spatial = None if reference.spatial is None else frechet_distance(statistics(samples.spatial), reference.spatial)
    score = inception_score(samples.scores)
    return {"FID": distance, "sFID": spatial, "inception_score": score, "precision": precision, "recall": recall}


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
