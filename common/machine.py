"""What this machine can give a process, and what a scheduler or container leaves of it."""

import math
import os
import resource
from contextlib import suppress
from pathlib import Path


def available_cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_sharing_domain() -> tuple:
    """What processes have in common that can open each other's files in /proc: machine, view of its processes, user."""
    try:
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text(),
            os.stat("/proc/self/ns/pid").st_ino,
            os.getuid(),
        )
    except OSError:
        return (os.getpid(), os.uname().nodename)


def raise_open_file_limit() -> int:
    """How many files a process may open here. Asks for as many as the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (ValueError, OSError):
        pass
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def available_memory() -> float:
    """Bytes that this machine, and the job's own limit on it, can give; infinity where neither says."""
    free = math.inf
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    with suppress(
        OSError, StopIteration
    ):  # version 2 control groups: what a container or SLURM allows
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        inner = Path("/sys/fs/cgroup") / next(line for line in lines if line.startswith("0::"))[
            3:
        ].lstrip("/")
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # the file is not there, or says "max"
                most, used = (
                    int((group / f"memory.{name}").read_text()) for name in ("max", "current")
                )
                free = min(free, most - used)
    return free
