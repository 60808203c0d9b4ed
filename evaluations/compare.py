"""Features of samples against those of a reference: the numbers by the names they are known under."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from cli import UserError
from evaluations.features import Features, extract
from evaluations.metrics import NEIGHBOURS, Statistics, frechet_distance, inception_score, precision_recall, statistics
from preprocessing.images import read_or_name
from preprocessing.sources import ImageSource, open_source


class Reference(NamedTuple):
    """What samples are compared with. An ADM .npz may hold statistics, images or both; statistics win, as in ADM."""

    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None  # (n, F) for precision and recall; None where only statistics are known


def read_npz(path: Path, flag: str) -> dict[str, np.ndarray]:
    """Every array of an .npz. Raises UserError if it cannot be read, or if arr_0 is not images."""
    try:
        with np.load(path) as content:
            arrays = dict(content)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{flag} {path} cannot be read as .npz ({error})") from None
    images = arrays.get("arr_0")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise UserError(f"{flag} {path}: arr_0 must be uint8 of shape (n, H, W, 3), it is {images.dtype} {images.shape}")
    return arrays


def array_batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """(n, H, W, 3) -> batches (B, 3, H, W)."""
    for start in range(0, len(images), size):
        yield np.ascontiguousarray(images[start : start + size].transpose(0, 3, 1, 2))


def source_batches(source: ImageSource, side: int, size: int, flag: str) -> Iterator[np.ndarray]:
    """Images of a folder or zip, centre-cropped to `side` -> batches (B, 3, side, side)."""
    numbers = range(len(source))
    for start in numbers[::size]:
        yield np.stack([read_or_name(source, i, side, flag) for i in numbers[start : start + size]])


def load_reference(
    path: Path, features: str, network: nn.Module, side: int, batch_size: int, device: torch.device | str,
    flag: str = "--reference",
) -> Reference:  # fmt: skip
    """A reference, whatever it is, for samples of `side` pixels. Raises UserError naming `flag`."""
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist")
    arrays: dict[str, np.ndarray] = {}
    if path.suffix == ".npz":
        arrays = read_npz(path, flag)
        if "arr_0" not in arrays and "mu" not in arrays:
            raise UserError(f"{flag} {path} holds neither images (arr_0) nor statistics (mu, sigma)")
        if features == "fashion" and "arr_0" not in arrays:
            raise UserError(f"{flag} {path} holds Inception statistics; the fashion features need images")
    own = None
    if "arr_0" in arrays:
        images = arrays["arr_0"]
        own = extract(network, array_batches(images, batch_size), len(images), "reference", device)
    elif not arrays:
        source = open_source(path, flag)
        own = extract(network, source_batches(source, side, batch_size, flag), len(source), "reference", device)
    if own is not None and len(own.pool) <= NEIGHBOURS:
        raise UserError(f"{flag} {path} holds {len(own.pool)} images: there is nothing to compare with")

    def of(key: str, values: np.ndarray | None) -> Statistics | None:
        if features == "inception" and f"mu{key}" in arrays:
            return Statistics(arrays[f"mu{key}"].astype(np.float64), arrays[f"sigma{key}"].astype(np.float64))
        return None if values is None else statistics(values)

    own = own or Features(None, None, None)
    return Reference(of("", own.pool), of("_s", own.spatial), own.pool)


def compare(
    samples: Features, labels: np.ndarray | None, reference: Reference, features: str, device: torch.device | str
) -> dict[str, float | None]:
    """The numbers of one set of samples; None where the reference, or missing labels (n,), cannot give one."""
    distance = frechet_distance(statistics(samples.pool), reference.pool)
    precision, recall = (None, None)
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, samples.pool, device=device)
    if features == "fashion":
        agreement = None if labels is None else float((samples.scores.argmax(1) == labels).mean())
        return {"FD-fashion": distance, "class_agreement": agreement, "precision": precision, "recall": recall}
    spatial = None if reference.spatial is None else frechet_distance(statistics(samples.spatial), reference.spatial)
    score = inception_score(samples.scores)
    return {"FID": distance, "sFID": spatial, "inception_score": score, "precision": precision, "recall": recall}
