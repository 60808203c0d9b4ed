"""What every benchmark shares: several things timed in turn, and the machine that they ran on."""

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import write_file


def describe_machine(device: torch.device) -> dict:
    """What a figure depends on beside the code."""
    info = {
        "device": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in cpuinfo.read_text().splitlines()
        if line.startswith("model name")
    ]
    info["device"] = names[0] if names else info["device"]
    if device.type == "cuda":
        info |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return info | {"torch": torch.__version__, "python": platform.python_version()}


def synchronize(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_first_call(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; of the first, with everything that is compiled, chosen or allocated in it."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def time_in_turn(
    actions: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    calls: int,
    warm_up: int,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times the actions A B C A B C ..., so that a machine whose speed drifts drifts for all: seconds a call, one for each
    round, of `calls` calls without waiting between them; and the peak memory of each in GiB (on CPUs: of the process).
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    peak = dict.fromkeys(actions, 0.0)
    for k in tqdm(range(-warm_up, rounds), unit="round", desc="timing"):
        for name, action in actions.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls):
                action()
            synchronize(device)
            if k >= 0:
                seconds[name].append((time.perf_counter() - started) / calls)
                peak[name] = max(peak[name], peak_memory(device))
    return seconds, peak


def peak_memory(device: torch.device) -> float:
    """GiB, on GPUs since the last reset, on CPUs since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def median_and_quartiles(values: list[float]) -> dict[str, float]:
    """Median, with the quartiles around it."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    )
    return {"median": median, "quartiles": [low, high]}


def ratio_per_round(a: list[float], b: list[float]) -> dict[str, float]:
    """Of a to b, round by round."""
    return median_and_quartiles([x / y for x, y in zip(a, b, strict=True)])


def report(result: dict, path: Path | None) -> None:
    """On the screen, and into the file if one is named."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        write_file(path, (text + "\n").encode())
