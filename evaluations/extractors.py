"""What networks say of images: the features that every number of an evaluation is made of.

B images of a batch, n in all, F features an image, K classes.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import UserError
from common.processes import World
from evaluations.fashion import FASHION_RESOLUTION, load_classifier
from evaluations.image_batches import Images
from evaluations.inception import InceptionFeatures
from evaluations.timm_networks import TimmFeatures
from models.encoder import ENCODER_ALIASES

EXTRACTOR_NAMES = ("inception", "fashion", *ENCODER_ALIASES)


class Features(NamedTuple):
    """What a network says of n images; float32."""

    pool: np.ndarray  # (n, F)
    spatial: np.ndarray | None = None  # (n, 2023), Inception only
    scores: np.ndarray | None = None  # (n, K) class probabilities or logits, of classifiers


OUTPUTS = {
    1: ("pool",),
    2: ("pool", "scores"),
    3: ("pool", "spatial", "scores"),
}  # what a network's outputs are, by their number


def load_extractor(
    name: str,
    inception_weights: Path | None,
    size: tuple[int, int],
    device: torch.device | str,
    what: str,
    flag: str = "--features",
    encoder_weights: Path | None = None,
) -> nn.Module:
    """The network called `name`, for images of `size` (H, W); `what` names them. Raises UserError naming `flag`."""
    if name == "fashion":
        if size != (FASHION_RESOLUTION, FASHION_RESOLUTION):
            raise UserError(
                f"{flag} fashion needs {FASHION_RESOLUTION}x{FASHION_RESOLUTION} images, {what} holds {size[0]}x{size[1]}"
            )
        return load_classifier().to(device)
    if name == "inception":
        return InceptionFeatures(inception_weights).to(device)
    return TimmFeatures(name, encoder_weights, flag=flag).to(device)


def columns(rows: Iterable[tuple[np.ndarray, ...]], count: int) -> Features:
    """The outputs of each batch, in order -> the Features of the first `count` images."""
    arrays = [np.concatenate(column)[:count] for column in zip(*rows)]
    return Features(**dict(zip(OUTPUTS[len(arrays)], arrays)))


def collect_features(outputs: Iterable[tuple[Tensor, ...]], count: int) -> Features:
    """As `columns`, of tensors on any device."""
    return columns(([output.cpu().numpy() for output in batch] for batch in outputs), count)


def batches(
    images: Images, size: int, desc: str, world: World | None
) -> Iterator[tuple[int, np.ndarray]]:
    """The batches of this process, numbered: every processes-th. The next is read while one is used."""
    rank, processes = (world.rank, world.num_processes) if world else (0, 1)
    numbers = range(rank, -(-images.count // size), processes)
    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(total=images.count, unit="img", desc=desc, leave=False, disable=rank > 0) as bar,
    ):
        ahead = [reader.submit(images.read_batch, k * size, (k + 1) * size) for k in numbers[:1]]
        for i, k in enumerate(numbers):
            batch = ahead.pop().result()
            ahead = [
                reader.submit(images.read_batch, n * size, (n + 1) * size)
                for n in numbers[i + 1 : i + 2]
            ]
            yield k, batch
            bar.update(len(batch) * processes)


def extract_all(
    networks: dict[str, nn.Module],
    images: Images,
    size: int,
    desc: str,
    device: torch.device | str,
    world: World | None = None,
) -> dict[str, Features] | None:
    """All networks over one reading of the images, `size` at a time, on all processes -> Features by name on the first
    process, None on the others.
    """
    mine = {}
    for k, batch in batches(images, size, desc, world):
        pixels = torch.from_numpy(batch).to(device)
        mine[k] = {
            name: tuple(part.cpu().numpy() for part in network(pixels))
            for name, network in networks.items()
        }
    parts = world.gather(mine) if world else [mine]
    if parts is None:
        return None
    rows = dict(sorted(item for part in parts for item in part.items()))
    return {name: columns((row[name] for row in rows.values()), images.count) for name in networks}
