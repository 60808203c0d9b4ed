"""Write a shard to disk, compute its manifest entry, and compare it with an existing shard.

Shapes: n images per shard, C latent channels, h x w latent size, S image side.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cli import UserError
from common.files import NpyWriter, write_array
from common.npy_file import NpyFile
from latents.manifest import format_repair_remedy
from latents.shard_reader import ShardReader

IMAGES_PER_CHUNK = 256  # number of images that are converted to float64 at a time
# Largest accepted mean difference between new and stored moments, as a fraction of the standard
# deviation of the stored moments. Another machine or batch size causes smaller differences, and
# other images cause larger ones.
MAX_RELATIVE_DIFFERENCE = 0.05
ShardEntry = dict[str, Any]  # entry of a shard in manifest.json


class Shard(NamedTuple):
    """The data of consecutive images.

    Attributes:
        file: Name of the shard's files.
        arrays: Arrays by folder: moments and, with flips, mirrored, (n, 2C, h, w) each; labels,
            (n,) int64.
        skipped: {file, shard, reason} of each image that cannot be used.
        kinds: Number of images of each kind.
        images: Writer of the temporary file of the images, (n, 3, S, S) uint8, if images are kept.
    """

    file: str
    arrays: dict[str, np.ndarray]
    skipped: list[dict[str, str]]
    kinds: Counter[str]
    images: NpyWriter | None = None


def shard_file_name(shard_index: int) -> str:
    """Return the name of a shard's files, which is the same in all folders."""
    return f"{shard_index:05d}.npy"


def iter_chunks(array: np.ndarray | NpyFile) -> Iterator[np.ndarray]:
    """Yield consecutive parts of an array that are small enough to convert to float64."""
    for start in range(0, len(array), IMAGES_PER_CHUNK):
        yield array[start : start + IMAGES_PER_CHUNK]


def compute_channel_sums(arrays: Sequence[np.ndarray | NpyFile]) -> dict[str, list[float]]:
    """Return the sums of z and z^2 per channel for z ~ posterior, using E[z^2] = mean^2 + std^2.

    Args:
        arrays: Arrays of moments, (n, 2C, h, w) each.
    """
    channels = arrays[0].shape[1] // 2
    total = np.zeros(channels)
    total_of_squares = np.zeros(channels)
    for array in arrays:
        for chunk in iter_chunks(array):
            mean, std = np.split(chunk.astype(np.float64), 2, axis=1)
            total += mean.sum((0, 2, 3))
            total_of_squares += (mean**2 + std**2).sum((0, 2, 3))
    return {"sum": total.tolist(), "sum_of_squares": total_of_squares.tolist()}


def compute_channel_statistics(
    entries: list[ShardEntry], latent_shape: list[int], flips: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel, (C,) each, from the sums of all shards."""
    num_images = sum(entry["count"] for entry in entries) * (1 + flips)
    num_values = num_images * latent_shape[1] * latent_shape[2]
    mean = np.sum([entry["sum"] for entry in entries], 0) / num_values
    mean_square = np.sum([entry["sum_of_squares"] for entry in entries], 0) / num_values
    return mean, np.sqrt(mean_square - mean**2)


def write_shard(dest: Path, shard: Shard) -> ShardEntry:
    """Write all files of a shard and return its entry for the manifest.

    Raises:
        UserError: If the moments exceed the range of their dtype.
    """
    count = len(shard.arrays["labels"])
    entry: ShardEntry = {
        "file": shard.file,
        "count": count,
        "sha256": {},
        "skipped": shard.skipped,
        "kinds": dict(sorted(shard.kinds.items())),
    }
    if count:
        moments = [array for name, array in shard.arrays.items() if name != "labels"]
        if not all(np.isfinite(array).all() for array in moments):
            raise UserError(
                f"shard {shard.file} contains values that {moments[0].dtype} cannot represent; "
                "check that --vae fits these images, or pass --dtype float32"
            )
        entry |= compute_channel_sums(moments)
        for name, array in shard.arrays.items():
            entry["sha256"][name] = write_array(dest / name / shard.file, array)
    if shard.images and count:
        entry["sha256"]["images"] = shard.images.finish()
    elif shard.images:
        shard.images.discard()
    return entry


def add_images(dest: Path, entry: ShardEntry, shard: Shard) -> ShardEntry:
    """Add images to a shard that is otherwise complete.

    Args:
        dest: Folder of the cache.
        entry: The shard's manifest entry.
        shard: The images, all labels, and the recomputed moments of the first batch.

    Returns:
        The new manifest entry.

    Raises:
        UserError: If labels, moments or skipped images differ, so the images would differ as well.
    """
    if not _matches_stored_shard(dest, entry, shard):
        raise UserError(
            f"{dest}: the source no longer contains the images of shard {entry['file']}; encode "
            "the source into another folder with --keep-images"
        )
    assert shard.images is not None
    return entry | {"sha256": entry["sha256"] | {"images": shard.images.finish()}}


def _matches_stored_shard(dest: Path, entry: ShardEntry, shard: Shard) -> bool:
    if shard.skipped != entry["skipped"]:
        return False
    for name, array in shard.arrays.items():
        path = dest / name / shard.file
        row_format = np.dtype((array.dtype, array.shape[1:]))
        stored_shard = ShardReader(path, entry["count"], row_format, format_repair_remedy(dest))
        if name == "labels":
            if not np.array_equal(stored_shard.read(), array):
                return False
        elif len(array):  # empty if all images of the first batch were skipped
            reference = stored_shard.read(0, len(array)).astype(np.float32)
            difference = np.abs(reference - array).mean()
            if not difference <= MAX_RELATIVE_DIFFERENCE * reference.std():  # NaN is a mismatch
                return False
    return True
