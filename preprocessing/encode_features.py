"""Store the features of an image encoder for the images of a latent cache, for --align repa.

    python -m preprocessing.encode_features data/small --encoder vit_base_patch14_dinov2.lvd142m
    torchrun --nproc_per_node 8 -m preprocessing.encode_features data/small ... (the same flags)

Stored features save time if the encoder is more expensive than the training itself, as with small
data sets and on small machines. For ImageNet and DINOv2-B, the features would take 504 GB (256
tokens x 768 x 2 bytes x 1.28 million images); run the encoder during training in such cases.
Shards are distributed over the processes. After an interruption, rerun the same command to resume.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.logs import get_logger
from common.processes import World
from latents.cache import KEEP_IMAGES_REMEDY
from latents.manifest import Manifest, read_manifest
from models.errors import FieldError
from preprocessing.encoder_features import FEATURES_DTYPE, build_features

logger = get_logger(__name__)


def positive_int_or_auto(text: str) -> int | None:
    """Parse a positive integer, or "auto" as None (an argparse type)."""
    return None if text == "auto" else cli.positive_int(text)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__, "python -m preprocessing.encode_features", "CACHE --encoder NAME")

    add = parser.add_argument
    add(
        "cache",
        metavar="CACHE",
        type=Path,
        help="folder of a latent cache that was created with --keep-images",
    )
    add(
        "--encoder",
        required=True,
        help="name of an encoder, as for --repa-encoder of train.py",
    )
    add(
        "--encoder-weights",
        type=Path,
        help="file with the weights of the encoder, as for --encoder-weights of train.py (default: "
        "downloaded by timm)",
    )
    add(
        "--tokens-side",
        type=positive_int_or_auto,
        default="auto",
        help="height and width of the token grid; the features take 2 x side x side x width bytes "
        "per image; auto: half the height of the latents, the grid of a model with patch size 2",
    )
    add(
        "--side",
        type=cli.positive_int,
        help="input height and width of the encoder in pixels (default: REPA's rule, at least 224)",
    )
    add("--batch-size", type=cli.positive_int, default=64, help="images per forward pass")
    cli.add_device_flag(add, "device of the encoder")

    return parser.parse_args()


def resolve_tokens_side(root: Path, manifest: Manifest, tokens_side: int | None) -> int:
    """Return the height and width of the token grid for a value of --tokens-side (None: auto).

    Raises:
        UserError: Features of this size cannot be computed for this cache.
    """
    if not manifest.images:
        raise UserError(f"{root} was created without --keep-images; {KEEP_IMAGES_REMEDY}")
    if manifest.flips:
        raise UserError(
            f"{root} was created with --flip, and storing features of flipped images is not "
            "supported; train without stored features"
        )
    latent_side = manifest.latent_shape[1]
    if tokens_side is None and latent_side % 2:
        raise UserError(
            f"--tokens-side auto requires an even latent size, but it is {latent_side}; "
            "pass a number"
        )
    if tokens_side and tokens_side > manifest.resolution:
        raise UserError(
            f"--tokens-side {tokens_side} is larger than the images, which have "
            f"{manifest.resolution} pixels per side; pass a smaller number"
        )
    return tokens_side or latent_side // 2


def main() -> None:
    """Run the command."""
    # Importing timm takes a second, which would delay --help.
    from models.encoder import Encoder

    # Check the flags, and load the encoder.
    args = parse_args()
    if "," in args.encoder:
        raise UserError(
            f"--encoder {args.encoder}: pass one encoder, and run this command once per encoder"
        )
    manifest = read_manifest(args.cache)
    tokens_side = resolve_tokens_side(args.cache, manifest, args.tokens_side)
    world = World()
    device = world.select_device() if args.device == "cuda" else torch.device(args.device)
    try:
        encoder = Encoder(
            args.encoder,
            manifest.resolution,
            tokens_side,
            weights=args.encoder_weights,
            device=device,
            side=args.side,
        )
    except FieldError as error:
        flag = "--encoder-weights" if error.field == "weights" else "--encoder"
        raise UserError(f"{flag} {error.reason}") from None

    # Store the features.
    plan = {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "resolution": manifest.resolution,
        "side": encoder.side,
        "tokens_side": tokens_side,
        "width": encoder.width,
        "dtype": FEATURES_DTYPE.name,
        "count": manifest.count,
    }
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "-", encoder.name).strip(".-")
    slug = f"{safe_name}-{encoder.side}-{tokens_side}x{tokens_side}"
    dest = args.cache / "features" / slug
    if world.rank == 0:
        num_tokens = tokens_side**2
        num_values = manifest.count * num_tokens * encoder.width
        gigabytes = num_values * FEATURES_DTYPE.itemsize / 1e9
        logger.info(
            f"features/{slug}: {manifest.count:,} x {num_tokens} x {encoder.width} "
            f"{FEATURES_DTYPE}, {gigabytes:.2f} GB"
        )

    def encode(images: Tensor) -> Tensor:
        return encoder(images.to(device))

    has_encoded = build_features(args.cache, manifest, dest, plan, encode, args.batch_size, world)
    if world.rank == 0:
        print(f"{dest} is complete" if has_encoded else f"{dest} is already complete")
    world.close()


if __name__ == "__main__":
    cli.run(main)
