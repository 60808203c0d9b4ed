"""Report what a process waits for, and end the process if a signal arrives during a long wait.

While the main thread is blocked inside a collective or inside the kernel, Python runs neither its
signal handlers nor any code of this project. A second thread therefore watches the waits. Python
writes the number of each signal that has a handler to a pipe, which this thread reads.
"""

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from common.cli import EXIT_INTERRUPTED, EXIT_STOPPED
from common.logs import get_logger

logger = get_logger(__name__)

REPORT_SECONDS = 30.0
# Seconds after which a signal ends a wait. A handler may end it earlier, in the main thread.
INTERRUPT_SECONDS = 2.0  # for Ctrl-C
# For stop signals. It is long because the first process may draw images while the others wait.
STOP_SECONDS = 240.0
CHECKS_PER_REPORT = 10
PRINT_SECONDS = 5.0  # limit for writing the last message


@dataclass(eq=False)
class Wait:
    """A wait of this process.

    Attributes:
        description: What the process waits for.
        stop_seconds: Seconds after a stop signal until the process ends.
        started: Time at which the wait started.
        is_joint: Whether all processes of the command enter this wait, and wait for each other.
        is_slow: Whether a process may work for long before it enters this joint wait.
        num_reports: Number of reports so far.
        signal_number: The first signal that arrived during the wait, or None.
        deadline: Time at which the signal ends the process.
    """

    description: str
    stop_seconds: float
    started: float
    is_joint: bool = False
    is_slow: bool = False
    num_reports: int = 0
    signal_number: int | None = None
    deadline: float = 0.0


class Watchdog:
    """Watches the waits of this process in a thread that starts with the first wait.

    Args:
        report_seconds: Seconds between the reports of a wait.

    Attributes:
        waits: The current waits; each one is nested in the previous one.
        num_joint_waits: Number of joint waits so far. All processes enter the same ones in the same
            order, so the number shows which process is behind the others.
        step: The training step in progress; None before the first one.
        num_steps: Number of training steps that this process has started.
    """

    def __init__(self, report_seconds: float = REPORT_SECONDS):
        self.report_seconds = report_seconds
        self.waits: list[Wait] = []
        self.thread: threading.Thread | None = None
        self.num_joint_waits = 0
        self.step: int | None = None
        self.num_steps = 0

    @contextmanager
    def watch(
        self,
        description: str,
        stop_seconds: float = STOP_SECONDS,
        is_joint: bool = False,
        is_slow: bool = False,
    ) -> Iterator[None]:
        """Report the block as a wait, and end the process if a signal arrives during a long wait.

        Args:
            description: What the block waits for, as in "waiting for DESCRIPTION".
            stop_seconds: Seconds after a stop signal until the process ends. Ctrl-C ends it sooner.
            is_joint: Whether all processes enter this wait, and wait for each other.
            is_slow: Whether a process may work for long before it enters this joint wait.
        """
        if self.thread is None:
            self._start()
        self.num_joint_waits += is_joint
        wait = Wait(description, stop_seconds, time.monotonic(), is_joint, is_slow)
        self.waits.append(wait)
        try:
            yield
        finally:
            self.waits.remove(wait)

    def find_joint_wait(self) -> Wait | None:
        """Return the innermost wait for the other processes, if any."""
        return next((wait for wait in reversed(list(self.waits)) if wait.is_joint), None)

    def reset(self) -> None:
        """Clear the waits and the thread, which a forked process does not inherit."""
        self.waits = []
        self.thread = None

    def _start(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        with suppress(ValueError):  # only the main thread can receive signals
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(
            target=self._run, args=[read_end], name="watchdog", daemon=True
        )
        self.thread.start()

    def _run(self, signals: int) -> None:
        while self.thread is threading.current_thread():
            timeout = self.report_seconds / CHECKS_PER_REPORT
            readable, _, _ = select.select([signals], [], [], timeout)
            signal_numbers = os.read(signals, 1024) if readable else b""
            for wait in list(self.waits):
                self._check(wait, signal_numbers)

    def _check(self, wait: Wait, signal_numbers: bytes) -> None:
        """Record signals, report the innermost wait if a report is due, and end the process."""
        now = time.monotonic()
        for number in signal_numbers:
            if wait.signal_number is None and number != signal.SIGCHLD:
                wait.signal_number = number
                is_interrupt = number == signal.SIGINT
                wait.deadline = now + (INTERRUPT_SECONDS if is_interrupt else wait.stop_seconds)
        if wait.signal_number is not None and now >= wait.deadline:
            _end_process(wait, wait.signal_number)
        elapsed = now - wait.started
        is_innermost = wait in self.waits[-1:]
        if is_innermost and elapsed >= (wait.num_reports + 1) * self.report_seconds:
            wait.num_reports += 1
            _print(f"waiting for {wait.description} ({elapsed:.0f} s so far)")


def _end_process(wait: Wait, signal_number: int) -> None:
    name = signal.Signals(signal_number).name
    code = EXIT_INTERRUPTED if signal_number == signal.SIGINT else EXIT_STOPPED
    end_process(
        f"{name} ended the wait for {wait.description}; rerun the same command to resume", code
    )


def end_process(message: str, code: int) -> NoReturn:
    """Print a message and end this process and its children, while the main thread is blocked."""
    # In a thread, because a file system that does not answer may block this process as well.
    printing = threading.Thread(target=_print, args=[message], daemon=True)
    printing.start()
    printing.join(PRINT_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _print(message: str) -> None:
    logger.warning(message)


_watchdog = Watchdog()


def waiting_for(
    description: str,
    stop_seconds: float = STOP_SECONDS,
    is_joint: bool = False,
    is_slow: bool = False,
) -> AbstractContextManager[None]:
    """Return the context manager of `Watchdog.watch`, for the watchdog of this process."""
    return _watchdog.watch(description, stop_seconds, is_joint, is_slow)


def waiting_for_processes(description: str, is_slow: bool = False) -> AbstractContextManager[None]:
    """Report the block as a wait for the other processes, all of which must enter it.

    Args:
        description: What the block waits for, as in "waiting for DESCRIPTION".
        is_slow: Whether a process may work for long before it enters the wait.
    """
    return _watchdog.watch(description, is_joint=True, is_slow=is_slow)


def record_step(step: int) -> None:
    """Record the training step that starts, for the messages about this process."""
    _watchdog.step = step
    _watchdog.num_steps += 1


def get_watchdog() -> Watchdog:
    """Return the watchdog of this process."""
    return _watchdog


def _reset_forked_process() -> None:
    _watchdog.reset()
    # Otherwise, signals to this process would be reported to the watchdog of its parent.
    signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_reset_forked_process)
