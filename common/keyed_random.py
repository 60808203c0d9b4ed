"""Random numbers as a pure function of (seed, purpose, position, draw), without a generator state.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
computed with integer tensor arithmetic.

In training, `position` is the position in the stream of training images: n for the n-th image of
the run. It is not the index of the image in the data set, so an image is combined with new noise in
each epoch. In sampling, `position` is the index of the sample. The result does not depend on the
number of processes, on the batch size or on resuming. Results on CPU and GPU are equal up to the
last bit of a float32.
"""

import math
from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF  # selects the lowest 32 bits
NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """The independent random streams of a seed.

    The values determine the random numbers of all runs and must never be changed.
    """

    TIMESTEP = 1  # training: timestep t
    NOISE = 2  # training: noise eps
    POSTERIOR = 3  # training: sample of the VAE's posterior
    LABEL_DROP = 4  # training: labels dropped for classifier-free guidance
    CLASS = 5  # sampling: class of an image
    INITIAL_NOISE = 6  # sampling: x at t = 1
    BROWNIAN = 7  # sampling: increments of the SDE
    FLIP = 8  # training: horizontal flip of an image
    CROP = 9  # preprocessing: position of a random crop
    TARGET = 10  # training: random numbers of an alignment method


def make_round_keys(key: Tensor) -> Tensor:
    """Return the keys of the rounds, (10, 2, ...), given a key of two 32-bit words, (2, ...)."""
    increments = key.new_tensor(KEY_INCREMENTS)
    rounds = torch.arange(NUM_ROUNDS, device=key.device)
    offsets = (rounds[:, None] * increments).reshape(NUM_ROUNDS, 2, *[1] * (key.ndim - 1))
    return (key + offsets) & WORD_MASK


def philox(counter: Tensor, round_keys: Tensor, multipliers: Tensor) -> Tensor:
    """Return the four 32-bit output words of Philox4x32-10, (4, ...).

    Words 0 and 2 are computed by the same tensor operations, as are words 1 and 3.

    Args:
        counter: Four 32-bit words per block of random numbers, (4, ...) int64.
        round_keys: Return value of `make_round_keys`, (10, 2, ...).
        multipliers: `MULTIPLIERS` in reverse order, (2, 1, ...) int64.
    """
    even, odd = counter[0::2], counter[1::2]
    for round_key in round_keys:
        # int64 multiplication wraps around, but all 64 bits of the product are correct.
        product = even.flip(0) * multipliers
        even = ((product >> 32) & WORD_MASK) ^ odd ^ round_key
        odd = product & WORD_MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]))


class KeyedRandom:
    """Draws random numbers for several purposes with one evaluation of the generator.

    Args:
        seed: Seed in [0, 2**32).
        device: Device of the numbers.
        uniform: Purposes with numbers uniformly distributed on (0, 1), and the shape of the numbers
            per position.
        normal: Purposes with standard normal numbers, computed with the Box-Muller transform, and
            the shape of the numbers per position.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device | str,
        uniform: Mapping[Purpose, tuple[int, ...]] | None = None,
        normal: Mapping[Purpose, tuple[int, ...]] | None = None,
    ):
        assert 0 <= seed <= WORD_MASK, seed
        normal = normal or {}
        self.shapes = {**normal, **(uniform or {})}
        # The generator yields blocks of four words; the block's index is part of the counter.
        self.num_blocks = [math.ceil(math.prod(shape) / 4) for shape in self.shapes.values()]
        self.num_normals = 4 * sum(self.num_blocks[: len(normal)])
        block_index = torch.cat([torch.arange(count) for count in self.num_blocks])
        purposes = torch.tensor(list(self.shapes)).repeat_interleave(torch.tensor(self.num_blocks))
        key = torch.stack((torch.full_like(purposes, seed), purposes))[:, None]
        self.block_index = block_index[None].to(device)
        self.round_keys = make_round_keys(key).to(device)
        self.multipliers = torch.tensor(MULTIPLIERS[::-1])[:, None, None].to(device)

    def draw(self, position: Tensor, draw: int = 0) -> dict[Purpose, Tensor]:
        """Return the numbers of each purpose, (B, *shape) float64.

        Args:
            position: Position in the stream of training images, or index of the sample, (B,) int64.
            draw: Index of the draw, if a position needs several draws for the same purpose.
        """
        assert 0 <= draw <= WORD_MASK, draw
        position = position[:, None]
        counter = torch.broadcast_tensors(
            self.block_index,
            torch.full_like(position, draw),
            position & WORD_MASK,
            (position >> 32) & WORD_MASK,
        )
        words = philox(torch.stack(counter), self.round_keys, self.multipliers)
        values = ((words.double() + 0.5) * 2.0**-32).permute(1, 2, 0).flatten(1)
        if self.num_normals:
            normals = _box_muller(values[:, : self.num_normals])
            values = torch.cat((normals, values[:, self.num_normals :]), 1)
        parts = values.split([4 * count for count in self.num_blocks], 1)
        return {
            purpose: part[:, : math.prod(shape)].reshape(len(part), *shape)
            for part, (purpose, shape) in zip(parts, self.shapes.items())
        }


def _box_muller(values: Tensor) -> Tensor:
    """Convert uniform numbers on (0, 1) to standard normal ones: (B, 2n) -> (B, 2n)."""
    radius = (-2 * values[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * values[:, 1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)


def uniform(
    seed: int, purpose: Purpose, position: Tensor, shape: tuple[int, ...] = (), draw: int = 0
) -> Tensor:
    """Return uniformly distributed numbers on (0, 1) for one purpose, (B, *shape) float64.

    The arguments are those of `KeyedRandom` and its method `draw`.
    """
    return KeyedRandom(seed, position.device, {purpose: shape}).draw(position, draw)[purpose]


def normal(
    seed: int, purpose: Purpose, position: Tensor, shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Return standard normal numbers for one purpose, (B, *shape) float64.

    The arguments are those of `KeyedRandom` and its method `draw`.
    """
    random = KeyedRandom(seed, position.device, normal={purpose: shape})
    return random.draw(position, draw)[purpose]
