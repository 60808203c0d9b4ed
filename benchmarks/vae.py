"""Compare precisions of a VAE: speed, and difference from float32.

    python -m benchmarks.vae --source data/imagenet/val --vae stabilityai/sd-vae-ft-mse --dest /tmp

Use it to decide whether `--precision` of preprocessing.encode_latents suits a VAE. The images are
evenly spaced images of --source. The float32 result without TF32 is the reference. The error of the
encoder is the difference of the moments in units of float16's rounding, which the cache adds
anyway: the distance between the two float16 numbers around the reference. The error of the decoder
is the difference in grey levels of images that are decoded from the reference's means.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.encode import make_random_vae
from benchmarks.measure import (
    Action,
    make_parser,
    median_and_quartiles,
    report,
    scratch_folder,
    time_interleaved,
)
from common import cli
from common.cli import UserError
from common.evenly_spaced import make_evenly_spaced_indices
from common.tf32 import set_tf32
from models.autoencoder import Autoencoder
from models.errors import FieldError
from preprocessing.images import load_square_or_user_error
from preprocessing.sources import open_source


class Precision(NamedTuple):
    """A way to run the VAE.

    Attributes:
        dtype: Autocast dtype; float32 disables autocast.
        allow_tf32: Whether float32 operations may use TF32.
        channels_last: Whether weights and activations have the channels_last memory format.
        autotune: Whether cuDNN measures which of its algorithms is fastest.
        compile: Whether to compile the encoder and the decoder.
    """

    dtype: torch.dtype = torch.float32
    allow_tf32: bool = False
    channels_last: bool = False
    autotune: bool = False
    compile: bool = False


REFERENCE = "fp32"
CPU_PRECISIONS = {
    REFERENCE: Precision(),
    "fp32, channels_last": Precision(channels_last=True),
    "bf16": Precision(torch.bfloat16),
    "bf16, channels_last": Precision(torch.bfloat16, channels_last=True),
}
GPU_PRECISIONS = {
    REFERENCE: Precision(),
    "tf32": Precision(allow_tf32=True),
    "tf32, channels_last, autotuned": Precision(allow_tf32=True, channels_last=True, autotune=True),
    "fp16": Precision(torch.float16),
    "bf16": Precision(torch.bfloat16),
    "fp16, channels_last, autotuned": Precision(torch.float16, channels_last=True, autotune=True),
    "bf16, channels_last, autotuned": Precision(torch.bfloat16, channels_last=True, autotune=True),
    "bf16, channels_last, compiled": Precision(
        torch.bfloat16, channels_last=True, autotune=True, compile=True
    ),
}


@contextmanager
def use_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run the block with a precision."""
    set_tf32(precision.allow_tf32)
    torch.backends.cudnn.benchmark = precision.autotune
    is_mixed = precision.dtype != torch.float32
    try:
        with torch.autocast(device.type, precision.dtype, enabled=is_mixed):
            yield
    finally:
        set_tf32(False)
        torch.backends.cudnn.benchmark = False


def prepare_vae(vae: Autoencoder, precision: Precision) -> Autoencoder:
    """Return a copy of a VAE in the memory format of a precision, compiled if requested."""
    prepared = copy.copy(vae)
    prepared.vae = copy.deepcopy(vae.vae)
    if precision.channels_last:
        prepared.vae.to(memory_format=torch.channels_last)
    if precision.compile:
        for module in (prepared.vae.encoder, prepared.vae.decoder):
            module.compile(dynamic=False)
    return prepared


def run_in_batches(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    batch_size: int,
    precision: Precision,
    device: torch.device,
) -> Tensor:
    """Return the results of a function that processes batches, on the device."""
    with use_precision(precision, device):
        return torch.cat([function(batch) for batch in inputs.split(batch_size)])


def float16_spacing(values: Tensor) -> Tensor:
    """Return the distance between the float16 numbers around each value."""
    _, exponent = torch.frexp(values.abs().clamp(min=2.0**-14))  # the smallest normal number
    return torch.ldexp(torch.ones_like(values), exponent - 11)


def summarize_errors(errors: Tensor) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum of absolute errors."""
    values = errors.abs().flatten().double().cpu().numpy()
    median, percentile_99 = np.quantile(values, [0.5, 0.99])
    return {"median": median, "percentile_99": percentile_99, "max": values.max()}


def load_images(path: Path, count: int, resolution: int) -> Tensor:
    """Load evenly spaced images of a source, (count, 3, resolution, resolution) uint8."""
    source = open_source(path)
    indices = make_evenly_spaced_indices(len(source), min(count, len(source)))
    images = [load_square_or_user_error(source, int(i), resolution, "--source") for i in indices]
    return torch.from_numpy(np.stack(images))


def load_vae(args: argparse.Namespace, folder: Path) -> Autoencoder:
    """Load --vae, or build one with random weights."""
    try:
        vae = Autoencoder(args.vae or str(make_random_vae(folder)), args.device)
    except FieldError as error:
        raise UserError(f"--vae {error.reason}") from None
    if args.resolution % vae.downsampling_factor:
        raise UserError(
            f"--resolution {args.resolution} is not a multiple of {vae.downsampling_factor}, the "
            "downsampling factor of --vae; pass a multiple"
        )
    return vae


def main() -> None:
    """Run the benchmark."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = make_parser(
        __doc__,
        "vae",
        "dest",
        vae=None,
        images=64 if default_device == "cuda" else 8,
        resolution=256,
        batch_size=16 if default_device == "cuda" else 4,
        device=default_device,
        rounds=3,
        warm_up=1,
    )
    parser.add_argument("--source", type=Path, required=True, help="images to encode")
    args = parser.parse_args()
    device = torch.device(args.device)
    with scratch_folder(args.dest / "benchmark-vae") as folder:
        vae = load_vae(args, folder / "vae")
    images = load_images(args.source, args.images, args.resolution).to(device)
    args.images = len(images)

    run = partial(run_in_batches, batch_size=args.batch_size, device=device)
    reference_moments = run(vae.encode, images, precision=Precision())
    latents = vae.scale.mean(reference_moments)
    reference_images = run(vae.decode, latents, precision=Precision())
    spacing = float16_spacing(reference_moments)

    precisions = GPU_PRECISIONS if device.type == "cuda" else CPU_PRECISIONS
    results: dict[str, dict] = {}
    actions: dict[str, Action] = {}
    for name, precision in precisions.items():
        prepared = prepare_vae(vae, precision)
        encode = partial(run, prepared.encode, images, precision=precision)
        decode = partial(run, prepared.decode, latents, precision=precision)
        moments = encode()
        grey_levels = decode().int() - reference_images.int()
        results[name] = {
            "moments_error": summarize_errors((moments - reference_moments) / spacing),
            "grey_level_error": summarize_errors(grey_levels),
        }
        actions |= {f"encode, {name}": encode, f"decode, {name}": decode}
    timings = time_interleaved(actions, device, args.rounds, warm_up=args.warm_up)
    for name, result in results.items():
        for action in ("encode", "decode"):
            seconds = timings.seconds[f"{action}, {name}"]
            rate = median_and_quartiles(np.divide(len(images), seconds))
            result[f"{action}_images_per_s"] = rate
    report(
        args,
        device,
        ("resolution", "images", "batch_size", "rounds"),
        vae=args.vae or "random weights of sd-vae-ft-mse's shape",
        results=results,
    )


if __name__ == "__main__":
    cli.run(main)
