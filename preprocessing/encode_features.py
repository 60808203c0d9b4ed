"""Kept images -> features of a frozen image encoder, so that training need not compute them in every epoch.

    python -m preprocessing.encode_features data/imagenet256 --encoder vit_base_patch14_dinov2.lvd142m
    torchrun --nproc_per_node 8 -m preprocessing.encode_features data/imagenet256 ... (the same)

For --align repa where the encoder costs more than the training: small sets, small machines. Of ImageNet and DINOv2-B they are
504 GB (256 tokens x 768 x 2 bytes x 1.28 million): there the encoder runs while training, which is meant for that. Shards are
dealt to the processes; stopped, the same command goes on.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.processes import World
from latents.cache import KEEP_IMAGES_REMEDY
from latents.manifest import CacheError, Manifest, read_manifest
from models.errors import FieldError
from preprocessing.encoder_features import (
    FEATURES_DTYPE,
    build_features,
    features_nbytes,
    features_slug,
)


def tokens_side(text: str) -> int | None:
    """An argparse type: a number of at least 1, or auto."""
    return None if text == "auto" else cli.positive_int(text)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m preprocessing.encode_features", "CACHE --encoder NAME")

    add = parser.add_argument
    add(
        "cache",
        metavar="CACHE",
        type=Path,
        help="folder of a latent cache that was made with --keep-images",
    )
    add("--encoder", required=True, help="of timm's, as train.py's --repa-encoder")
    add("--encoder-weights", type=Path, help="file of its weights (default: timm fetches them)")
    add(
        "--tokens-side",
        type=tokens_side,
        default="auto",
        help="features are N = side x side tokens an image, 2 N x width "
        "bytes; auto: half the latents' side, the tokens of a network of patch 2",
    )
    add(
        "--side",
        type=cli.positive_int,
        help="pixels a side that the encoder sees (default: REPA's rule, never less than 224)",
    )
    add("--batch-size", type=cli.positive_int, default=64, help="images a forward pass")
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where it runs",
    )

    return parser.parse_args()


def check(root: Path, manifest: Manifest, side: int | None) -> int:
    """The tokens' side. Raises UserError where the cache has no features to be made of it."""
    if not manifest.images:
        raise UserError(
            f"{root} holds no images: it was made without --keep-images; {KEEP_IMAGES_REMEDY}"
        )
    if manifest.flips:
        raise UserError(
            f"{root} was made with --flip, and features of mirror images are not kept: train on its images without stored ones"
        )
    if side is None and manifest.latent_shape[1] % 2:
        raise UserError(
            f"--tokens-side auto: latents of side {manifest.latent_shape[1]} are not cut by patch 2; give a number"
        )
    if side and side > manifest.resolution:
        raise UserError(
            f"--tokens-side {side}: an image has only {manifest.resolution} pixels a side"
        )
    return side or manifest.latent_shape[1] // 2


def main() -> None:
    # Importing timm takes a second; invalid flags are reported without it.
    from models.encoder import Encoder

    args = parse_args()
    try:
        manifest = read_manifest(args.cache)
    except CacheError as error:
        raise UserError(str(error)) from None
    side, world = check(args.cache, manifest, args.tokens_side), World()
    device = world.select_device() if args.device == "cuda" else torch.device(args.device)
    try:
        encoder = Encoder(
            args.encoder,
            manifest.resolution,
            side,
            weights=args.encoder_weights,
            device=device,
            side=args.side,
        )
    except FieldError as error:
        flag = "--encoder-weights" if error.field == "weights" else "--encoder"
        raise UserError(f"{flag} {error.reason}") from None
    plan = {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "resolution": manifest.resolution,
        "side": encoder.side,
        "tokens_side": side,
        "width": encoder.width,
        "dtype": FEATURES_DTYPE.name,
        "count": manifest.count,
    }

    def encode(images: Tensor) -> Tensor:
        return encoder(images.to(device))

    slug = features_slug(encoder.name, encoder.side, side)
    if world.rank == 0:
        size = features_nbytes(manifest, side, encoder.width)
        print(
            f"features/{slug}: {manifest.count:,} x {side**2} x {encoder.width} {FEATURES_DTYPE}, {size / 1e9:.2f} GB",
            flush=True,
        )
    made = build_features(
        args.cache, manifest, args.cache / "features" / slug, plan, encode, args.batch_size, world
    )
    if world.rank == 0:
        print(f"{args.cache / 'features' / slug} is complete{'' if made else ' already'}")
    world.close()


if __name__ == "__main__":
    cli.run(main)
