"""The processes that torchrun started for one command, or this one alone."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.machine import available_cores


@contextmanager
def unless_one_ended() -> Iterator[None]:
    """Another process may end while this one waits for it, and has said why: no place for a traceback."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.distributed has no narrower one for a connection that is gone
        if "onnection" not in str(error):
            raise
        print(
            "another process ended before the work was done: run the same command again to go on",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


class World:
    """rank of processes, the same on this machine, and the cores they share. Close it, so that the fast wait for the slow."""

    def __init__(self) -> None:
        def read(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        self.rank, self.num_processes = read("RANK", 0), read("WORLD_SIZE", 1)
        self.local_rank, self.num_local_processes = (
            read("LOCAL_RANK", 0),
            read("LOCAL_WORLD_SIZE", 1),
        )
        self.cores = available_cores()
        if (
            self.num_processes > 1
        ):  # of words between hosts only, and one may be days behind another
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def select_device(self) -> torch.device:
        """This process's own: a GPU of this machine, if there is one, and then the default of this process."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def broadcast(self, value: Any) -> Any:
        """What the first process gives, on all."""
        values = [value]
        if self.num_processes > 1:
            with unless_one_ended():
                dist.broadcast_object_list(values)
        return values[0]

    def run_on_first_rank(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives on the first process, on all. If it raises there, the others leave quietly with code 2."""
        value, mistake = None, None
        if self.rank == 0:
            try:
                value = compute()
            except Exception as error:
                mistake = error
        value, failed = self.broadcast((value, mistake is not None))
        if failed:
            raise mistake or SystemExit(2)
        return value

    def all_gather(self, value: Any) -> list:
        """What each process gives, in their order, on all."""
        values = [value] * self.num_processes
        if self.num_processes > 1:
            with unless_one_ended():
                dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list | None:
        """What each process gives, in their order, on the first; None on the others."""
        values = [value] * self.num_processes if self.rank == 0 else None
        if self.num_processes > 1:
            with unless_one_ended():
                dist.gather_object(value, values)
        return values

    def barrier(self) -> None:
        """Until all are here."""
        if self.num_processes > 1:
            with unless_one_ended():
                dist.barrier()

    def close(self) -> None:
        """The end, reached by all together: torchrun ends all as soon as one leaves with a code."""
        if self.num_processes > 1:
            self.barrier()
            dist.destroy_process_group()
