"""Test that long waits are reported and that signals end them."""

import multiprocessing
import queue
import signal
import threading
from types import SimpleNamespace

import pytest

from common import watchdog
from common.watchdog import Watchdog, waiting_for


@pytest.fixture
def printed_lines(monkeypatch) -> queue.Queue:
    """A queue of the lines that watchdogs print."""
    lines = queue.Queue()
    monkeypatch.setattr(watchdog, "_print", lines.put)
    return lines


@pytest.fixture
def fast_watchdog() -> Watchdog:
    """A watchdog that reports often."""
    fast_watchdog = Watchdog(report_seconds=0.02)
    yield fast_watchdog
    fast_watchdog.reset()


@pytest.fixture
def end_calls(monkeypatch) -> queue.Queue:
    """A queue of the waits and signals that would end the process."""
    calls = queue.Queue()
    monkeypatch.setattr(watchdog, "_end_process", lambda *args: calls.put(args))
    previous_pipe = signal.set_wakeup_fd(-1)
    previous_handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield calls
    signal.signal(signal.SIGUSR1, previous_handler)
    signal.set_wakeup_fd(previous_pipe)


def test_a_wait_is_reported_repeatedly_until_it_ends(fast_watchdog, printed_lines):
    with fast_watchdog.watch("a slow disk"):
        for _ in range(3):
            assert printed_lines.get(timeout=60).startswith("waiting for a slow disk (")
    assert not fast_watchdog.waits


def test_a_short_wait_is_not_reported(fast_watchdog, printed_lines, monkeypatch):
    """The time never changes. The clock is read when the wait starts and at each check."""
    readings = queue.Queue()
    clock = SimpleNamespace(monotonic=lambda: readings.put(None) or 7.0)
    monkeypatch.setattr(watchdog, "time", clock)
    with fast_watchdog.watch("a fast disk"):
        for _ in range(4):
            readings.get(timeout=60)
    assert printed_lines.empty()


def test_waits_may_be_nested_and_end_with_an_exception(fast_watchdog):
    with fast_watchdog.watch("outer"):
        with pytest.raises(KeyError), fast_watchdog.watch("inner"):
            {}["missing"]
        assert [wait.description for wait in fast_watchdog.waits] == ["outer"]
    assert not fast_watchdog.waits


def test_only_the_innermost_wait_is_reported(fast_watchdog, printed_lines):
    with fast_watchdog.watch("outer"), fast_watchdog.watch("inner"):
        lines = [printed_lines.get(timeout=60) for _ in range(4)]
    assert all(line.startswith("waiting for inner (") for line in lines[1:])


def test_joint_waits_are_counted_and_found(fast_watchdog):
    with (
        fast_watchdog.watch("outer", is_joint=True),
        fast_watchdog.watch("inner", is_joint=True),
        fast_watchdog.watch("data"),
    ):
        assert fast_watchdog.find_joint_wait().description == "inner"
    assert fast_watchdog.find_joint_wait() is None
    assert fast_watchdog.num_joint_waits == 2


def test_a_signal_ends_a_wait_whose_thread_is_blocked(fast_watchdog, end_calls):
    with fast_watchdog.watch("a collective", stop_seconds=0):
        signal.raise_signal(signal.SIGUSR1)
        wait, number = end_calls.get(timeout=60)
    assert (wait.description, number) == ("a collective", signal.SIGUSR1)


def test_a_signal_leaves_time_for_the_wait_to_end_by_itself(
    fast_watchdog, end_calls, printed_lines
):
    with fast_watchdog.watch("a collective", stop_seconds=1000):
        signal.raise_signal(signal.SIGUSR1)
        for _ in range(3):
            printed_lines.get(timeout=60)
    assert end_calls.empty()


def test_processes_without_a_wait_are_not_ended(fast_watchdog, end_calls, printed_lines):
    with fast_watchdog.watch("an earlier wait", stop_seconds=0):
        pass
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    with fast_watchdog.watch("a later wait", stop_seconds=1000):
        printed_lines.get(timeout=60)
    assert end_calls.empty()


def test_process_ends_even_if_its_message_cannot_be_written(monkeypatch):
    codes = []
    disk_answers = threading.Event()
    printed = []

    def print_to_slow_disk(message):
        disk_answers.wait(20)
        printed.append(message)

    monkeypatch.setattr(watchdog, "_print", print_to_slow_disk)
    monkeypatch.setattr(watchdog, "PRINT_SECONDS", 0.01)
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    watchdog.end_process("a message", 75)
    assert codes == [75] and not printed
    disk_answers.set()


def test_a_forked_process_starts_its_own_watchdog():
    with waiting_for("anything"):
        context = multiprocessing.get_context("fork")
        child = context.Process(target=check_forked_process)
        child.start()
        child.join(60)
    assert child.exitcode == 0


def check_forked_process():
    assert not watchdog._watchdog.waits
    assert watchdog._watchdog.thread is None
    assert signal.set_wakeup_fd(-1) == -1
