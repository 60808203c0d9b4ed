"""Time functions, describe the machine, and write the results of benchmarks."""

import argparse
import json
import platform
import re
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import cli
from common.files import write_file
from common.progress import ProgressBar
from models.sit import PRESETS

Action = Callable[[], object]


class Timings(NamedTuple):
    """Measurements of several actions, by the name of the action.

    Attributes:
        seconds: Seconds per call, one value per round.
        peak_memory_gib: Peak memory of the action on a GPU, or of the whole process on a CPU.
    """

    seconds: dict[str, list[float]]
    peak_memory_gib: dict[str, float]


# Flags that benchmarks share, with keywords of `add_argument`, in the order of the help text.
FLAGS: dict[str, dict[str, Any]] = {
    "ckpt": {"type": Path, "help": "same as --ckpt of sample_ddp.py"},
    "dest": {"type": Path, "help": "folder for temporary files, on the disk to measure"},
    "model": {"choices": PRESETS, "metavar": "NAME", "help": "a preset from models/sit.py"},
    "vae": {"help": "hub id or folder (default: random weights)"},
    "images": {"type": cli.positive_int, "help": "number of images"},
    "resolution": {"type": cli.positive_int, "help": "height and width of the images in pixels"},
    "batch_size": {"type": cli.positive_int, "help": "images per batch"},
    "num_steps": {"type": cli.positive_int, "help": "number of steps from noise to data"},
    "device": {
        "type": cli.device,
        "help": "device that runs the code of this repository",
    },
    "rounds": {
        "type": cli.positive_int,
        "help": "number of timed rounds; their median is reported",
    },
    "warm_up": {
        "type": cli.non_negative_int,
        "help": "number of untimed rounds before the timed rounds",
    },
    "json": {"type": Path, "help": "file for the result"},
}


def make_parser(doc: str | None, benchmark: str, *required: str, **defaults: Any) -> cli.Parser:
    """Return a parser with --json and a selection of the flags in FLAGS.

    Args:
        doc: Docstring of the benchmark.
        benchmark: Module name of the benchmark.
        required: Keys of the required flags. Their values are paths.
        defaults: Keys and default values of the optional flags.
    """
    usage = " ".join(f"--{key} PATH" for key in required) or "[--json PATH]"
    parser = cli.Parser(doc, f"python -m benchmarks.{benchmark}", usage)
    for key, options in FLAGS.items():
        if key in (*required, *defaults, "json"):
            parser.add_argument(
                f"--{key.replace('_', '-')}",
                required=key in required,
                default=defaults.get(key),
                **options,
            )
    parser.set_defaults(benchmark=benchmark)
    return parser


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder, and remove the folder with its contents on exit from the context."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def describe_machine(device: torch.device) -> dict:
    """Return the hardware and the software versions on which results depend."""
    model_name = re.search(r"model name\s*: (.*\S)", Path("/proc/cpuinfo").read_text())
    cpu = model_name[1] if model_name else platform.processor() or platform.machine()
    info = {"device": cpu, "cpu_threads": torch.get_num_threads()}
    if device.type == "cuda":
        info |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return info | {"torch": torch.__version__, "python": platform.python_version()}


def synchronize(device: torch.device) -> None:
    """Synchronize the host with the device if the device is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(action: Action, device: torch.device, calls: int = 1) -> float:
    """Measure the seconds per call of consecutive calls without synchronization between them."""
    synchronize(device)
    start_time = time.perf_counter()
    for _ in range(calls):
        action()
    synchronize(device)
    return (time.perf_counter() - start_time) / calls


def time_interleaved(
    actions: Mapping[str, Action],
    device: torch.device,
    rounds: int,
    calls: int = 1,
    warm_up: int = 1,
    prepare: Action = lambda: None,
) -> Timings:
    """Time actions in rotation (A B C A B C ...).

    A drift in machine speed therefore affects all actions equally.

    Args:
        actions: The actions by name.
        device: Device on which the actions run.
        rounds: Number of timed rounds.
        calls: Number of calls of an action per round.
        warm_up: Number of untimed rounds before the timed rounds.
        prepare: Function that is called before each action. The call is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    peak_memory_gib = dict.fromkeys(actions, 0.0)
    for round_index in ProgressBar(range(-warm_up, rounds), unit="round", desc="timing"):
        for name, action in actions.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            prepare()
            call_seconds = time_call(action, device, calls)
            if round_index >= 0:
                seconds[name].append(call_seconds)
                memory_gib = read_peak_memory_gib(device)
                peak_memory_gib[name] = max(peak_memory_gib[name], memory_gib)
    return Timings(seconds, peak_memory_gib)


def read_peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of a GPU since the last reset, or of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


def median_and_quartiles(values: Sequence[float] | np.ndarray) -> dict:
    """Return the median and the quartiles [low, high] of values."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "quartiles": [low, high]}


def compare_times(
    seconds: dict[str, list[float]], pairs: Iterable[tuple[str, str]]
) -> dict[str, dict]:
    """Return the time of the first action of each pair relative to the time of the second.

    Args:
        seconds: Seconds per call by the name of the action, one value per round.
        pairs: Pairs of names of actions. Pairs with an action that was not timed are omitted.

    Returns:
        Median and quartiles over rounds, by "FIRST/SECOND".
    """
    return {
        f"{a}/{b}": median_and_quartiles(np.divide(seconds[a], seconds[b]))
        for a, b in pairs
        if {a, b} <= seconds.keys()
    }


def compute_per_image_results(
    timings: Timings, name: str, num_images: int, flops: int, matmul_rate: float
) -> dict:
    """Return the measurements per image of an action that processes images.

    Args:
        timings: The measurements.
        name: Name of the action.
        num_images: Number of images per call.
        flops: FLOPs per image, or 0 if they were not counted.
        matmul_rate: Rate of large matrix products in FLOP/s.
    """
    seconds = timings.seconds[name]
    images_per_s = num_images / statistics.median(seconds)
    return {
        "image_s": median_and_quartiles(np.divide(seconds, num_images)),
        "images_per_s": images_per_s,
        "share_of_matmul_rate": flops * images_per_s / matmul_rate if flops else None,
        "peak_memory_gib": timings.peak_memory_gib[name],
    }


def count_flops(action: Action) -> int:
    """Run an action, and return the number of FLOPs that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def report(
    args: argparse.Namespace, device: torch.device, recorded_flags: Iterable[str], **entries: Any
) -> None:
    """Print and write the result of a benchmark: its name, the machine, flags, and measurements.

    Args:
        args: Flags from a parser that `make_parser` returned.
        device: Device of the measurements.
        recorded_flags: Names of the flags to include in the result.
        entries: Further entries of the result.
    """
    result = {"benchmark": args.benchmark, "machine": describe_machine(device)}
    flags = {key: getattr(args, key) for key in recorded_flags}
    write_result(result | flags | entries, args.json)


def write_result(result: dict, path: Path | None) -> None:
    """Print a result as JSON, and also write it to `path` unless `path` is None."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        write_file(path, (text + "\n").encode())
