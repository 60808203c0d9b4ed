"""Report how long the first step took, and store the graphs that it compiled."""

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from accelerate import Accelerator

from common.compile_cache import CompileCache, choose_folder
from training.config import Settings


def load_compile_cache(settings: Settings, accelerator: Accelerator, config: dict) -> CompileCache:
    """Load the graphs that earlier runs of the same output folder have compiled.

    Args:
        settings: Settings of the run.
        accelerator: The accelerator.
        config: Contents of config.json.
    """
    cache = CompileCache(
        choose_folder(settings.run.output_dir, settings.device.compile),
        {
            "model": config["model"],
            "align": config["align"],
            **asdict(settings.objective),
            **asdict(settings.device),
            "batch_size": settings.loop.batch_size,
            "accumulation": settings.loop.gradient_accumulation_steps,
            "num_processes": accelerator.num_processes,
        },
        accelerator.device,
        accelerator.process_index,
        accelerator.local_process_index,
    )
    cache.load()
    return cache


class FirstStep:
    """Measures the first step, in which graphs are compiled, and saves the graphs after it.

    Args:
        compile_cache: The compiled graphs.
        device: Device of the step.
        info: Receives a message after the first step.
    """

    def __init__(
        self, compile_cache: CompileCache, device: torch.device, info: Callable[[str], None]
    ):
        self.compile_cache = compile_cache
        self.device = device
        self.info = info
        self.started: float | None = None

    def start(self) -> None:
        """Start the measurement, before the first batch is read."""
        self.started = time.perf_counter()

    def advance(self) -> None:
        """Report the first step. Call this after every step; only the first call has an effect."""
        if self.started is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        message = f"the first step took {time.perf_counter() - self.started:.1f} s"
        self.started = None
        self.save()
        cache = self.compile_cache
        if cache.num_graphs:
            message += (
                f" with {cache.num_graphs} compiled graphs, {cache.num_loaded_graphs} of them "
                f"from {cache.path}"
            )
        self.info(message)

    def save(self) -> None:
        """Save graphs that were compiled since the last call, such as those of a stop step."""
        problem = self.compile_cache.save()
        if problem:
            self.info(problem)
