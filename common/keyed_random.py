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
from enum import IntEnum

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF  # selects the lowest 32 bits


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


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit output words of Philox4x32-10.

    Args:
        counter: Four int64 tensors that hold 32-bit words.
        key: Two 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 multiplication wraps around, but all 64 bits of the product are correct.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD_MASK) ^ c1 ^ k0,
            p1 & WORD_MASK,
            ((p0 >> 32) & WORD_MASK) ^ c3 ^ k1,
            p0 & WORD_MASK,
        )
        k0 = (k0 + 0x9E3779B9) & WORD_MASK
        k1 = (k1 + 0xBB67AE85) & WORD_MASK
    return c0, c1, c2, c3


def uniform(
    seed: int, purpose: Purpose, position: Tensor, shape: tuple[int, ...] = (), draw: int = 0
) -> Tensor:
    """Return random numbers that are uniformly distributed on (0, 1).

    Args:
        seed: Seed in [0, 2**32).
        purpose: Purpose of the numbers, which selects the random stream.
        position: Position in the stream of training images, or index of the sample, (B,) int64.
        shape: Shape of the numbers per position.
        draw: Index of the draw, if a position needs several draws for the same purpose.

    Returns:
        (B, *shape) float64.
    """
    assert 0 <= seed <= WORD_MASK and 0 <= draw <= WORD_MASK, (seed, draw)
    count = math.prod(shape)
    # The generator yields blocks of four words; the block's index is part of the counter.
    block_index = torch.arange(math.ceil(count / 4), device=position.device)
    position = position[:, None]
    counter = torch.broadcast_tensors(
        block_index,
        torch.full_like(position, draw),
        position & WORD_MASK,
        (position >> 32) & WORD_MASK,
    )
    words = torch.stack(philox(counter, (seed, int(purpose))), -1).flatten(1)[:, :count]
    return ((words.double() + 0.5) * 2.0**-32).reshape(len(position), *shape)


def normal(
    seed: int, purpose: Purpose, position: Tensor, shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Return standard normal random numbers, computed with the Box-Muller transform.

    The arguments and the shape of the result are the same as for `uniform`.
    """
    count = math.prod(shape)
    u = uniform(seed, purpose, position, (math.ceil(count / 4), 4), draw)
    radius = (-2 * u[..., 0::2].log()).sqrt()
    angle = 2 * math.pi * u[..., 1::2]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pairs.flatten(1)[:, :count].reshape(len(position), *shape)
