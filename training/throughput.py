"""Measure the throughput of a run: images per second, waiting times, and utilization of the device.

One multiply-accumulate counts as two FLOPs.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from models.flops import backbone_flops, head_flops
from models.sit import SiTConfig
from models.target import CacheInfo
from models.targets import TARGETS
from training.alignment import head_specs

T = TypeVar("T")

PAUSES = ("save", "preview", "evaluation")


def training_flops(network: SiTConfig, align: list[dict], cache: CacheInfo) -> int:
    """Return the FLOPs of a training step per image.

    The count includes the forward and backward passes of the backbone and the heads, and the
    forward passes of networks that only compute targets. The backward pass of a matrix product is
    two products of the same size. Recomputation is not counted, nor are methods of weight 0.

    Args:
        network: Architecture of the backbone.
        align: config.json's "align".
        cache: Properties of the latent cache.
    """
    align = [entry for entry in align if entry["weight"]]
    heads = sum(head_flops(network, spec) for entry in align for spec in head_specs(entry).values())
    targets = sum(TARGETS[entry["method"]].cost(entry, network, cache).flops for entry in align)
    return 3 * (backbone_flops(network) + heads) + targets


def mean_training_flops(
    network: SiTConfig, align: list[dict], cache: CacheInfo, start_step: int, end_step: int
) -> float:
    """Return the FLOPs per image, averaged over a range of steps in which methods may stop.

    Args:
        network: Architecture of the backbone.
        align: config.json's "align".
        cache: Properties of the latent cache.
        start_step: Number of updates before the steps.
        end_step: Number of updates after the steps.
    """
    backbone = training_flops(network, [], cache)
    num_steps = end_step - start_step
    mean = float(backbone)
    for entry in align:
        last_active_step = min(end_step, entry["stop_step"] or end_step)
        num_active_steps = max(0, last_active_step - start_step)
        flops = training_flops(network, [entry], cache) - backbone
        mean += flops * num_active_steps / num_steps
    return mean


@torch.no_grad()
def measure_matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return the highest measured FLOP/s of large square matrix products.

    The log's `matmul_share` is relative to this rate.
    """
    is_gpu = device.type == "cuda"
    size, repeats = (8192, 5) if is_gpu else (1024, 1)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    deadline = time.perf_counter() + seconds
    durations: list[float] = []
    while not durations or time.perf_counter() < deadline:
        started = time.perf_counter()
        for _ in range(repeats):
            matrix @ matrix
        if is_gpu:
            torch.cuda.synchronize(device)
        durations.append((time.perf_counter() - started) / repeats)
    return 2 * size**3 / min(durations)


@dataclass
class Throughput:
    """Measures the speed of training between two log lines.

    Args:
        batch_size: Global batch size.
        device: Device of the step.
        start_step: Number of updates before this measurement.
        mean_flops: `mean_flops(start_step, end_step)` returns the FLOPs per image of these steps.
        rates: Name of each measure of the utilization -> the rate of all processes in FLOP/s that
            it is relative to.
    """

    batch_size: int
    device: torch.device
    start_step: int
    mean_flops: Callable[[int, int], float]
    rates: dict[str, float]

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.data_wait_seconds = 0.0
        self.paused_seconds = dict.fromkeys(PAUSES, 0.0)
        self.total_paused_seconds = dict.fromkeys(PAUSES, 0.0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def time_batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and measure how long the host waits for each."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self.data_wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def measure(self, step: int) -> dict[str, float]:
        """Return the speed since the previous call.

        - images_per_s: images per second over all processes
        - step_s: seconds per step, the sum of data_s and compute_s
        - data_s: seconds per step in which the host waited for batches (the GPU may have been busy)
        - mfu: share of the device's peak rate that the FLOPs of the run use, on known GPUs
        - matmul_share: share of the measured rate of matrix products that these FLOPs use
        - save_s, preview_s, evaluation_s: total seconds of these pauses, which do not count above
        - peak_memory_gib: peak memory of the GPU during training
        """
        now = time.perf_counter()
        seconds = now - self.started
        steps = step - self.start_step
        rate = steps * self.batch_size / seconds
        flops_per_s = rate * self.mean_flops(self.start_step, step)
        step_s = seconds / steps
        data_s = self.data_wait_seconds / steps
        values = {
            "images_per_s": rate,
            "step_s": step_s,
            "data_s": data_s,
            "compute_s": step_s - data_s,
            **{name: flops_per_s / peak for name, peak in self.rates.items()},
            **{f"{kind}_s": paused for kind, paused in self.paused_seconds.items()},
        }
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.started = now
        self.start_step = step
        self.data_wait_seconds = 0.0
        self.paused_seconds = dict.fromkeys(PAUSES, 0.0)
        return values

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Count the block as a pause of this kind (see PAUSES). This waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        paused = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            seconds = time.perf_counter() - paused
            self.started += seconds
            self.paused_seconds[kind] += seconds
            self.total_paused_seconds[kind] += seconds

    def describe_pauses(self) -> str:
        """Return the total seconds of each kind of pause since the process started."""
        return ", ".join(f"{kind} {s:.1f} s" for kind, s in self.total_paused_seconds.items())
