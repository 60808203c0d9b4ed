"""Query the CPU cores, the memory and the number of open files that this process may use."""

import math
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch

MIN_BUSY_FRACTION = 0.25  # minimum share of cores used by other programs for a warning


def count_available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_busy_cores(interval: float = 0.2) -> str:
    """Return a warning if other programs slow down operations that use several threads, or "".

    The threads of an operation wait for each other. On cores that other programs use, an operation
    can therefore become many times slower than on one thread.

    Args:
        interval: Time over which the load of the cores is measured, in seconds.
    """
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        return ""
    num_cores = count_available_cores()
    first = _read_busy_seconds()
    time.sleep(interval)
    num_busy = (_read_busy_seconds() - first) / interval
    if num_busy < MIN_BUSY_FRACTION * num_cores:
        return ""
    num_threads = max(1, num_cores - math.ceil(num_busy))
    return (
        f"other programs use about {num_busy:.0f} of the {num_cores} cores, which can make "
        f"this command many times slower; set OMP_NUM_THREADS, for example to {num_threads}"
    )


def _read_busy_seconds() -> float:
    """Return the time for which the available cores have been busy since the system started.

    Return 0 on systems without /proc/stat.
    """
    busy_ticks = 0
    for line in _read_lines("/proc/stat"):  # Linux only
        name, *ticks = line.split()
        core = name.removeprefix("cpu")
        if core.isdecimal() and int(core) in os.sched_getaffinity(0):
            user, nice, system = map(int, ticks[:3])
            busy_ticks += user + nice + system
    return busy_ticks / os.sysconf("SC_CLK_TCK")


def get_memory_sharing_domain() -> tuple:
    """Return a key that is equal for processes that can open each other's files under /proc.

    Such processes run on the same machine, in the same PID namespace and as the same user.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
        pid_namespace = Path("/proc/self/ns/pid").stat().st_ino
        return boot_id, pid_namespace, os.getuid()
    except OSError:
        return os.getpid(), os.uname().nodename


def raise_open_file_limit() -> int:
    """Raise this process's limit on open files as far as the system allows and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def get_available_memory() -> float:
    """Return the memory that can still be allocated, in bytes, or infinity if it is unknown.

    This is the available memory of the machine or the unused part of the job's memory limit,
    whichever is smaller. Containers and SLURM set such limits with control groups (version 2).
    """
    return min(_get_available_machine_memory(), _get_unused_group_memory())


def _get_available_machine_memory() -> float:
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return math.inf


def _get_unused_group_memory() -> float:
    unused = math.inf
    for line in _read_lines("/proc/self/cgroup"):
        if not line.startswith("0::"):  # skip control groups of version 1
            continue
        group = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the file does not exist, or the limit is "max"
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                unused = min(unused, limit - used)
    return unused


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
