"""What the processes of a run must decide together: a host's word reaches the others without the device being asked.

Hosts run ahead of their devices, each by its own number of steps, so a signal sent to all "at once" reaches them at different
steps. Every step therefore casts a vote whose outcome all read at the end of the next step, and all act at the same one.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = timedelta(
    hours=2
)  # how long the others wait while the first process draws, measures or saves
EXIT_STOPPED = 75  # exit code of a run that a signal asked to stop: EX_TEMPFAIL, start it again


class StopRequest:
    """Remembers that a signal came, and which."""

    name: str | None = None

    def note(self, number: int, frame: object) -> None:
        """A signal handler."""
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGTERM and SIGUSR1 are noted instead of ending the process, for as long as this lasts; when it exits, ignored.

    A launcher that sees one process leave with a code sends the others SIGTERM, which would kill those that close later.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    except SystemExit:
        before = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """For loader processes: a signal to the whole job is the training process's business; they end when it does."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class FlagReducer:
    """votes.cast(a, b) -> whether any process said a, and b; of the step before, or, alone, of this one."""

    def __init__(self, processes: int, questions: int):
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if processes > 1 else None
        self.ballot = torch.zeros(questions, dtype=torch.int32)
        self.pending: dist.Work | None = None

    def cast(self, *answers: bool) -> list[bool]:
        """Once a step on every process."""
        if self.group is None:
            return list(answers)
        outcome = [False] * len(answers)
        if self.pending:
            self.pending.wait()
            outcome = self.ballot.bool().tolist()
        self.ballot = torch.tensor(answers, dtype=torch.int32)
        self.pending = dist.all_reduce(self.ballot, dist.ReduceOp.MAX, self.group, async_op=True)
        return outcome
