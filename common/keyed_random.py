"""Random numbers as a pure function of what they are for: (seed, purpose, index, draw).

Philox4x32-10, the counter-based generator of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", in integer
tensor arithmetic. There is no state to save, to hand over or to get out of step: image number 1,000 of a run gets the same
noise on one process or on sixty-four, before and after a resume, on the CPU and (to a float32's last bit) on a GPU.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """Keeps the streams of one seed apart. The values are part of what makes a run repeatable: never renumber them."""

    TIMESTEP = 1  # training: t
    NOISE = 2  # training: eps
    POSTERIOR = 3  # training: the draw from the VAE's posterior
    LABEL_DROP = 4  # training: classifier-free guidance's dropped labels
    CLASS = 5  # sampling: the class of an image
    INITIAL_NOISE = 6  # sampling: x at t = 1
    BROWNIAN = 7  # sampling: the increments of the SDE
    FLIP = 8  # training: whether an image is mirrored
    CROP = 9  # preprocessing: where a random crop lies
    TARGET = 10  # training: what a method of alignment draws for itself


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. Four int64 tensors holding 32-bit words and two 32-bit key words -> four tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = (
            c0 * 0xD2511F53,
            c2 * 0xCD9E8D57,
        )  # int64 wraps around, which leaves all 64 bits of the product right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _words(seed: int, purpose: Purpose, index: Tensor, shape: tuple[int, ...], draw: int) -> Tensor:
    """(B, ceil(n / 4), 4) words, n the size of `shape`."""
    assert 0 <= seed <= WORD and 0 <= draw <= WORD, (seed, draw)
    blocks = torch.arange(math.ceil(math.prod(shape) / 4), device=index.device)
    index = index[:, None]
    counter = torch.broadcast_tensors(
        blocks, torch.full_like(index, draw), index & WORD, (index >> 32) & WORD
    )
    return torch.stack(philox(counter, (seed, int(purpose))), -1)


def uniform(
    seed: int, purpose: Purpose, index: Tensor, shape: tuple[int, ...] = (), draw: int = 0
) -> Tensor:
    """Uniform on (0, 1), float64: index (B,) int64 -> (B, *shape)."""
    words = _words(seed, purpose, index, shape, draw).flatten(1)[:, : math.prod(shape)]
    return ((words.double() + 0.5) * 2.0**-32).reshape(len(index), *shape)


def normal(
    seed: int, purpose: Purpose, index: Tensor, shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Standard normal, float64, by Box and Muller's transform: index (B,) int64 -> (B, *shape)."""
    u = (_words(seed, purpose, index, shape, draw).double() + 0.5) * 2.0**-32
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pairs.flatten(1)[:, : math.prod(shape)].reshape(len(index), *shape)
