"""Samples against a reference: FID, sFID, Inception score, precision and recall, FD-DINOv2, or the offline FD-fashion.

    python -m evaluations.evaluate samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m evaluations.evaluate samples/NAME.npz --reference assets/fashion-mnist/images.zip --features fashion

On several GPUs: torchrun --nproc_per_node 8 -m evaluations.evaluate ... Writes metrics.json: the numbers with everything that
identifies them."""

import argparse
import json
from pathlib import Path

import cli
from cli import UserError
from evaluations.features import extract_all
from evaluations.images import Npz
from evaluations.suite import Suite, add_flags, enough, identity_of, read_result, table, write_result
from files import sha256
from world import World


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m evaluations.evaluate", "SAMPLES --reference PATH")
    # fmt: off
    add = parser.add_argument
    add("samples", type=Path, help=".npz of sample_ddp.py or of any code that writes ADM's format (arr_0, uint8 NHWC)")
    add("--reference", type=Path, required=True,
        help="ADM's .npz, or of statistics alone (mu, sigma), or images: a folder tree class/image.ext or a zip")
    add_flags(add)
    add("--batch-size", type=cli.positive, default=64, help="images a forward pass")
    add("--device", type=cli.device, help="where features are taken (default: a GPU for each process, if there is one)")
    add("--out", type=Path, help="where the numbers go (default: SAMPLES with .metrics.json)")
    # fmt: on
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    world = World()
    device = args.device or world.device()
    if not args.samples.exists():
        raise UserError(f"{args.samples} does not exist")
    npz = Npz(args.samples, "samples")
    enough(npz.images().count if "arr_0" in npz else 0, str(args.samples))
    images = npz.images()
    record = args.samples.with_suffix(".json")
    sampling = json.loads(record.read_text()) if record.exists() else {}
    out = args.out or args.samples.with_suffix(".metrics.json")
    old = read_result(out)
    suite = Suite(args, args.reference, "--reference", images.size, str(args.samples), args.batch_size, device, world)
    identity = world.first(
        lambda: {
            "samples": str(args.samples), "samples_sha256": sha256(args.samples), "count": images.count, **suite.identity,
            "sampling": {key: value for key, value in sampling.items() if key != "class_names"},
        }
    )  # fmt: skip
    if identity_of(old) == identity:
        result = old
    else:
        features = extract_all(suite.networks, images, args.batch_size, "samples", device, world)
        if features:
            result = {**suite.judge(features, npz.array("arr_1")), **identity}
            write_result(out, result)
    if world.rank == 0:
        print(table(result) + f"\n  written to {out}")
    world.close()


if __name__ == "__main__":
    cli.run(main)
