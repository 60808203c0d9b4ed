"""Measure the effect of the batch size on the images of sample_ddp.py.

    python -m benchmarks.batch_size --ckpt exps/demo --dest /tmp --json batch_size.json

The noise, the class and the steps of an image depend only on the index of the image, but the size
of a matrix product determines the kernel and therefore the summation order. The same images are
sampled with each batch size, and compared with the images of the first batch size.
"""

import itertools

import numpy as np

from benchmarks.measure import make_parser, report, scratch_folder
from benchmarks.sampler import Sampler, make_config
from checkpointing import pretrained
from checkpointing.storage import CheckpointError
from common import cli
from common.cli import UserError
from common.processes import World
from models.autoencoder import Autoencoder
from models.errors import FieldError
from sample_ddp import PrecisionConfig
from sampling.recipe import SamplerConfig

MODES = {"Euler": "ode", "Euler-Maruyama": "sde"}  # solver -> --mode of sample_ddp.py


def compare_images(a: np.ndarray, b: np.ndarray) -> dict:
    """Compare two sets of n images, each (n, H, W, 3) uint8.

    Returns:
        largest: Largest difference in grey levels.
        values: Fraction of values that differ.
        images: Fraction of images that differ.
    """
    difference = np.abs(a.astype(int) - b)
    return {
        "largest": int(difference.max()),
        "values": float((difference > 0).mean()),
        "images": float(difference.any((1, 2, 3)).mean()),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "batch_size", "ckpt", "dest", images=256, num_steps=50)
    parser.add_argument(
        "--batch-sizes",
        type=cli.positive_int,
        nargs="+",
        default=[32, 7, 64],
        help="batch sizes to compare; the first is the reference",
    )
    parser.add_argument(
        "--cfg-scale",
        type=cli.non_negative_float,
        nargs="+",
        default=[1.0, 1.5],
        help="guidance scales to measure",
    )
    args = parser.parse_args()
    device = World().select_device()
    try:
        source = pretrained.load(args.ckpt)
        vae = Autoencoder(source.vae, device)
    except (CheckpointError, FieldError) as error:
        raise UserError(f"--ckpt {args.ckpt}: {error}") from None

    def sample_images(sampler_config: SamplerConfig, batch_size: int) -> np.ndarray:
        """Sample all images, (n, H, W, 3) uint8."""
        config = make_config(sampler_config, args.images, batch_size, PrecisionConfig())
        with scratch_folder(args.dest / "benchmark-batch-size") as folder:
            path = Sampler(config, source, vae)(folder)
            with np.load(path) as content:
                return content["arr_0"]

    first_size, *other_sizes = args.batch_sizes
    results: dict[str, list[dict]] = {}
    for scale, (solver, mode) in itertools.product(args.cfg_scale, MODES.items()):
        sampler_config = SamplerConfig(mode=mode, num_steps=args.num_steps, cfg_scale=scale)
        first_images = sample_images(sampler_config, first_size)
        name = f"{solver}, guidance {scale:g}" if scale > 1 else solver
        results[name] = []
        for size in other_sizes:
            images = sample_images(sampler_config, size)
            results[name].append({"batch_size": size, **compare_images(first_images, images)})
    report(
        args,
        device,
        ("images", "num_steps", "cfg_scale"),
        model=source.identity["model"],
        step=source.identity["step"],
        ema_sha256=source.identity["ema_sha256"],
        batch_size=first_size,
        results=results,
    )


if __name__ == "__main__":
    cli.run(main)
