"""A shard on its way to the disk: its arrays, its entry in the manifest, and whether what lies there is the same.

n images of a shard, C latent channels, h w latent side, S image side.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from common.files import NpyWriter, write_array

IMAGES_PER_CHUNK = 256  # images whose sums are taken at once, in float64
ALIKE = 0.05  # of the moments' own spread: what two machines, or batch sizes, may make of one image, and no two images


class Shard(NamedTuple):
    """What is kept of a stretch of images."""

    arrays: dict[
        str, np.ndarray
    ]  # moments and, with flips, mirrored: (n, 2C, h, w); labels: (n,) int64
    skipped: list[dict]  # {file, reason} of each image that cannot be used
    kinds: Counter  # of images met
    images: NpyWriter | None = (
        None  # (n, 3, S, S) uint8, if they are kept: on the disk already, but for the name
    )


def shard_file_name(number: int) -> str:
    """The name of a shard's files."""
    return f"{number:05d}.npy"


def channel_sums(arrays: list[np.ndarray]) -> dict[str, list[float]]:
    """Of z ~ posterior and of z^2, per channel, over moments (n, 2C, h, w): E[z^2] = mean^2 + std^2."""
    total, square = 0.0, 0.0
    for array in arrays:
        for start in range(0, len(array), IMAGES_PER_CHUNK):
            mean, std = np.split(
                array[start : start + IMAGES_PER_CHUNK].astype(np.float64), 2, axis=1
            )
            total = total + mean.sum((0, 2, 3))
            square = square + (mean**2 + std**2).sum((0, 2, 3))
    return {"sum": total.tolist(), "sum_of_squares": square.tolist()}


def write_shard(dest: Path, number: int, shard: Shard) -> dict:
    """Writes one whole; returns its entry for the manifest. Raises UserError for values that its dtype cannot hold."""
    file, count = shard_file_name(number), len(shard.arrays["labels"])
    entry = {
        "file": file,
        "count": count,
        "sha256": {},
        "skipped": shard.skipped,
        "kinds": dict(sorted(shard.kinds.items())),
    }
    if count:
        moments = [array for name, array in shard.arrays.items() if name != "labels"]
        if not all(np.isfinite(array).all() for array in moments):
            raise UserError(
                f"shard {file} holds values that {moments[0].dtype} cannot: is it the right VAE for these images? "
                "(--dtype float32 holds larger ones)"
            )
        entry |= channel_sums(moments)
        for name, array in shard.arrays.items():
            entry["sha256"][name] = write_array(dest / name / file, array)
    if shard.images:
        entry["sha256"] |= _named(shard.images, count)
    return entry


def _named(images: NpyWriter, count: int) -> dict[str, str]:
    assert images.num_rows == count, (images.path, images.num_rows, count)
    if count:
        return {"images": images.finish()}
    images.discard()
    return {}


def add_images(dest: Path, entry: dict, shard: Shard) -> dict:
    """Writes the images of a shard that is whole but for them; returns its new entry. `shard` holds its labels and the first of
    its moments, made again. Raises UserError if they are not what is there: the images would be others, too.
    """
    same = shard.skipped == entry["skipped"]
    for name, array in shard.arrays.items():
        stored = np.load(dest / name / entry["file"], mmap_mode="r")
        if name == "labels":
            same = same and np.array_equal(stored, array)
        elif same and len(array):
            stored = stored[: len(array)].astype(np.float32)
            same = np.abs(stored - array).mean() <= ALIKE * stored.std()
    if not same:
        raise UserError(
            f"{dest}: what the source holds now is not what shard {entry['file']} was made of: encode it anew, with "
            "--keep-images, into another folder"
        )
    return entry | {"sha256": entry["sha256"] | _named(shard.images, entry["count"])}


def channel_statistics(
    entries: list[dict], latent_shape: list[int], flips: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std per channel, (C,) each, of all shards, by their sums."""
    values = (
        sum(entry["count"] for entry in entries) * latent_shape[1] * latent_shape[2] * (1 + flips)
    )
    mean = np.sum([entry["sum"] for entry in entries], 0) / values
    return mean, np.sqrt(
        np.sum([entry["sum_of_squares"] for entry in entries], 0) / values - mean**2
    )
