"""Timing, descriptions of the machine, and output for all benchmarks."""

import argparse
import json
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import cli
from common.files import write_file


class Timings(NamedTuple):
    """Measurements of several actions, by name."""

    seconds: dict[str, list[float]]  # per call, one value per round
    peak_memory_gib: dict[str, float]  # GPU: during the action; CPU: of the process so far


def add_result_flags(
    parser: argparse.ArgumentParser, rounds: int, warm_up: int | None = None
) -> None:
    """Add --rounds, --warm-up and --json to a parser.

    Args:
        parser: The parser.
        rounds: Default number of timed rounds.
        warm_up: Default number of rounds before them. If None, there is no such flag.
    """
    parser.add_argument(
        "--rounds",
        type=cli.positive_int,
        default=rounds,
        help="number of timed rounds, over which the median is taken",
    )
    if warm_up is not None:
        parser.add_argument(
            "--warm-up",
            type=cli.non_negative_int,
            default=warm_up,
            help="number of rounds before the timed ones",
        )
    parser.add_argument("--json", type=Path, help="file for the result")


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder, and remove it with its contents at the end of the block."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def describe_machine(device: torch.device) -> dict:
    """Return the hardware and the versions that results depend on."""
    info = {"device": _cpu_name(), "cpu_threads": torch.get_num_threads()}
    if device.type == "cuda":
        info |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return info | {"torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has completed its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(action: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds per call, over calls without host-device synchronisation between them."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        action()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def time_in_turn(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    calls: int = 1,
    warm_up: int = 1,
) -> Timings:
    """Time actions in turn (A B C A B C ...), so that a drift of the machine's speed affects all.

    Args:
        actions: The actions by name.
        device: Device that they run on.
        rounds: Number of timed rounds.
        calls: Calls of an action per round.
        warm_up: Number of rounds before the timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    peak = dict.fromkeys(actions, 0.0)
    for k in tqdm(range(-warm_up, rounds), unit="round", desc="timing"):
        for name, action in actions.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            value = time_call(action, device, calls)
            if k >= 0:
                seconds[name].append(value)
                peak[name] = max(peak[name], peak_memory(device))
    return Timings(seconds, peak)


def peak_memory(device: torch.device) -> float:
    """Return peak memory in GiB: of a GPU since the last reset, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def median_and_quartiles(values: list[float]) -> dict:
    """Return the median of values, and their quartiles as [low, high]."""
    low = median = high = values[0]
    if len(values) > 1:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high]}


def ratio_per_round(a: list[float], b: list[float]) -> dict:
    """Return median and quartiles of a / b, taken round by round."""
    return median_and_quartiles([x / y for x, y in zip(a, b, strict=True)])


def report(result: dict, path: Path | None) -> None:
    """Print a result as JSON, and write it to a file if there is a path."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        write_file(path, (text + "\n").encode())
