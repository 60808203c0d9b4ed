"""Find the process that blocks a run, and end the run so that a job script can restart it.

A process may hang, for example in a file system that does not answer, or be lost together with its
machine. The others are then blocked in a collective. After a time limit, a thread of each process
compares the heartbeats, prints which process is missing, and ends its process with code 75.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from common.cli import EXIT_STOPPED, UserError, first_line
from common.processes import create_gloo_group, exit_after_lost_process, has_process_ended
from common.watchdog import Wait, Watchdog, end_process, get_watchdog
from training.config import DeviceConfig
from training.coordination import PREPARE_TIMEOUT, SLOW_TIMEOUT, broadcast_object, wait_for_all
from training.heartbeat import (
    EXCHANGE_SECONDS,
    Cause,
    HeartbeatExchange,
    describe_processes,
    find_missing,
    read_heartbeat,
)

MAX_INTERVAL = 1.0  # seconds between heartbeats
INTERVALS_PER_LIMIT = 40  # shorter intervals for the short limits of tests
# After a collective has failed, a process whose heartbeat does not change in this many reads has
# ended.
LOST_READS = 4
# Steps of a session that may include compilation; the result of a step is awaited in the next one.
NUM_COMPILING_STEPS = 2


class HangDetector:
    """Watches the waits for other processes in a thread.

    Args:
        exchange: The heartbeats of all processes.
        watchdog: Records the waits of this process.
        limit: Seconds that a wait in a training step may take.
        num_slow_steps: Number of steps of this session that may take as long as slow work.
        slow_limit: Seconds that a wait for slow work may take.
        prepare_limit: Seconds that a wait for slow work before the first step may take.
        end: Ends this process with a message and an exit code.
    """

    def __init__(
        self,
        exchange: HeartbeatExchange,
        watchdog: Watchdog,
        limit: float,
        num_slow_steps: int = 0,
        slow_limit: float = SLOW_TIMEOUT.total_seconds(),
        prepare_limit: float = PREPARE_TIMEOUT.total_seconds(),
        end: Callable[[str, int], None] = end_process,
    ):
        self.exchange = exchange
        self.watchdog = watchdog
        self.limit = limit
        self.num_slow_steps = num_slow_steps
        self.slow_limit = max(limit, slow_limit)
        self.prepare_limit = max(limit, prepare_limit)
        self.end = end
        # The wait of this process, the line at which it is blocked, and the start of the wait.
        self.wait: Wait | None = None
        self.location = ""
        self.started = 0.0
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="hang detector", daemon=True)

    def start(self) -> None:
        """Start the threads, after all processes have prepared the exchange."""
        self.exchange.start()
        self.thread.start()

    def close(self) -> None:
        """End the threads."""
        self.closed.set()
        self.exchange.close()
        self.thread.join(1)

    def check(self) -> None:
        """End this process if it waits for a process that is lost or exceeds the time limit."""
        now = self.exchange.clock.read()
        wait = self.watchdog.find_joint_wait()
        location = self.exchange.read().location
        if wait is not self.wait or location != self.location:
            self.wait = wait
            self.location = location
            self.started = now
            self.exchange.observes_all = False
        if wait is None:
            return
        elapsed = now - self.started
        if elapsed >= self.limit / 2 and not self.exchange.observes_all:
            self.exchange.observe_all()
        # Collectives over gloo fail soon after another process has ended, but those over NCCL wait.
        if self.exchange.cause and now - self.exchange.cause_time >= EXCHANGE_SECONDS:
            self._end(self.exchange.cause)
            return
        if elapsed < self.limit:
            return
        reason = self.find_reason(elapsed >= self.get_limit(wait))
        if reason:
            message = (
                f"gave up after {elapsed:.0f} s of waiting for {wait.description}: {reason}; rerun "
                "the same command to resume"
            )
            self._end(Cause(EXIT_STOPPED, message))

    def get_limit(self, wait: Wait) -> float:
        """Return the seconds after which a process that is alive must have arrived."""
        if wait.is_slow and self.watchdog.step is None:
            return self.prepare_limit
        if wait.is_slow or 0 < self.watchdog.num_steps <= self.num_slow_steps:
            return self.slow_limit
        return self.limit

    def find_reason(self, is_expired: bool) -> str:
        """Return which processes are missing, or "" if the wait may continue.

        Args:
            is_expired: Whether a process that is alive must have arrived by now.
        """
        now = self.exchange.clock.read()
        # The heartbeats have been observed for half of the limit.
        silence = self.limit / 4
        change_times = dict(self.exchange.change_times)
        heartbeats = dict(self.exchange.heartbeats)
        silent = [rank for rank, time_ in sorted(change_times.items()) if now - time_ >= silence]
        # The store returns the heartbeats of this process as well, as long as it answers.
        is_answering = self.exchange.rank in change_times and self.exchange.rank not in silent
        if not self.exchange.is_connected or not is_answering:
            # The store is part of the first process, or of the launcher on its machine.
            return f"no answer from {describe_processes([0], heartbeats)}"
        if silent:
            return f"no heartbeat from {describe_processes(silent, heartbeats)}"
        observed = {rank: heartbeats[rank] for rank in change_times}
        if not is_expired or len(observed) < self.exchange.num_processes:
            return ""
        missing = find_missing(observed)
        if len(missing) < len(observed):
            return (
                f"{describe_processes(missing, heartbeats)} did not arrive (if it is only slow, "
                "raise --collective-timeout)"
            )
        return (
            "all have arrived, so one of them, a GPU or the network hangs (NCCL_DEBUG=INFO shows "
            f"more): {describe_processes(missing, heartbeats)}"
        )

    def find_cause_of_loss(self) -> Cause:
        """Return which process has ended, after a collective has failed for this reason."""
        exchange = self.exchange
        exchange.is_ending = True  # so that the others do not regard this process as the cause
        exchange.observe_all()
        exchange.wake.set()
        # Compare the heartbeats at two times, unless the process that ended has stated the cause.
        has_answered = self._wait_for_reads(2)
        before = dict(exchange.heartbeats)
        has_answered = has_answered and self._wait_for_reads(LOST_READS)
        if exchange.cause:
            return exchange.cause
        after = dict(exchange.heartbeats)
        lost = [0]  # it may serve the store
        if has_answered:
            lost = [
                rank
                for rank, heartbeat in sorted(after.items())
                if heartbeat == before.get(rank) and not heartbeat.is_ending
            ]
        name = describe_processes(lost, after) if lost else "another process"
        return Cause(
            EXIT_STOPPED,
            f"{name} ended before the work was done; rerun the same command to resume",
        )

    def _wait_for_reads(self, number: int) -> bool:
        """Wait for further reads of the heartbeats, and return whether the store has answered."""
        exchange = self.exchange
        last_read = exchange.num_reads + number
        deadline = time.monotonic() + EXCHANGE_SECONDS + number * exchange.interval
        while exchange.num_reads < last_read:
            if exchange.cause or not exchange.is_connected or time.monotonic() >= deadline:
                return False
            time.sleep(exchange.interval / 2)
        return True

    def announce(self, cause: Cause) -> None:
        """Tell the other processes why this one ends."""
        self.exchange.announce(cause)
        if self.exchange.rank == 0:  # it may serve the store, from which the others read the cause
            time.sleep(2 * self.exchange.interval)

    def _run(self) -> None:
        while not self.closed.wait(self.exchange.interval):
            self.check()

    def _end(self, cause: Cause) -> None:
        self.announce(cause)
        self.end(cause.message, cause.code)


def make_hang_detector(config: DeviceConfig, rank: int, num_processes: int) -> HangDetector:
    """Build the detector of this process. All processes must call this together."""
    limit = timedelta(minutes=config.collective_timeout).total_seconds()
    watchdog = get_watchdog()
    host = socket.gethostname()
    # torchrun keeps its store when it restarts the processes.
    prefix = broadcast_object(uuid.uuid4().hex, "the first process to connect")
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
    )
    exchange = HeartbeatExchange(
        dist.PrefixStore(prefix, store),
        rank,
        num_processes,
        lambda: read_heartbeat(watchdog, host),
        min(MAX_INTERVAL, limit / INTERVALS_PER_LIMIT),
    )
    exchange.prepare()
    wait_for_all("the other processes to connect")
    num_slow_steps = NUM_COMPILING_STEPS if config.compile else 0
    return HangDetector(exchange, watchdog, limit, num_slow_steps)


@contextmanager
def ending_with_the_others(config: DeviceConfig, rank: int, num_processes: int) -> Iterator[None]:
    """End this process with a one-line message if another one has ended or does not answer.

    If a process is killed, the collectives of the others raise RuntimeError. Since other errors
    have the same type, a collective of a separate group then shows whether a process has ended. All
    processes must enter the block together, and they wait for each other at its end.

    Raises:
        SystemExit: Another process has ended: with code 75 if it was killed, or with its exit code
            if it failed.
    """
    if num_processes == 1:
        yield
        return
    group = create_gloo_group()  # its only collective is the barrier after an error
    detector = make_hang_detector(config, rank, num_processes)
    detector.start()
    try:
        yield
        # Wait, because a launcher kills the other processes as soon as one exits with an error.
        wait_for_all("the other processes to finish")
        # The first process serves the store, so it ends after all others have left it.
        detector.close()
        wait_for_all("the other processes to finish")
    except RuntimeError as error:
        if not has_process_ended(group):
            _announce_failure(detector, error)
            raise
        _exit_with_the_others(detector, error)
    except Exception as error:
        _announce_failure(detector, error)
        raise
    finally:
        detector.close()


def _announce_failure(detector: HangDetector, error: Exception) -> None:
    """Tell the other processes that this one fails, so that they end with code 2 as well."""
    message = str(error) if isinstance(error, UserError) else first_line(error)
    detector.announce(Cause(2, f"rank {detector.exchange.rank} failed: {message}"))


def _exit_with_the_others(detector: HangDetector, error: RuntimeError) -> NoReturn:
    cause = detector.find_cause_of_loss()
    if dist.get_backend() != "gloo":
        # The collectives of NCCL do not fail, and the interpreter would wait for them at its exit.
        end_process(f"{cause.message} ({error})", cause.code)
    exit_after_lost_process(cause.message, error, cause.code)
