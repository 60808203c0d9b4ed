"""The order in which training reads the latent cache: a function of the seed (docs/data.md).

B images of a global batch, b of them this process's share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.keyed_random import Purpose, uniform
from latents.cache import CacheError, LatentCache

ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): uint64 -> uint64, well mixed."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def to_image_index(number: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The image at each place of the endless training stream: number (B,) int64 -> index (B,) int64 in [0, size).

    Every run of `size` numbers from a multiple of `size` on is one epoch, each a permutation of its own. The permutation is
    computed, not stored: a Feistel network over the cells of the smallest rectangle, nearly square, that holds `size` of them,
    and again for those few that land in a cell too many (Black & Rogaway 2002, generalised Feistel and cycle walking).
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    sides = (np.uint64(rows), np.uint64(columns))
    epoch, place = np.divmod(number, size)
    index = np.empty_like(number)
    for e in np.unique(epoch):
        keys = _mix(
            _mix(_mix(np.array([e], np.uint64)) + np.uint64(seed))
            + np.arange(ROUNDS, dtype=np.uint64)
        )
        here = np.flatnonzero(epoch == e)
        value = place[here].astype(np.uint64)
        outside = np.arange(len(value))
        while len(outside):
            cell = list(np.divmod(value[outside], sides[1]))  # a row and a column
            for i, key in enumerate(keys):
                k = i % 2
                cell[k] = (cell[k] + _mix(cell[1 - k] ^ key) % sides[k]) % sides[k]
            value[outside] = cell[0] * sides[1] + cell[1]
            outside = outside[value[outside] >= size]
        index[here] = value
    return index


@dataclass(frozen=True)
class CachedBatch:
    """One process's share of a global batch as read from the cache."""

    stream_position: Tensor  # (b,) int64, n for the n-th image of the run
    moments: Tensor  # (b, 2C, h, w), posterior mean and std as stored
    labels: Tensor  # (b,) int64
    inputs: dict[str, Tensor] = field(default_factory=dict)  # further inputs by name

    def to(self, device: torch.device) -> "CachedBatch":
        """Copy all tensors to a device without waiting for the copy."""
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


class TrainingStream(Dataset):
    """The batches of a run: item k is this process's share of global batch k.

    The n-th image of the run, and whether it is flipped, depend on the seed alone and are the same
    on any number of processes.

    Args:
        cache: The latent cache.
        seed: Seed of the run.
        batch_size: Global batch size, a multiple of `num_processes`.
        rank: Rank of this process.
        num_processes: Number of processes.
        inputs: Further inputs to read: "images" (b, 3, R, R) uint8, flipped where the moments are,
            or "features/SLUG" (b, N, D) float16.

    Raises:
        CacheError: The cache does not hold these inputs.
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
        share = batch_size // num_processes
        self.offsets = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)

    def __getitem__(self, step: int) -> CachedBatch:
        """Read this process's share of global batch `step`."""
        position = step * self.batch_size + self.offsets
        position_tensor = torch.from_numpy(position)
        flipped = None
        if self.cache.manifest.flips:
            flipped = (uniform(self.seed, Purpose.FLIP, position_tensor) < 0.5).numpy()
        image_index = to_image_index(position, len(self.cache), self.seed)
        moments, labels = self.cache.gather(image_index, flipped)
        inputs = {name: self._read_input(name, image_index, flipped) for name in self.inputs}
        return CachedBatch(position_tensor, moments, labels, inputs)

    def _read_input(self, name: str, image_index: np.ndarray, flipped: np.ndarray | None) -> Tensor:
        if name == "images":
            return self.cache.images(image_index, flipped)
        return self.cache.features(name.removeprefix("features/"), image_index)

    def read_batches(
        self,
        first: int,
        last: int,
        num_workers: int,
        pin_memory: bool,
        worker_init: Callable[[int], None] | None = None,
    ) -> Iterator[CachedBatch]:
        """Yield the batches of steps first, ..., last - 1.

        Args:
            first: First step.
            last: Step after the last one.
            num_workers: Number of loader processes; 0 reads in this process.
            pin_memory: Whether to copy the batches to pinned memory.
            worker_init: Called in each loader process with its index.

        Raises:
            CacheError: A shard cannot be read.
        """
        loader = DataLoader(
            _ErrorsAsItems(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=worker_init,
        )
        for item in loader:
            if isinstance(item, CacheError):
                raise item
            yield item


class _ErrorsAsItems(Dataset):
    """Returns a CacheError as an item: a DataLoader would bury its message in a traceback."""

    def __init__(self, stream: TrainingStream):
        self.stream = stream

    def __getitem__(self, step: int) -> CachedBatch | CacheError:
        try:
            return self.stream[step]
        except CacheError as error:
            return error
