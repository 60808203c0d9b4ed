"""Exchange heartbeats between the processes of a run, to find the process that blocks the others.

A thread of each process writes a heartbeat to the key-value store of the process group about once
a second. It needs neither the main thread nor the GPU, so it continues while these are blocked.
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from common.watchdog import Watchdog

ROOT = Path(__file__).absolute().parent.parent
MAX_GAP_SECONDS = 5.0  # longer pauses of this process count as this many seconds
# Limit for one exchange with the store, and for a process to end after another process has ended.
EXCHANGE_SECONDS = 5.0
CAUSE_KEY = "cause"
MAX_LISTED = 3  # maximum number of processes that a message lists


@dataclass(frozen=True)
class Heartbeat:
    """The current activity of a process.

    Attributes:
        host: Name of its machine.
        step: The training step in progress; None before the first one.
        num_waits: Number of joint waits that the process has entered.
        operation: What the process waits for, or "".
        location: The line of this project that the main thread is executing, or "".
        is_ending: Whether the process ends because another one has ended.
        count: Number of heartbeats so far.
    """

    host: str
    step: int | None = None
    num_waits: int = 0
    operation: str = ""
    location: str = ""
    is_ending: bool = False
    count: int = 0

    def describe(self) -> str:
        """Return the step, the operation and the line."""
        parts = ["before the first step" if self.step is None else f"step {self.step:,}"]
        if self.operation:
            parts.append(f"waiting for {self.operation}")
        if self.location:
            parts.append(f"at {self.location}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Cause:
    """Why a process ends, for the message and the exit code of the others."""

    code: int
    message: str


class ActiveClock:
    """Measures the time in which this process was running, in seconds.

    A pause of the whole job, for example while it is suspended, does not count as waiting.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds = 0.0
        self.last = time.monotonic()

    def read(self) -> float:
        """Return the seconds so far, counting at most MAX_GAP_SECONDS between two calls."""
        with self.lock:
            now = time.monotonic()
            self.seconds += min(now - self.last, MAX_GAP_SECONDS)
            self.last = now
            return self.seconds


def read_heartbeat(watchdog: Watchdog, host: str) -> Heartbeat:
    """Return what this process is doing, from any thread."""
    waits = list(watchdog.waits)
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return Heartbeat(
        host,
        watchdog.step,
        watchdog.num_joint_waits,
        waits[-1].description if waits else "",
        find_location(frame),
    )


def find_location(frame: FrameType | None) -> str:
    """Return the innermost line of this project in a call stack, as in "dataset.py:12 (read)"."""
    while frame is not None:
        # The path is not resolved, because the file system may not answer.
        path = Path(frame.f_code.co_filename).absolute()
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def find_missing(heartbeats: Mapping[int, Heartbeat]) -> list[int]:
    """Return the processes that the others wait for; all of them if that is unknown.

    They have entered fewer joint waits than the others. If all have entered the same number, a
    process may be stuck within the wait, where it executes a different line than most processes.
    """
    fewest = min(heartbeat.num_waits for heartbeat in heartbeats.values())
    missing = sorted(rank for rank, h in heartbeats.items() if h.num_waits == fewest)
    if len(missing) < len(heartbeats):
        return missing
    locations = Counter(heartbeat.location for heartbeat in heartbeats.values())
    location, num_processes = locations.most_common(1)[0]
    if len(heartbeats) / 2 < num_processes < len(heartbeats):
        return sorted(rank for rank, h in heartbeats.items() if h.location != location)
    return missing


def describe_processes(ranks: Sequence[int], heartbeats: Mapping[int, Heartbeat]) -> str:
    """Return ranks, hosts and operations of processes; their number if there are many."""
    texts = []
    for rank in ranks[:MAX_LISTED]:
        heartbeat = heartbeats.get(rank)
        details = f" on {heartbeat.host} ({heartbeat.describe()})" if heartbeat else ""
        texts.append(f"rank {rank}{details}")
    num_omitted = len(ranks) - MAX_LISTED
    if num_omitted > 0:
        texts.append(f"{num_omitted} more")
    return " and ".join(texts)


@dataclass(eq=False)
class HeartbeatExchange:
    """Writes the heartbeats of this process and reads those of the others, in a thread.

    The thread may be blocked in the store indefinitely if the process that serves it is stopped, so
    no other thread uses the store.

    Attributes:
        store: The key-value store.
        rank: Rank of this process.
        num_processes: Number of processes.
        read: Returns the current heartbeat of this process, without its count.
        interval: Seconds between heartbeats.
        clock: Clock of the observations.
        observes_all: Whether to read the heartbeats of all processes; otherwise only the first one.
        is_ending: Whether this process ends because another one has ended.
        heartbeats: The newest heartbeats by rank.
        change_times: Time at which each heartbeat changed, or was first read since `observe_all`.
        is_connected: Whether the store still exists.
        cause: Why the first process that ended has ended, or None if that is unknown.
        cause_time: Time at which the cause was read.
        num_reads: Number of answers of the store so far.
    """

    store: dist.Store
    rank: int
    num_processes: int
    read: Callable[[], Heartbeat]
    interval: float
    clock: ActiveClock = field(default_factory=ActiveClock)
    observes_all: bool = field(default=False, init=False)
    is_ending: bool = field(default=False, init=False)
    heartbeats: dict[int, Heartbeat] = field(default_factory=dict, init=False)
    change_times: dict[int, float] = field(default_factory=dict, init=False)
    is_connected: bool = field(default=True, init=False)
    cause: Cause | None = field(default=None, init=False)
    cause_time: float = field(default=0.0, init=False)
    num_reads: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.count = 0
        self.cause_to_write: Cause | None = None
        self.wake = threading.Event()
        self.has_written_cause = threading.Event()
        self.is_closed = False
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def prepare(self) -> None:
        """Write the first values, so that a later read finds them. Call this before `start`."""
        if self.rank == 0:
            self.store.set(CAUSE_KEY, "")
        self._write()

    def start(self) -> None:
        """Start the thread, after all processes have called `prepare`."""
        self.thread.start()

    def observe_all(self) -> None:
        """Read the heartbeats of all processes, and measure for how long each has not changed."""
        self.change_times = {}
        self.observes_all = True

    def announce(self, cause: Cause) -> None:
        """Tell the other processes why this one ends, unless another one did so before."""
        self.cause_to_write = cause
        self.wake.set()
        self.has_written_cause.wait(EXCHANGE_SECONDS)

    def close(self) -> None:
        """End the thread, unless it is blocked in the store."""
        self.is_closed = True
        self.wake.set()
        self.thread.join(EXCHANGE_SECONDS)

    def _run(self) -> None:
        while not self.is_closed:
            try:
                self._exchange()
            except RuntimeError:  # the process that serves the store has ended
                self.is_connected = False
                self.has_written_cause.set()
                return
            self.wake.wait(self.interval)
            self.wake.clear()

    def _exchange(self) -> None:
        self._write()
        if self.cause_to_write:
            self.store.compare_set(CAUSE_KEY, "", json.dumps(asdict(self.cause_to_write)))
            self.has_written_cause.set()
        ranks = range(self.num_processes if self.observes_all else 1)
        cause, *texts = self.store.multi_get([CAUSE_KEY, *map(_make_key, ranks)])
        now = self.clock.read()
        if cause and self.cause is None:
            self.cause_time = now
            self.cause = Cause(**json.loads(cause))
        for rank, text in zip(ranks, texts):
            heartbeat = Heartbeat(**json.loads(text))
            if rank not in self.change_times or heartbeat != self.heartbeats[rank]:
                self.change_times[rank] = now
            self.heartbeats[rank] = heartbeat
        self.num_reads += 1

    def _write(self) -> None:
        self.count += 1
        heartbeat = asdict(self.read()) | {"count": self.count, "is_ending": self.is_ending}
        self.store.set(_make_key(self.rank), json.dumps(heartbeat))


def _make_key(rank: int) -> str:
    return f"heartbeat/{rank}"
