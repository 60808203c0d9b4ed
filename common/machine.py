"""Query the CPU cores, the memory and the number of open files that this process may use."""

import math
import os
import resource
from contextlib import suppress
from pathlib import Path


def count_available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
