"""How much arithmetic a network needs, and how much of the machine's it gets.

One multiply-accumulate is two FLOPs. Counted are the matrix products, as in PyTorch's FlopCounterMode, which agrees."""

import math
import time

import torch

from models.sit import SiTConfig


def backbone_flops(config: SiTConfig) -> int:
    """Forward FLOPs of a SiT for one image. SiT-XL/2 at 256 pixels: 2 x 118.6 G."""
    d, tokens, patch = config.width, (config.latent_size // config.patch) ** 2, config.patch**2 * config.channels
    block = tokens * (4 + 8) * d * d + 2 * tokens * tokens * d + 6 * d * d  # projections and MLP; attention; modulation
    ends = 2 * tokens * patch * d + 2 * d * d + (256 + d) * d  # patches in and out; final modulation; timestep
    return 2 * (config.depth * block + ends)


def head_flops(config: SiTConfig, head: dict | None) -> int:
    """Forward FLOPs of the alignment head (models.projector.Projector's arguments) for one image; 0 without one."""
    if head is None:
        return 0
    tokens = (config.latent_size // config.patch) ** 2
    sizes = [head["width"], *[head["hidden"]] * (head["layers"] - 1), head["out"]]
    return 2 * tokens * sum(a * b for a, b in zip(sizes, sizes[1:]))


def training_flops(config: SiTConfig, head: dict | None) -> int:
    """Forward and backward for one image: a product's backward is two of the same size. Recomputation does not count."""
    return 3 * (backbone_flops(config) + head_flops(config, head))


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of large square matrix products, the fastest seen here and now: what model FLOP utilisation is a share of."""
    gpu = device.type == "cuda"
    side, products = (8192, 5) if gpu else (1024, 1)
    a = torch.randn(side, side, device=device, dtype=dtype)
    begun, fastest = time.perf_counter(), math.inf
    while fastest == math.inf or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        for _ in range(products):
            a @ a
        if gpu:
            torch.cuda.synchronize(device)
        fastest = min(fastest, (time.perf_counter() - started) / products)
    return 2 * side**3 / fastest
