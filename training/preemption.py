"""Handle stop signals so that all processes of a run stop at the same step.

Hosts run ahead of their devices by different numbers of steps, so a signal sent to all processes
arrives at a different step on each. In every step the processes therefore exchange flags over gloo,
without synchronizing the GPU, and read the result one step later.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from common.cli import UserError
from common.processes import create_gloo_group
from common.watchdog import waiting_for_processes
from training.coordination import GROUP_TIMEOUT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Records whether a stop signal arrived, and which one, or whether a STOP file exists.

    Attributes:
        name: Name of the signal or path of the file; None while the run continues.
        is_final: Whether the file stopped the run, so that no launcher should restart it.
    """

    name: str | None = None
    is_final: bool = False

    def handle(self, number: int, frame: object) -> None:
        """Record a signal; used as a signal handler."""
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGUSR1 instead of terminating the process.

    After SystemExit or UserError the signals are ignored: when one process exits with a non-zero
    code, the launcher sends SIGTERM to the others, which would kill those that are still shutting
    down, possibly before they print their error.
    """
    request = StopRequest()
    handlers = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    except (SystemExit, UserError):
        handlers = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Ignore stop signals in a DataLoader worker, which ends together with its training process."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class FlagReducer:
    """OR-reduces boolean flags over all processes.

    The result lags by one step, except with a single process.

    Args:
        num_processes: Number of processes.
        num_flags: Number of flags per step.
    """

    def __init__(self, num_processes: int, num_flags: int):
        self.group = None
        if num_processes > 1:
            self.group = create_gloo_group(GROUP_TIMEOUT)
        self.flags = torch.zeros(num_flags, dtype=torch.int32)
        self.pending: dist.Work | None = None

    def reduce(self, *flags: bool) -> list[bool]:
        """Submit this step's flags and return those of the previous step, OR-reduced.

        Call it once per step on every process. With one process it returns this step's flags.
        """
        if self.group is None:
            return list(flags)
        result = [False] * len(flags)
        if self.pending:
            with waiting_for_processes("the other processes to finish the step"):
                self.pending.wait()
            result = self.flags.bool().tolist()
        self.flags = torch.tensor(flags, dtype=torch.int32)
        self.pending = dist.all_reduce(self.flags, dist.ReduceOp.MAX, self.group, async_op=True)
        return result
