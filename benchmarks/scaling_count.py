r"""Count the memory of a sharded training step, and compare it with the formula of scaling.py.

    python -m benchmarks.scaling_count --model SiT-XL/2 SiT-3B/2 --gpus 64 --micro-batch 4 \
        --shard optimizer full hybrid --json scaling-count.json

The step of train.py runs on tensors without data (FakeTensorMode), as the first of many processes,
with collectives that do nothing. A tracker adds up the bytes of all tensors that exist at the same
time. A network of any size can therefore be counted on a laptop, in about ten seconds per row. The
blocks are not compiled, and the tensors are on the CPU.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import make_parser, write_result
from benchmarks.run_steps import Plan, build_plan_state, build_step, make_accelerator
from benchmarks.scaling_hardware import GPUS_PER_NODE, Layout
from benchmarks.scaling_memory import MemoryModel, count_parameters, count_stored_bytes
from benchmarks.table import TABLES
from benchmarks.variants import StepConfig, make_plan, make_random_batch
from common import cli
from models.sit import PRESETS
from training.config import SHARD_MODES, autocast_dtype
from training.sharding import Sharding


class CopiableFakeTensorMode(FakeTensorMode):
    """A FakeTensorMode whose tensors can be copied with copy.deepcopy, as `build_state` does."""

    def __deepcopy__(self, memo: dict) -> "CopiableFakeTensorMode":
        return self


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all storages that operations create, until they are freed.

    Attributes:
        current: Bytes of the storages that are alive.
        peak: Largest value of `current` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.current = 0
        self.peak = 0

    def __enter__(self) -> "PeakMemory":
        resize = torch.UntypedStorage.resize_

        def resize_and_track(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._track(storage)

        # FSDP frees gathered parameters by resizing their storages to zero.
        self.resize_patch = patch.object(torch.UntypedStorage, "resize_", resize_and_track)
        self.resize_patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.resize_patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and track its results."""
        result = func(*args, **(kwargs or {}))
        self.track(tree_leaves(result))
        return result

    def track(self, values: Iterable[Any]) -> None:
        """Track the storages of the tensors among some values."""
        for value in values:
            if isinstance(value, torch.Tensor):
                for storage in get_untyped_storages(value):
                    self._track(storage)

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._set_size, key, 0)
        self._set_size(key, storage.nbytes())

    def _set_size(self, key: int, size: int) -> None:
        self.current += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        if not size:
            del self.sizes[key]
        self.peak = max(self.peak, self.current)


@contextmanager
def fake_process_group(num_processes: int) -> Iterator[None]:
    """Simulate the first of many processes. The outputs of collectives are undefined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_step(plan: Plan, layout: Layout, micro_batch: int, precision: str) -> int:
    """Return the peak bytes of a step of train.py on the first process of a sharded run.

    Args:
        plan: The plan of the run.
        layout: How the run is spread over GPUs; sharded.
        micro_batch: Images per step and GPU.
        precision: Mixed precision: no or bf16.
    """
    accelerator = make_accelerator(precision)
    with fake_process_group(layout.num_gpus):
        sharding = Sharding(
            layout.shard,
            accelerator.device,
            layout.num_nodes,
            autocast_dtype(precision),
        )
        fake_mode = CopiableFakeTensorMode(allow_non_fake_inputs=True)
        with fake_mode, warnings.catch_warnings():
            # copy.deepcopy compares the address of a tensor without data with zero.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            state = build_plan_state(plan, accelerator.device, sharding)
        step = build_step(plan, accelerator, state)
        batch = make_random_batch(plan.manifest, micro_batch)
        with fake_mode, PeakMemory() as memory:
            for network in (state.model, *state.emas):
                memory.track(network.parameters())
            step(batch)  # allocates the moments of AdamW
            memory.peak = 0
            step(batch)
            return memory.peak


def compute_peak(plan: Plan, layout: Layout, micro_batch: int, precision: str) -> float:
    """Return the peak bytes of the same step according to the formula, without compilation."""
    memory = MemoryModel(
        count_parameters(plan),
        count_stored_bytes(plan, precision, compile=False),
        autocast_dtype(precision).itemsize,
    )
    return sum(memory.parts(layout, micro_batch).values())


def main() -> None:
    """Run the count."""
    parser = make_parser(__doc__, "scaling_count")
    sharded_modes = [mode for mode in SHARD_MODES if mode != "none"]
    parser.add_argument(
        "--model", nargs="+", choices=PRESETS, default=["SiT-3B/2"], metavar="NAME", help="presets"
    )
    parser.add_argument(
        "--gpus", nargs="+", type=cli.positive_int, default=[64], help="numbers of GPUs"
    )
    parser.add_argument(
        "--shard", nargs="+", choices=sharded_modes, default=["full"], help="as --shard of train.py"
    )
    parser.add_argument(
        "--micro-batch", type=cli.positive_int, default=4, help="images per step and GPU"
    )
    parser.add_argument(
        "--precision", choices=("no", "bf16"), default="bf16", help="mixed precision"
    )
    args = parser.parse_args()
    rows = []
    for model in args.model:
        plan = make_plan(StepConfig(model=model), ["sra2"])
        for num_gpus in args.gpus:
            for shard in args.shard:
                if shard == "hybrid" and num_gpus <= GPUS_PER_NODE:  # the same as full
                    continue
                sizes = (plan, Layout(num_gpus, shard), args.micro_batch, args.precision)
                row = {"model": model, "num_gpus": num_gpus, "shard": shard}
                row |= {"micro_batch": args.micro_batch, "precision": args.precision}
                row["counted_bytes"] = count_step(*sizes)
                row["computed_bytes"] = compute_peak(*sizes)
                rows.append(row)
    result = {"benchmark": "scaling_count", "rows": rows}
    write_result(result, args.json)
    print(f"\n{TABLES['scaling_count'].format([result])}")


if __name__ == "__main__":
    cli.run(main)
