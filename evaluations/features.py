"""What a network says of images: the features that every number of an evaluation is made of.

B images of a batch, n in all, F features an image, K classes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli import UserError
from evaluations.fashion import RESOLUTION, load_classifier
from evaluations.inception import InceptionFeatures

EXTRACTORS = ("inception", "fashion")


class Features(NamedTuple):
    """What a network says of n images."""

    pool: np.ndarray  # (n, F)
    spatial: np.ndarray | None  # (n, 2023), Inception only
    scores: np.ndarray  # (n, K) class probabilities or logits


def load_extractor(
    name: str,
    inception_weights: Path | None,
    size: tuple[int, int],
    device: torch.device | str,
    what: str,
    flag: str = "--features",
) -> nn.Module:
    """The network called `name`, for images of `size` (H, W); `what` names them. Raises UserError naming `flag`."""
    if name == "fashion" and size != (RESOLUTION, RESOLUTION):
        raise UserError(f"{flag} fashion needs {RESOLUTION}x{RESOLUTION} images, {what} holds {size[0]}x{size[1]}")
    return (load_classifier() if name == "fashion" else InceptionFeatures(inception_weights)).to(device)


def gather(outputs: Iterable[tuple[Tensor, ...]], count: int) -> Features:
    """What the network gave for each batch -> the Features of the first `count` images."""
    rows = [[output.cpu().numpy() for output in batch] for batch in outputs]
    pool, *spatial, scores = (np.concatenate(column)[:count] for column in zip(*rows))
    return Features(pool, spatial[0] if spatial else None, scores)


def extract(network: nn.Module, batches: Iterator[np.ndarray], count: int, desc: str, device: torch.device | str) -> Features:
    """Batches (B, 3, H, W) uint8 through the network."""

    def outputs() -> Iterator[tuple[Tensor, ...]]:
        with tqdm(total=count, unit="img", desc=desc, leave=False) as bar:
            for batch in batches:
                yield network(torch.from_numpy(batch).to(device))
                bar.update(len(batch))

    return gather(outputs(), count)
