"""Communicate between the processes of a command, which runs with or without torchrun."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.machine import count_available_cores


def _read_environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


class World:
    """All processes of one command; Python objects are exchanged between them over gloo.

    Every process must call `close` at the end, so that fast processes wait for slow ones.

    Attributes:
        rank: Rank of this process among all processes.
        num_processes: Number of processes.
        local_rank: Rank of this process among the processes on this machine.
        num_local_processes: Number of processes on this machine.
        cores: Number of CPU cores that the processes on this machine share.
    """

    def __init__(self) -> None:
        self.rank = _read_environment("RANK", 0)
        self.num_processes = _read_environment("WORLD_SIZE", 1)
        self.local_rank = _read_environment("LOCAL_RANK", 0)
        self.num_local_processes = _read_environment("LOCAL_WORLD_SIZE", 1)
        self.cores = count_available_cores()
        if self.num_processes > 1:
            # The timeout is long because one process may finish its share days before another.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def select_device(self) -> torch.device:
        """Return the device of this process: a GPU, which becomes the current one, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def _call(self, collective: Callable, *args: Any) -> None:
        """Call a collective operation, unless this is the only process.

        If another process has ended, gloo raises a plain RuntimeError. This process then exits
        with code 2 and without a traceback, because the other process has printed its error.
        The message of the RuntimeError is also printed, in case it has a different cause.
        """
        if self.num_processes == 1:
            return
        try:
            collective(*args)
        except RuntimeError as error:
            print(
                "another process ended before the work was done; rerun the same command to resume "
                f"({error})",
                file=sys.stderr,
            )
            # Otherwise, a thread of gloo may abort this process while it exits.
            dist.destroy_process_group()
            raise SystemExit(2) from None

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every process."""
        values = [value]
        self._call(dist.broadcast_object_list, values)
        return values[0]

    def run_on_first_rank(self, compute: Callable[[], Any]) -> Any:
        """Call `compute` on rank 0 and return its result on every process.

        Raises:
            Exception: On rank 0, the exception that `compute` raised.
            SystemExit: On the other processes if `compute` failed, with code 2.
        """
        result = None  # a tuple that contains the value, or None if `compute` fails
        if self.rank == 0:
            try:
                result = (compute(),)
            except Exception:
                self.broadcast(None)
                raise
        result = self.broadcast(result)
        if result is None:
            raise SystemExit(2)
        return result[0]

    def all_gather(self, value: Any) -> list:
        """Return the values of all processes, ordered by rank, on every process."""
        values = [value] * self.num_processes
        self._call(dist.all_gather_object, values, value)
        return values

    def gather(self, value: Any) -> list | None:
        """Return the values of all processes, ordered by rank, on rank 0 and None elsewhere."""
        values = [value] * self.num_processes if self.rank == 0 else None
        self._call(dist.gather_object, value, values)
        return values

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self._call(dist.barrier)

    def close(self) -> None:
        """Wait for all processes and leave the process group.

        Without this wait, torchrun would terminate the slower processes as soon as a process exits
        with an error code.
        """
        if self.num_processes > 1:
            self.barrier()
            dist.destroy_process_group()
