"""Communicate between the processes of a command, which runs with or without torchrun."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from common.cli import UserError, first_line
from common.logs import get_logger
from common.machine import count_available_cores
from common.watchdog import waiting_for

logger = get_logger(__name__)

RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds to wait for an answer of the other processes. A closed connection is detected at once.
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class ProcessEnvironment:
    """The ranks and numbers of processes that a launcher sets in the environment."""

    rank: int
    num_processes: int
    local_rank: int
    num_local_processes: int


def read_process_environment() -> ProcessEnvironment:
    """Read and check the environment variables of torchrun and accelerate launch.

    Without them, the command consists of one process.

    Raises:
        UserError: A variable is not a number, is out of range, or is missing while others are set.
    """
    environment = ProcessEnvironment(
        rank=_read_variable("RANK", 0),
        num_processes=_read_variable("WORLD_SIZE", 1),
        local_rank=_read_variable("LOCAL_RANK", 0),
        num_local_processes=_read_variable("LOCAL_WORLD_SIZE", 1),
    )
    if environment.num_processes > 1 or "LOCAL_RANK" in os.environ:
        name = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "WORLD_SIZE"
        missing = [name for name in RENDEZVOUS_VARIABLES if not os.environ.get(name)]
        if missing:
            raise _make_environment_error(name, f"but not {', '.join(missing)}")
    if environment.rank >= environment.num_processes:
        count = environment.num_processes
        raise _make_environment_error("RANK", f"but the number of processes is {count}")
    return environment


def _read_variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or (name.endswith("SIZE") and int(text) == 0):
        raise _make_environment_error(name, "which is not a valid number")
    return int(text)


def _make_environment_error(name: str, problem: str) -> UserError:
    return UserError(
        f"the environment sets {name}={os.environ.get(name)!r}, {problem}; unset {name} to run one "
        "process, or start the command with torchrun or accelerate launch"
    )


@contextmanager
def connecting_processes(environment: ProcessEnvironment) -> Iterator[None]:
    """Report the block as a wait for the other processes to start.

    Raises:
        UserError: The processes cannot connect.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    description = (
        f"{environment.num_processes} processes to connect to {address} (to run one process, unset "
        "RANK, WORLD_SIZE and LOCAL_RANK)"
    )
    try:
        with waiting_for(description):
            yield
    except dist.DistError as error:
        raise UserError(
            f"the processes cannot connect to {address}, which MASTER_ADDR and MASTER_PORT specify "
            f"({first_line(error)}); to run one process, unset RANK, WORLD_SIZE and LOCAL_RANK"
        ) from None


def create_gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return a group of all processes for collectives on the CPU. All processes must call this.

    Args:
        timeout: Limit of each collective; None selects PyTorch's default.
    """
    with waiting_for("the other processes to connect"):
        return dist.new_group(backend="gloo", timeout=timeout)


def has_process_ended(group: dist.ProcessGroup) -> bool:
    """Return whether a collective of the group fails, instead of succeeding or waiting."""
    work = dist.barrier(group, async_op=True)
    deadline = time.monotonic() + ANSWER_SECONDS
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not work.is_completed():
        return False
    try:
        work.wait()
    except RuntimeError:
        return True
    return False


def exit_after_lost_process(reason: str, error: RuntimeError, code: int) -> NoReturn:
    """Exit without a traceback, because the process that ended first has printed its error.

    The backend of the process group must be gloo.

    Args:
        reason: The reason, and how to continue.
        error: Error of the collective, which is also printed, in case it has a different cause.
        code: Exit code.
    """
    logger.error("%s (%s)", reason, error)
    # Otherwise, a thread of gloo may abort this process while it exits.
    dist.destroy_process_group()
    raise SystemExit(code) from None


class World:
    """All processes of one command; Python objects are exchanged between them over gloo.

    Every process must call `close` at the end, so that fast processes wait for slow ones.

    Attributes:
        rank: Rank of this process among all processes.
        num_processes: Number of processes.
        local_rank: Rank of this process among the processes on this machine.
        num_local_processes: Number of processes on this machine.
        cores: Number of CPU cores that the processes on this machine share.

    Raises:
        UserError: The environment variables of a launcher are incomplete.
    """

    def __init__(self) -> None:
        environment = read_process_environment()
        self.rank = environment.rank
        self.num_processes = environment.num_processes
        self.local_rank = environment.local_rank
        self.num_local_processes = environment.num_local_processes
        self.cores = count_available_cores()
        if self.num_processes > 1:
            with connecting_processes(environment):
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

        Raises:
            SystemExit: Another process has ended, with code 2.
        """
        if self.num_processes == 1:
            return
        try:
            with waiting_for(f"the other processes (rank {self.rank} of {self.num_processes})"):
                collective(*args)
        except RuntimeError as error:
            reason = (
                "another process ended before the work was done; rerun the same command to resume"
            )
            exit_after_lost_process(reason, error, code=2)

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
