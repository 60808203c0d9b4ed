"""The order in which training reads the latent cache: a function of the seed (docs/data.md).

B images of a global batch, b of them this process's share.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.keyed_random import Purpose, uniform
from latents.cache import LatentCache

ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): uint64 -> uint64, well mixed."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(number: np.ndarray, size: int, seed: int) -> np.ndarray:
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


class TrainingStream(Dataset):
    """Item k is this process's share of global batch k: stream numbers (b,), moments (b, 2C, h, w), labels (b,); and what
    `extra` names: "images" (b, 3, R, R) uint8, mirrored where the moments are, or "features/SLUG" (b, N, D) float16.

    Image number n of the run, and whether it is mirrored, is the same on any number of processes: it depends on the seed
    alone. Raises CacheError if the cache holds no such extra.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
        extra: str | None = None,
    ):
        assert batch_size % processes == 0, (batch_size, processes)
        self.cache, self.seed, self.batch_size, self.extra = cache, seed, batch_size, extra
        if extra:
            cache.require(extra)
        share = batch_size // processes
        self.own = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        number, mirrored = step * self.batch_size + self.own, None
        key = torch.from_numpy(number)
        if self.cache.manifest.flips:
            mirrored = (uniform(self.seed, Purpose.MIRROR, key) < 0.5).numpy()
        index = shuffled(number, len(self.cache), self.seed)
        batch = key, *self.cache.gather(index, mirrored)
        if self.extra == "images":
            return *batch, self.cache.images(index, mirrored)
        if self.extra:
            return *batch, self.cache.features(self.extra.removeprefix("features/"), index)
        return batch

    def loader(
        self,
        first: int,
        last: int,
        num_workers: int,
        pin_memory: bool,
        worker_init: Callable[[int], None] | None = None,
    ) -> DataLoader:
        """Steps first..last - 1, in order."""
        steps = range(first, last)
        return DataLoader(
            self,
            None,
            sampler=steps,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=worker_init,
        )
