"""How much arithmetic a run needs, and how much of the machine's it gets. One multiply-accumulate is two FLOPs."""

import math
import time

import torch

from models.flops import backbone_flops, head_flops
from models.sit import SiTConfig
from models.targets import TARGETS, Data


def training_flops(config: SiTConfig, align: list[dict], data: Data | None = None) -> int:
    """Of one image: forward and backward of backbone and heads (a product's backward is two of the same size; recomputation
    does not count), forward of what runs for the targets alone. `align` is config.json's; `data` what its targets ask.
    """
    heads = sum(head_flops(config, entry["head"]) for entry in align)
    targets = sum(TARGETS[entry["method"]].cost(entry, config, data)[1] for entry in align)
    return 3 * (backbone_flops(config) + heads) + targets


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
