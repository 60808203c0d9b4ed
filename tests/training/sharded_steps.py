"""Train with several settings in the same processes, unsharded and sharded, and compare the runs.

    python -m tests.training.sharded_steps JOBS RESULTS

JOBS is a JSON file that `train_in_processes` writes. For each run, it contains the flags of
train.py, the number of steps, and the modes to compare with DDP: one of SHARD_MODES, with the
suffix "+2" for two accumulated micro-batches. RESULTS receives the means of the logged scalars over
the processes for each step, and the collectives of the last step, by run and mode. The mode of DDP
is "none".
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from dataset import TrainingStream
from latents.cache import LatentCache
from models.sit import PRESETS
from tests.helpers import run_ranks
from tests.training.steps import make_settings, make_step
from training.alignment import required_cache_inputs
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


class Result(NamedTuple):
    """The result of a short run."""

    scalars: list[dict[str, float]]  # means over the processes, by step
    tensors: dict[str, torch.Tensor]  # full weights, moments and EMA after the last step
    collectives: dict[str, int]  # number of calls in the last step, by name


def get_tolerance(run: dict) -> float:
    """Return the relative tolerance of losses and tensors of a run. Muon computes in bf16."""
    return 1e-4 if "muon" in run["flags"] else 1e-6


def assert_close(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    run: str = "",
    tolerance: float = 1e-6,
) -> None:
    """Check that tensors differ by at most `tolerance` relative to the norm of all of them.

    The difference of each tensor is at most 10 times as large relative to its norm: AdamW scales up
    rounding errors of biases that are initialized with zeros. The biases of keys are ignored,
    because attention does not depend on them, so their gradients consist of rounding errors.
    """
    assert actual.keys() == expected.keys()
    squared_error = squared_norm = 0.0
    for name, tensor in expected.items():
        difference = actual[name] - tensor
        if name.endswith("qkv.bias"):
            query, _, value = difference.chunk(3)
            difference = torch.cat((query, value))
        squared_error += difference.square().sum().item()
        squared_norm += tensor.square().sum().item()
        error, norm = difference.norm().item(), tensor.norm().item()
        assert error <= 10 * tolerance * norm, (run, name, error / norm)
    assert squared_error <= tolerance**2 * squared_norm, (run, squared_error / squared_norm)


def train_steps(accelerator: Accelerator, cache: Path, num_steps: int, flags: list[str]) -> Result:
    """Train for a few steps with one setting."""
    settings = make_settings(cache, *flags)
    step = make_step(settings, accelerator.device, accelerator=accelerator)
    rank, count = accelerator.process_index, accelerator.num_processes
    inputs = required_cache_inputs(step.alignments)
    stream = TrainingStream(LatentCache(cache), 0, 8, rank, count, inputs)
    scalars = []
    for index in range(num_steps):
        with CollectiveCounter() as collectives:
            values, _ = step(stream[index])
        means = accelerator.reduce(torch.stack(list(values.values())), "mean")
        scalars.append(dict(zip(values, means.tolist())))
    state = step.state
    tensors = {**state.model.state_dict(), **state.get_moments()}
    tensors |= {f"ema.{key}": value for key, value in state.emas[0].state_dict().items()}
    full_tensors = {key: gather_tensor(tensor) for key, tensor in tensors.items()}
    return Result(scalars, full_tensors, dict(collectives.counts))


def train_in_processes(
    num_processes: int, folder: Path, cache: Path, runs: dict, presets: dict | None = None
) -> dict:
    """Run `main` on several processes, and return its results.

    Args:
        num_processes: Number of processes.
        folder: Folder for the files of jobs and results.
        cache: Latent cache.
        runs: Name of each run -> its "flags", "modes" and "num_steps".
        presets: Architectures that differ from PRESETS.
    """
    jobs = {"cache": str(cache), "presets": presets or {}, "runs": runs}
    jobs_file, results_file = folder / "jobs.json", folder / "results.json"
    jobs_file.write_text(json.dumps(jobs))
    run_ranks(num_processes, "tests.training.sharded_steps", jobs_file, results_file)
    return json.loads(results_file.read_text())


def check_collectives(
    mode: str, counts: dict[str, int], depth: int, teacher_block: int, num_exchanges: int = 0
) -> None:
    """Check that a step with SRA communicates as often as docs/cluster/sharding.md states.

    Muon has `num_exchanges` = 8: it exchanges the rows of four matrices per block, and their
    updates.
    """
    shard, _, num_micro_batches = mode.partition("+")
    student, teacher = depth + 1, teacher_block + 1  # blocks, and the parameters outside of blocks
    count = int(num_micro_batches or 1)
    gathers = (student + depth + teacher) * count  # the blocks also in the backward pass
    if shard == "optimizer":
        gathers = student + teacher * count
    assert counts["_allgather_base_"] == gathers
    assert counts["_reduce_scatter_base_"] == student  # once, regardless of accumulation
    assert counts.get("alltoall_base_", 0) == num_exchanges
    # Across nodes, gradients are reduced once as well.
    assert counts.get("allreduce_", 0) == (student if shard == "hybrid" else 0)


def main() -> None:
    """Train each run with DDP and with its modes, and compare the tensors."""
    jobs_file, results_file = map(Path, sys.argv[1:])
    jobs = json.loads(jobs_file.read_text())
    PRESETS.update(jobs["presets"])
    accelerator = Accelerator(cpu=True)
    results: dict[str, dict] = {}
    for name, run in jobs["runs"].items():
        results[name] = {}
        for mode in ("none", *run["modes"]):
            shard, _, accumulation = mode.partition("+")
            flags = [*run["flags"], "--shard", shard]
            flags += ["--gradient-accumulation-steps", accumulation or "1"]
            result = train_steps(accelerator, Path(jobs["cache"]), run["num_steps"], flags)
            if mode == "none":
                expected = result.tensors
            assert_close(result.tensors, expected, f"{name}, {mode}", get_tolerance(run))
            results[name][mode] = {
                "scalars": result.scalars,
                "collectives": result.collectives,
            }
    if accelerator.is_main_process:
        results_file.write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main()
