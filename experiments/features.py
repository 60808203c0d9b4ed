"""Measure the representations of the blocks of checkpoints at each noise level.

    python -m experiments.features --ckpt exps/demo --data-dir data/fashion-mnist --out features.png

The figure contains PCA maps of the tokens, the accuracy of linear probes, and CKNNA. A JSON file
next to it contains all numbers. The measures are defined in experiments/feature_study.py.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

from checkpointing import pretrained
from checkpointing.official import ORIGINS
from checkpointing.pretrained import PretrainedModel
from checkpointing.storage import CheckpointError
from common import cli
from common.cli import UserError
from common.files import write_file
from common.logs import get_logger
from common.progress import ProgressBar
from evaluations.extractors import load_extractor
from evaluations.fashion import FASHION_RESOLUTION
from experiments.cells import open_cache
from experiments.feature_figure import ColourMaps, draw_figure
from experiments.feature_study import (
    MAX_BLOCKS,
    StudyImages,
    choose_figure_images,
    draw_images,
    evaluate_features,
    evaluate_inputs,
    make_colour_maps,
    pool_tokens,
    spread_blocks,
)
from experiments.representation import NEIGHBOURS, Neighbours, find_neighbours
from interpolant import INTERPOLANTS
from latents.cache import LatentCache
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.sit import PRESETS

logger = get_logger(__name__)

# Each half must contain an image, its neighbours, and at least one image that is not a neighbour.
MIN_IMAGES = 2 * NEIGHBOURS + 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: If a flag is invalid.
    """
    parser = cli.Parser(
        __doc__, "python -m experiments.features", "--ckpt PATH [PATH ...] --data-dir PATH"
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--ckpt",
        type=Path,
        nargs="+",
        required=True,
        help="checkpoints, in the formats that sample_ddp.py accepts",
    )
    add(
        "--ema-decay",
        type=cli.decay,
        help="decay of the EMA to load, for runs with several EMAs (default: the first EMA)",
    )
    add(
        "--model",
        choices=PRESETS,
        metavar="NAME",
        help="architecture of .pt files, such as SiT-XL/2",
    )
    add(
        "--origin",
        choices=ORIGINS,
        help="repository of .pt files, if it cannot be inferred from the file",
    )
    add(
        "--path-type",
        choices=sorted(INTERPOLANTS),
        help="interpolant that .pt files were trained with, if it cannot be inferred from the file",
    )
    add(
        "--blocks",
        type=cli.positive_int,
        nargs="+",
        metavar="K",
        help=f"blocks, counted from 1 (default: all, or {MAX_BLOCKS} evenly spaced blocks)",
    )
    add(
        "--times",
        type=float,
        nargs="+",
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        metavar="T",
        help="noise levels in (0, 1]",
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--data-dir",
        type=Path,
        nargs="+",
        required=True,
        help="latent cache; several caches are concatenated",
    )
    add("--vae", help="hub id or folder of the decoder (default: the VAE of the cache)")
    add(
        "--images",
        type=cli.positive_int,
        default=4,
        help="number of images in the figure, of different classes if possible",
    )
    add(
        "--probe-images",
        type=cli.positive_int,
        default=5000,
        help="number of images to measure; half of them train the probe, the others are held out",
    )
    add(
        "--reference-features",
        default="auto",
        metavar="NAME",
        help="network whose features are the reference of CKNNA: fashion (the bundled "
        "classifier), inception, dinov2-l, any timm network, or none; "
        f"auto: fashion for images of {FASHION_RESOLUTION} pixels, otherwise none",
    )
    add(
        "--encoder-weights",
        type=Path,
        help="weights of a timm network (default: downloaded from the hub)",
    )
    add(
        "--inception-weights",
        type=Path,
        help="weights of Inception, in the formats that evaluations.evaluate accepts",
    )
    add("--seed", type=cli.seed, default=0, help="seed of the image selection and of the noise")

    add = parser.add_argument_group("computation and output").add_argument
    add("--batch-size", type=cli.positive_int, default=128, help="images per forward pass")
    cli.add_device_flag(add, "device of all computations")
    add(
        "--out",
        type=Path,
        default=Path("exps/features.png"),
        help="figure to write, with a .json file next to it",
    )

    args = parser.parse_args(argv)
    args.times = sorted(set(args.times))
    args.blocks = sorted(set(args.blocks or []))
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    for t in args.times:
        if not 0 < t <= 1:
            raise UserError(f"--times {t:g} is outside (0, 1], where 0 is data and 1 is noise")
    if args.probe_images < MIN_IMAGES:
        raise UserError(
            f"--probe-images {args.probe_images} is too few for the {NEIGHBOURS} neighbours of "
            f"CKNNA; pass at least {MIN_IMAGES}"
        )
    if args.images > args.probe_images // 2:
        raise UserError(
            f"--images {args.images} is more than the held-out half of --probe-images "
            f"{args.probe_images}; reduce --images"
        )
    return args


def load_checkpoints(
    paths: list[Path], ema_decay: float | None, official_flags: dict[str, str | None]
) -> list[PretrainedModel]:
    """Load checkpoints, and pass to each of them only the flags that apply to it.

    Args:
        paths: Checkpoints of this project and official .pt files.
        ema_decay: Decay of the EMA to load from checkpoints of this project, or None.
        official_flags: Keyword arguments of `pretrained.load` for official files.

    Raises:
        UserError: If a checkpoint cannot be loaded, or if a flag applies to no checkpoint.
    """
    official = [path.is_file() and path.suffix != ".safetensors" for path in paths]
    sources = []
    for path, is_official in zip(paths, official):
        # Pass a flag that applies to no checkpoint to all of them, so that `load` rejects it.
        flags = official_flags if is_official or not any(official) else {}
        decay = ema_decay if not is_official or all(official) else None
        try:
            sources.append(pretrained.load(path, decay, **flags))
        except CheckpointError as error:
            raise UserError(f"--ckpt: {error}") from None
        if not sources[-1].trained_labels.has_null_class:
            logger.warning(
                "--ckpt %s was trained without label dropout, so its null class is untrained", path
            )
    return sources


def load_cache(folders: list[Path], min_images: int) -> LatentCache:
    """Open the cache. Raise UserError if it is damaged or contains too few images."""
    cache = open_cache(*folders)
    if len(cache) < min_images:
        raise UserError(
            f"--probe-images {min_images} is more than the {len(cache)} images of --data-dir; "
            "reduce --probe-images"
        )
    return cache


def check_checkpoint(source: PretrainedModel, cache: LatentCache, blocks: list[int]) -> None:
    """Raise UserError if a checkpoint does not match the latents or lacks a requested block."""
    checkpoint = f"--ckpt {source.identity['checkpoint']}"
    config = source.model.config
    manifest = cache.manifest
    model_shape = f"{config.channels}x{config.latent_size}x{config.latent_size}"
    cache_shape = "x".join(map(str, manifest.latent_shape))
    if model_shape != cache_shape:
        raise UserError(
            f"{checkpoint} needs latents of shape {model_shape}, but the latents of --data-dir "
            f"have shape {cache_shape}; pass another --data-dir"
        )
    if source.vae_fingerprint not in (None, manifest.vae_fingerprint):
        raise UserError(
            f"{checkpoint} was trained on latents of a different VAE ({source.vae}) from that of "
            f"--data-dir ({manifest.vae}); pass a --data-dir that was encoded with its VAE"
        )
    if blocks and blocks[-1] > config.depth:
        raise UserError(f"--blocks {blocks[-1]}: {checkpoint} has only {config.depth} blocks")


def load_vae(name: str, fingerprint: str, device: str) -> Autoencoder:
    """Load the decoder. Raise UserError if its VAE does not have this fingerprint."""
    try:
        vae = Autoencoder(name, device)
    except FieldError as error:
        raise UserError(f"--vae {error.reason}") from None
    if vae.fingerprint() != fingerprint:
        raise UserError(
            f"--vae {name} is not the VAE of --data-dir (the weights differ); pass the VAE of the "
            "cache"
        )
    return vae


@torch.no_grad()
def measure_reference(
    args: argparse.Namespace, images: StudyImages, vae: Autoencoder, resolution: int
) -> tuple[Neighbours | None, dict | None]:
    """Find the neighbours of the held-out images in the reference space of CKNNA.

    Args:
        args: The flags, which select the reference network.
        images: The images.
        vae: The decoder of the held-out images.
        resolution: Height and width of the images in pixels.

    Returns:
        The neighbours and the description of the features, or (None, None) without a network.
    """
    name = args.reference_features
    if name == "auto":
        name = "fashion" if resolution == FASHION_RESOLUTION else "none"
    if name == "none":
        return None, None
    network = load_extractor(
        name,
        args.inception_weights,
        (resolution, resolution),
        args.device,
        "--data-dir",
        "--reference-features",
        args.encoder_weights,
    )
    latents = images.latents[images.half :].split(args.batch_size)
    features = torch.cat(
        [
            network(vae.decode(batch.to(args.device))).pool.float()
            for batch in ProgressBar(latents, unit="batch", desc="reference features", leave=False)
        ]
    )
    description = {
        "k": NEIGHBOURS,
        "images": len(features),
        "features": name,
        "weights_sha256": network.weights_sha256,
        "width": features.shape[1],
    }
    return find_neighbours(features), description


def measure(args: argparse.Namespace) -> tuple[dict, list[ColourMaps], list[str]]:
    """Measure all checkpoints.

    Returns:
        The content of the JSON file, the colour maps of each checkpoint, and the class names of the
        images in the figure.

    Raises:
        UserError: If the flags, the checkpoints and the cache do not match.
    """
    # Load the inputs.
    official_flags = {name: getattr(args, name) for name in ("model", "origin", "path_type")}
    sources = load_checkpoints(args.ckpt, args.ema_decay, official_flags)
    cache = load_cache(args.data_dir, args.probe_images)
    for source in sources:
        check_checkpoint(source, cache, args.blocks)
    manifest = cache.manifest
    vae = load_vae(args.vae or manifest.vae, manifest.vae_fingerprint, args.device)
    images = draw_images(cache, args.probe_images, args.seed)
    figure_images = choose_figure_images(images, args.images)
    labels = images.labels[images.half :]
    reference, cknna_settings = measure_reference(args, images, vae, manifest.resolution)

    def evaluate(features: Tensor) -> dict:
        return evaluate_features(features.to(args.device), images, manifest.num_classes, reference)

    # Measure the inputs, and the blocks of each checkpoint.
    path_types = sorted({source.path_type for source in sources})
    num_forwards = len(sources) * len(args.times) * len(images.labels)
    checkpoints = []
    maps = []
    with ProgressBar(total=num_forwards, unit="img", desc="features") as bar:
        bar.set_postfix_str("probes of x_t")
        inputs = list(evaluate_inputs(images, path_types, args.times, evaluate))
        for source in sources:
            model = source.model.to(args.device)
            blocks = args.blocks or spread_blocks(model.config.depth)
            checkpoint_maps, share = make_colour_maps(
                model, images, figure_images, source.path_type, args.times, blocks, vae
            )
            maps.append(checkpoint_maps)
            results = []
            for t in args.times:
                x_t = images.add_noise(source.path_type, t)
                pooled = pool_tokens(model, x_t, t, blocks, args.batch_size, bar)
                results += [
                    {"t": t, "block": block, **evaluate(features), "pca_share": share[t, block]}
                    for block, features in pooled.items()
                ]
            model.cpu()
            checkpoints.append(
                {
                    "name": source.name,
                    **source.identity,
                    "path_type": source.path_type,
                    "blocks": blocks,
                    "results": results,
                }
            )

    device_name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    result = {
        "command": f"python -m experiments.features {shlex.join(sys.argv[1:])}",
        "seed": args.seed,
        "data": {
            "source": manifest.source,
            "vae": manifest.vae,
            "vae_fingerprint": manifest.vae_fingerprint,
            "images": len(cache),
            "classes": manifest.num_classes,
            "probe_trained_on": images.half,
            "held_out": len(labels),
            "shown": images.image_index[figure_images].tolist(),
            "latent": "mean of the posterior",
        },
        "label": "null class",
        "tokens": "averaged over the grid",
        "times": args.times,
        "chance": labels.bincount().max().item() / len(labels),
        "cknna": cknna_settings,
        "baselines": inputs,
        "checkpoints": checkpoints,
        "machine": {"device": device_name, "torch": torch.__version__},
    }
    return result, maps, [manifest.class_names[label] for label in images.labels[figure_images]]


def main() -> None:
    """Run the command line."""
    args = parse_args()
    result, maps, classes = measure(args)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_file(args.out.with_suffix(".json"), text.encode())
    draw_figure(result, maps, classes, args.out)
    print(f"features: {args.out}")


if __name__ == "__main__":
    cli.run(main)
