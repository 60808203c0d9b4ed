"""Read the latent cache in a shuffled order that depends only on the seed (docs/data.md).

The n-th image of a run has stream position n.

Shapes: B stream positions, b images per process and batch.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.keyed_random import Purpose, uniform
from common.loader import Loader
from latents.cache import LatentCache

NUM_ROUNDS = 8  # rounds of the Feistel network


def to_image_index(stream_position: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return the index of the image at each position of the endless, shuffled training stream.

    An epoch consists of `size` positions and contains each image once, in an order that differs
    between epochs. A generalized Feistel network with cycle walking (Black and Rogaway 2002)
    computes the permutation, so that it does not have to be stored.

    Args:
        stream_position: Positions in the stream, (B,) int64.
        size: Number of images.
        seed: Seed of the run.

    Returns:
        Image indices in [0, size), (B,) int64.
    """
    epoch, position_in_epoch = np.divmod(stream_position, size)
    image_index = np.empty_like(stream_position)
    for current_epoch in np.unique(epoch):
        mask = epoch == current_epoch
        keys = _make_round_keys(current_epoch, seed)
        image_index[mask] = _permute(position_in_epoch[mask], size, keys)
    return image_index


def _permute(position: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply the permutation of range(size) that the keys determine, (B,) -> (B,) uint64.

    The Feistel network permutes the cells of the smallest nearly square rectangle with at least
    `size` cells. Values outside range(size) are permuted again until they are inside.
    """
    num_rows = math.isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    lengths = (np.uint64(num_rows), np.uint64(num_columns))
    value = position.astype(np.uint64)
    outside_index = np.arange(len(value))
    while len(outside_index):
        cell = list(np.divmod(value[outside_index], lengths[1]))  # row and column
        for i, key in enumerate(keys):
            axis = i % 2
            other_axis = 1 - axis
            shift = _mix(cell[other_axis] ^ key) % lengths[axis]
            cell[axis] = (cell[axis] + shift) % lengths[axis]
        value[outside_index] = cell[0] * lengths[1] + cell[1]
        outside_index = outside_index[value[outside_index] >= size]
    return value


def _make_round_keys(epoch: int, seed: int) -> np.ndarray:
    """Return the keys of the Feistel rounds of one epoch, (NUM_ROUNDS,) uint64."""
    epoch_key = _mix(np.array([epoch], np.uint64))
    return _mix(_mix(epoch_key + np.uint64(seed)) + np.arange(NUM_ROUNDS, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014), uint64 -> uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class CachedBatch:
    """One process's share of a global batch as read from the cache."""

    stream_position: Tensor  # (b,) int64, n for the n-th image of the run
    moments: Tensor  # (b, 2C, h, w), mean and standard deviation of the VAE's posterior, as stored
    labels: Tensor  # (b,) int64
    inputs: dict[str, Tensor] = field(default_factory=dict)  # images or features, by folder

    def to(self, device: torch.device) -> "CachedBatch":
        """Copy all tensors to a device asynchronously."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "CachedBatch":
        """Copy all tensors to pinned host memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "CachedBatch":
        return CachedBatch(
            function(self.stream_position),
            function(self.moments),
            function(self.labels),
            {name: function(tensor) for name, tensor in self.inputs.items()},
        )


class TrainingStream:
    """The batches of a run. Item k is this process's share of global batch k.

    The n-th image of the run, and whether it is flipped, depend only on n and the seed, not on the
    number of processes.

    Args:
        cache: The latent cache.
        seed: Seed of the run.
        batch_size: Global batch size, a multiple of `num_processes`.
        rank: Rank of this process.
        num_processes: Number of processes.
        inputs: Additional inputs to read: "images" (b, 3, R, R) uint8, flipped whenever the moments
            are, or "features/SLUG" (b, N, D) float16.

    Raises:
        CacheError: The cache does not contain these inputs.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        inputs: Sequence[str] = (),
    ):
        assert batch_size % num_processes == 0, (batch_size, num_processes)
        self.cache = cache
        self.seed = seed
        self.batch_size = batch_size
        self.inputs = inputs
        for name in inputs:
            cache.require_folder(name)
        num_local = batch_size // num_processes
        self.offsets = np.arange(rank * num_local, (rank + 1) * num_local, dtype=np.int64)

    def __getitem__(self, step: int) -> CachedBatch:
        """Read this process's share of global batch `step`."""
        stream_position = torch.from_numpy(step * self.batch_size + self.offsets)
        image_index, is_flipped = self._select_images(stream_position)
        moments, labels = self.cache.gather(image_index, is_flipped)
        inputs = {
            name: self.cache.read_input(name, image_index, is_flipped) for name in self.inputs
        }
        return CachedBatch(stream_position, moments, labels, inputs)

    def _select_images(self, stream_position: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the image index at each position, and whether the image is flipped."""
        is_flipped = None
        if self.cache.manifest.flips:
            is_flipped = (uniform(self.seed, Purpose.FLIP, stream_position) < 0.5).numpy()
        return to_image_index(stream_position.numpy(), len(self.cache), self.seed), is_flipped

    def describe_non_finite_moments(self, step: int) -> str:
        """Return which image of global batch `step` has moments that are not finite, or ""."""
        stream_position = step * self.batch_size + torch.arange(self.batch_size)
        return self.cache.describe_non_finite_moments(*self._select_images(stream_position))

    def read_batches(
        self,
        first_step: int,
        end_step: int,
        num_workers: int,
        pin_memory: bool,
        worker_init: Callable[[int], None] | None = None,
    ) -> Generator[CachedBatch, None, None]:
        """Yield the batches of steps first_step to end_step - 1, in order.

        Close the generator to end the workers.

        Args:
            first_step: First step.
            end_step: Step after the last one.
            num_workers: Number of worker processes; 0 reads in this process.
            pin_memory: Whether to copy the batches to pinned memory.
            worker_init: Function that each worker calls with its number.

        Raises:
            UserError: A shard cannot be read, or a worker failed.
        """
        loader = Loader(
            self.__getitem__, "batches of --data-dir", num_workers, pin_memory, worker_init
        )
        return loader.iterate(range(first_step, end_step))
