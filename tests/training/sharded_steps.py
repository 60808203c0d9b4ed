"""Train with several ways of sharding in the same processes, and store the results.

    python -m tests.training.sharded_steps OUTPUT CACHE NUM_STEPS MODE...

A mode is one of SHARD_MODES, with the suffix "+2" for two accumulated micro-batches and the prefix
"muon-" for Muon.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from dataset import TrainingStream
from latents.cache import LatentCache
from tests.training.steps import make_settings, make_step
from training.sharding import gather_tensor


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives of torch.distributed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Store losses and gradient norms, final tensors, and collectives of the last step by mode."""
    output, cache, num_steps, *modes = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    results = {}
    for name in modes:
        mode, _, accumulation = name.removeprefix("muon-").partition("+")
        optimizer = "muon" if name.startswith("muon-") else "adamw"
        settings = make_settings(
            Path(cache),
            *("--align", "sra2", "sra", "--shard", mode, "--max-grad-norm", 0.5),
            *("--optimizer", optimizer, "--learning-rate", "1e-3"),
            *("--gradient-accumulation-steps", accumulation or 1),
        )
        step = make_step(settings, accelerator.device, accelerator=accelerator)
        rank, count = accelerator.process_index, accelerator.num_processes
        stream = TrainingStream(LatentCache(Path(cache)), 0, 8, rank, count, [])
        scalars = []
        for index in range(int(num_steps)):
            with CollectiveCounter() as collectives:
                values, _ = step(stream[index])
            means = [values[key] for key in ("loss", "denoising", "grad_norm")]
            scalars.append(accelerator.reduce(torch.stack(means), "mean"))
        state = step.state
        tensors = {**state.model.state_dict(), **state.get_moments()}
        tensors |= {f"ema.{key}": value for key, value in state.emas[0].state_dict().items()}
        whole = {key: gather_tensor(tensor) for key, tensor in tensors.items()}
        results[name] = {
            "scalars": torch.stack(scalars),
            "tensors": whole,
            "collectives": dict(collectives.counts),
        }
    if accelerator.is_main_process:
        torch.save(results, output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
