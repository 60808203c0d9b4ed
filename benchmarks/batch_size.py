"""What another batch size does to the images of sample_ddp.py, in grey levels.

    python -m benchmarks.batch_size --ckpt exps/demo --dest /tmp --json batch_size.json

Noise, classes and steps of an image depend on its number alone; but a matrix product of another size is computed by another
kernel, in another order. The same images are made at each batch size and compared with those of the first.
"""

import argparse
import itertools
import shutil
from pathlib import Path

import numpy as np

from benchmarks.measure import describe_machine, report
from benchmarks.sampling import Sampler
from checkpointing import pretrained
from checkpointing.storage import CheckpointError
from common import cli
from common.cli import UserError
from common.processes import World
from models.autoencoder import Autoencoder
from models.errors import FieldError

SAMPLERS = {"Euler": "ode", "Euler-Maruyama": "sde"}


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.batch_size", "--ckpt PATH --dest PATH")

    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="as sample_ddp.py's")
    add("--dest", type=Path, required=True, help="folder to write to, and to empty afterwards")
    add("--images", type=cli.positive_int, default=256, help="images")
    add(
        "--batch-sizes",
        type=cli.positive_int,
        nargs="+",
        default=[32, 7, 64],
        help="the others are compared with the first",
    )
    add("--num-steps", type=cli.positive_int, default=50, help="as sample_ddp.py's")
    add(
        "--cfg-scale",
        type=cli.non_negative_float,
        nargs="+",
        default=[1.0, 1.5],
        help="as sample_ddp.py's, each in turn",
    )
    add("--json", type=Path, help="file for the result")

    return parser.parse_args()


def compare_images(a: np.ndarray, b: np.ndarray) -> dict:
    """Images (n, H, W, 3) uint8: the largest difference in grey levels, and which shares of numbers and of images differ."""
    difference = np.abs(a.astype(int) - b)
    return {
        "largest": int(difference.max()),
        "values": float((difference > 0).mean()),
        "images": float(difference.any((1, 2, 3)).mean()),
    }


def main() -> None:
    args = parse()
    world, root = World(), args.dest / "benchmark-batch-size"
    try:
        source = pretrained.load(args.ckpt)
        vae = Autoencoder(source.vae, world.select_device())
    except (CheckpointError, FieldError) as error:
        raise UserError(f"--ckpt {args.ckpt}: {error}") from None
    results = {}
    for scale, (solver, mode) in itertools.product(args.cfg_scale, SAMPLERS.items()):
        flags = [
            "--mode",
            mode,
            "--num-fid-samples",
            args.images,
            "--num-steps",
            args.num_steps,
            "--cfg-scale",
            scale,
        ]
        made = []
        for size in args.batch_sizes:
            shutil.rmtree(root, ignore_errors=True)
            with np.load(
                Sampler([*flags, "--per-proc-batch-size", size], source, vae, world)(root)
            ) as content:
                made.append(content["arr_0"])
        results[f"{solver}, guidance {scale:g}" if scale > 1 else solver] = [
            {"batch_size": size, **compare_images(made[0], other)}
            for size, other in zip(args.batch_sizes[1:], made[1:], strict=True)
        ]
    shutil.rmtree(root)
    identity = source.identity
    report(
        {
            "benchmark": "batch_size",
            "machine": describe_machine(world.select_device()),
            "model": identity["model"],
            "step": identity["step"],
            "ema_sha256": identity["ema_sha256"],
            "images": args.images,
            "num_steps": args.num_steps,
            "cfg_scale": args.cfg_scale,
            "batch_size": args.batch_sizes[0],
            "results": results,
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
