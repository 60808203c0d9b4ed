"""What the blocks of checkpoints hold at each noise level: PCA maps of their tokens, linear-probe accuracy, CKNNA.

    python -m experiments.features --ckpt exps/demo --data-dir data/fashion-mnist --out features.png

Writes the picture and, beside it, every number as JSON. experiments/feature_study.py says what is measured, and of what.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpointing import pretrained
from checkpointing.official import ORIGINS
from checkpointing.storage import CheckpointError
from common import cli
from common.cli import UserError
from common.files import write_file
from evaluations.extractors import load_extractor
from evaluations.fashion import FASHION_RESOLUTION
from experiments.feature_picture import Maps, draw
from experiments.feature_study import (
    MOST_BLOCKS,
    Data,
    baselines,
    choose,
    judge,
    maps,
    pooled,
    read,
    spread,
)
from experiments.representation import NEIGHBOURS, Neighbours, neighbours
from interpolant import INTERPOLANTS
from latents.cache import CacheError, LatentCache
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.sit import PRESETS

FEWEST = (
    2 * NEIGHBOURS + 4
)  # images: half of them must hold an image, its neighbours and one that is none
OFFICIAL = ("model", "origin", "path_type")  # what an official .pt does not say


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        __doc__, "python -m experiments.features", "--ckpt PATH [PATH ...] --data-dir PATH"
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--ckpt",
        type=Path,
        nargs="+",
        required=True,
        help="one or several, each as sample_ddp.py takes it",
    )
    add(
        "--ema-decay",
        type=cli.decay,
        help="which average, of runs that keep several (default: their first)",
    )
    add(
        "--model",
        choices=PRESETS,
        metavar="NAME",
        help="of .pt files alone: their architecture, like SiT-XL/2",
    )
    add(
        "--origin",
        choices=ORIGINS,
        help="of .pt files that do not tell: the repository they are from",
    )
    add(
        "--path-type",
        choices=sorted(INTERPOLANTS),
        help="of .pt files that do not tell: the path they were trained on",
    )
    add(
        "--blocks",
        type=cli.positive_int,
        nargs="+",
        metavar="K",
        help=f"counted from 1 (default: all, or {MOST_BLOCKS} evenly spread)",
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
        "--data-dir", type=Path, nargs="+", required=True, help="latent cache; several count as one"
    )
    add("--vae", help="hub id or folder of the decoder (default: the one that made the cache)")
    add(
        "--images",
        type=cli.positive_int,
        default=4,
        help="shown, of different classes as far as there are any",
    )
    add(
        "--probe-images",
        type=cli.positive_int,
        default=5000,
        help="one half trains the probe, the other is measured",
    )
    add(
        "--reference-features",
        default="auto",
        metavar="NAME",
        help="what CKNNA compares with: fashion (the shipped classifier), inception, dinov2-l, any timm network, or none; "
        f"auto: fashion for images of {FASHION_RESOLUTION} pixels, else none",
    )
    add(
        "--encoder-weights",
        type=Path,
        help="file of a timm network's weights (default: from the hub)",
    )
    add(
        "--inception-weights",
        type=Path,
        help="file of Inception's weights, as evaluations.evaluate takes it",
    )
    add("--seed", type=cli.seed, default=0, help="decides which images, and their noise")

    add = parser.add_argument_group("work and files").add_argument
    add("--batch-size", type=cli.positive_int, default=128, help="images at once")
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where it runs",
    )
    add(
        "--out",
        type=Path,
        default=Path("exps/features.png"),
        help="picture to write; the numbers go beside it as .json",
    )

    args = parser.parse_args(argv)
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    for t in args.times:
        if not 0 < t <= 1:
            raise UserError(f"--times {t:g} is outside (0, 1]: 0 is data, 1 is noise")
    if args.probe_images < FEWEST:
        raise UserError(
            f"--probe-images {args.probe_images} is too few: the {NEIGHBOURS} neighbours of CKNNA take {FEWEST}"
        )
    if args.images > args.probe_images // 2:
        raise UserError(
            f"--images {args.images} is more than the half of --probe-images {args.probe_images} that is measured"
        )
    args.times, args.blocks = sorted(set(args.times)), sorted(set(args.blocks or []))
    return args


def load_checkpoints(args: argparse.Namespace) -> list[pretrained.PretrainedModel]:
    """Each with the flags that are for its kind of file; a flag that is for none of them is refused as elsewhere."""
    found = []
    official = [path.is_file() and path.suffix != ".safetensors" for path in args.ckpt]
    for path, is_official in zip(args.ckpt, official):
        flags = {name: getattr(args, name) for name in OFFICIAL if is_official or not any(official)}
        decay = args.ema_decay if not is_official or all(official) else None
        try:
            found.append(pretrained.load(path, decay, **flags))
        except CheckpointError as error:
            raise UserError(f"--ckpt: {error}") from None
        if not is_official and cfg_prob(path) == 0:
            print(
                f"--ckpt {path} was trained without label dropout: its null class is as it was initialised",
                file=sys.stderr,
            )
    return found


def cfg_prob(path: Path) -> float | None:
    """The share of labels dropped while a checkpoint of ours was trained; None: not recorded."""
    return pretrained.read_own_config(pretrained.resolve_checkpoint(path))[1].get("cfg_prob")


def load_cache(roots: list[Path], wanted: int) -> LatentCache:
    try:
        cache = LatentCache(*roots)
    except CacheError as error:
        raise UserError(f"--data-dir: {error}") from None
    if len(cache) < wanted:
        raise UserError(
            f"--probe-images {wanted} is more than the {len(cache)} images of --data-dir: ask for fewer"
        )
    return cache


def check(source: pretrained.PretrainedModel, cache: LatentCache, blocks: list[int]) -> None:
    """Raises UserError where a checkpoint is not of these latents, or has not got these blocks."""
    what, config, manifest = (
        f"--ckpt {source.identity['checkpoint']}",
        source.model.config,
        cache.manifest,
    )
    ours, theirs = (
        (config.channels, config.latent_size, config.latent_size),
        tuple(manifest.latent_shape),
    )
    if ours != theirs:
        raise UserError(
            f"{what} is for latents {'x'.join(map(str, ours))}, --data-dir holds {'x'.join(map(str, theirs))}"
        )
    if source.vae_fingerprint not in (None, manifest.vae_fingerprint):
        raise UserError(
            f"{what} was trained on latents of another VAE ({source.vae}) than --data-dir holds ({manifest.vae}): name the "
            "data that it was trained on, or other images encoded with its VAE"
        )
    if blocks and blocks[-1] > config.depth:
        raise UserError(f"--blocks {blocks[-1]}: {what} has {config.depth}")


def load_vae(name: str, fingerprint: str, device: str) -> Autoencoder:
    try:
        vae = Autoencoder(name, device)
    except FieldError as error:
        raise UserError(f"--vae {error.reason}") from None
    if vae.fingerprint() != fingerprint:
        raise UserError(
            f"--vae {name} is not the VAE that made --data-dir: its weights differ, so would the images"
        )
    return vae


@torch.no_grad()
def reference(
    name: str, args: argparse.Namespace, data: Data, vae: Autoencoder, side: int
) -> tuple[Neighbours, dict]:
    """The neighbours of the held-out images, as the VAE decodes them, in a network's features, and what the network is."""
    network = load_extractor(
        name,
        args.inception_weights,
        (side, side),
        args.device,
        "--data-dir",
        "--reference-features",
        args.encoder_weights,
    )
    held, features = data.latents[data.half :], []
    for part in tqdm(held.split(args.batch_size), unit="batch", desc=name, leave=False):
        features.append(network(vae.decode(part.to(args.device))).pool.float())
    features = torch.cat(features)
    return neighbours(features), {
        "features": name,
        "weights_sha256": network.weights_sha256,
        "width": features.shape[1],
    }


def measure(args: argparse.Namespace) -> tuple[dict, list[Maps], list[str]]:
    """Everything: the numbers, the maps of each checkpoint, and the classes of the images shown."""
    sources = load_checkpoints(args)
    cache = load_cache(args.data_dir, args.probe_images)
    for source in sources:
        check(source, cache, args.blocks)
    manifest = cache.manifest
    vae = load_vae(args.vae or manifest.vae, manifest.vae_fingerprint, args.device)
    data = read(cache, args.probe_images, args.seed)
    rows = choose(data, args.images)
    name = args.reference_features
    if name == "auto":
        name = "fashion" if manifest.resolution == FASHION_RESOLUTION else "none"
    to, of = (
        (None, None) if name == "none" else reference(name, args, data, vae, manifest.resolution)
    )

    def judged(space: Tensor) -> dict:
        return judge(space.to(args.device), data, manifest.num_classes, to)

    paths = sorted({source.path_type for source in sources})
    before, checkpoints, pictures = [], [], []
    with tqdm(
        total=len(sources) * len(args.times) * len(data.index), unit="img", desc="features"
    ) as bar:
        bar.set_postfix_str("probes of x_t")
        before.extend(baselines(data, paths, args.times, judged))
        for source in sources:
            model, blocks = (
                source.model.to(args.device),
                args.blocks or spread(source.model.config.depth),
            )
            shown, share = maps(model, data, source.path_type, rows, blocks, args.times, vae)
            pictures.append(shown)
            results = []
            for t in args.times:
                spaces = pooled(model, data, source.path_type, t, blocks, args.batch_size, bar)
                results += [
                    {"t": t, "block": k, **judged(space), "pca_share": share[t, k]}
                    for k, space in spaces.items()
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
    labels = data.labels[data.half :]
    figures = {
        "command": f"python -m experiments.features {shlex.join(sys.argv[1:])}",
        "seed": args.seed,
        "data": {
            "source": manifest.source,
            "vae": manifest.vae,
            "vae_fingerprint": manifest.vae_fingerprint,
            "images": len(cache),
            "classes": manifest.num_classes,
            "probe_trained_on": data.half,
            "held_out": len(labels),
            "shown": data.index[rows].tolist(),
            "latent": "mean of the posterior",
        },
        "label": "null class",
        "tokens": "averaged over the grid",
        "times": args.times,
        "chance": labels.bincount().max().item() / len(labels),
        "cknna": of and {"k": NEIGHBOURS, "images": len(labels), **of},
        "baselines": before,
        "checkpoints": checkpoints,
        "machine": {
            "device": torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu",
            "torch": torch.__version__,
        },
    }
    return figures, pictures, [manifest.class_names[k] for k in data.labels[rows]]


def main() -> None:
    args = parse_args()
    figures, pictures, classes = measure(args)
    write_file(
        args.out.with_suffix(".json"),
        json.dumps(figures, indent=1, allow_nan=False).encode() + b"\n",
    )
    draw(figures, pictures, classes, args.out)
    print(f"features: {args.out}")


if __name__ == "__main__":
    cli.run(main)
