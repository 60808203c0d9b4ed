"""Load feature networks by name, and run them over images.

Shapes: B images per batch, n images in total.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.ordered_map import map_in_order
from common.processes import World
from common.progress import ProgressBar
from evaluations.fashion import FASHION_RESOLUTION, load_classifier
from evaluations.features import FeatureNetwork, Features, NumpyFeatures, to_numpy
from evaluations.image_batches import Images
from evaluations.inception import InceptionFeatures
from evaluations.metrics import Device
from evaluations.timm_networks import NON_TIMM_NETWORKS, TimmFeatures
from models.weights import ENCODER_ALIASES

EXTRACTOR_NAMES = (*NON_TIMM_NETWORKS, *ENCODER_ALIASES)


def add_network_flags(parser: Any) -> None:
    """Add the flags of commands that run feature networks to a parser or an argument group."""
    parser.add_argument(
        "--inception-weights",
        type=Path,
        help="file with the Inception weights (default: in the torch hub cache)",
    )
    parser.add_argument(
        "--batch-size", type=cli.positive_int, default=64, help="images per forward pass"
    )


def load_extractor(
    name: str,
    inception_weights: Path | None,
    size: tuple[int, int],
    device: Device,
    source: str,
    flag: str = "--features",
    encoder_weights: Path | None = None,
) -> FeatureNetwork:
    """Return a feature network on `device`.

    Args:
        name: "inception", "fashion", a short name of models/weights.py or a timm name.
        inception_weights: File with the Inception weights. By default, the file in the torch hub
            cache.
        size: Height and width of the images to evaluate.
        device: Device of the network.
        source: Origin of the images, for error messages.
        flag: Flag that selected the network, for error messages.
        encoder_weights: File with the weights of a timm network. By default, the weights are
            downloaded from the hub.

    Raises:
        UserError: If the network does not exist, its weights are missing, or it does not accept
            images of this size.
    """
    if name == "fashion":
        if size != (FASHION_RESOLUTION, FASHION_RESOLUTION):
            raise UserError(
                f"{flag} fashion needs {FASHION_RESOLUTION}x{FASHION_RESOLUTION} images, "
                f"found {size[0]}x{size[1]} in {source}"
            )
        return load_classifier().to(device)
    if name == "inception":
        return InceptionFeatures(inception_weights).to(device)
    return TimmFeatures(name, encoder_weights, flag).to(device)


def concatenate_features(batches: Iterable[NumpyFeatures], count: int) -> NumpyFeatures:
    """Return the features of the first `count` images of consecutive batches."""
    outputs = [batch.as_dict() for batch in batches]
    return Features(
        **{
            name: np.concatenate([output[name] for output in outputs])[:count]
            for name in outputs[0]
        }
    )


def collect_features(batches: Iterable[Features[Tensor]], count: int) -> NumpyFeatures:
    """Return the features of the first `count` images of consecutive batches as NumPy arrays."""
    return concatenate_features((batch.map(to_numpy) for batch in batches), count)


def iterate_batches(
    images: Images, batch_size: int, description: str, world: World | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield this process's batches with their indices, reading the next batch in the background.

    Process r of P reads batches r, r + P, r + 2P, and so on.

    Args:
        images: The images to read.
        batch_size: Images per batch.
        description: Label of the progress bar.
        world: Processes that share the images. By default, this process reads all of them.

    Yields:
        The index of a batch and its images, (B, 3, H, W) uint8.

    Raises:
        UserError: If the images cannot be read or are damaged.
    """
    if world:
        world.run_on_first_rank(images.verify)
    else:
        images.verify()
    rank = world.rank if world else 0
    num_processes = world.num_processes if world else 1
    num_batches = -(-images.count // batch_size)
    batch_indices = range(rank, num_batches, num_processes)

    def read_batch(index: int) -> np.ndarray:
        return images.read_batch(index * batch_size, (index + 1) * batch_size)

    with (
        ThreadPoolExecutor(1) as reader,
        ProgressBar(
            total=images.count, unit="img", desc=description, leave=False, disable=rank > 0
        ) as progress,
    ):
        # Read the next batch in the background while the caller processes a batch.
        batches = map_in_order(reader, read_batch, batch_indices, max_pending=1)
        for index, batch in zip(batch_indices, batches):
            yield index, batch
            progress.update(len(batch) * num_processes)


def extract_features(
    networks: Mapping[str, FeatureNetwork],
    images: Images,
    batch_size: int,
    description: str,
    device: Device,
    world: World | None = None,
) -> dict[str, NumpyFeatures]:
    """Run all networks in one pass over the images, on all processes together.

    Args:
        networks: Feature networks by name.
        images: The images to read.
        batch_size: Images per forward pass.
        description: Label of the progress bar.
        device: Device of the networks.
        world: Processes that share the work. By default, this process does all of it.

    Returns:
        On the first process, the features of all images by the name of the network; on the others,
        {}.
    """
    local_batches = {}
    for index, batch in iterate_batches(images, batch_size, description, world):
        pixels = torch.from_numpy(batch).to(device)
        local_batches[index] = {
            name: network(pixels).map(to_numpy) for name, network in networks.items()
        }
    gathered = world.gather(local_batches) if world else [local_batches]
    if gathered is None:
        return {}
    batches = {index: batch for share in gathered for index, batch in share.items()}
    ordered = [batches[index] for index in sorted(batches)]
    return {
        name: concatenate_features((batch[name] for batch in ordered), images.count)
        for name in networks
    }
