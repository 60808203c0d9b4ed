"""Test what heartbeats contain, and how missing processes are found and described."""

import sys
import threading
from multiprocessing.pool import ThreadPool

from training import heartbeat
from training.heartbeat import (
    ActiveClock,
    Heartbeat,
    describe_processes,
    find_location,
    find_missing,
    read_heartbeat,
)


def test_missing_process_has_entered_the_fewest_waits_or_executes_another_line():
    ahead = Heartbeat("a", num_waits=5, location="loss.py:1 (f)")
    behind = Heartbeat("a", num_waits=4, location="loss.py:1 (f)")
    elsewhere = Heartbeat("a", num_waits=5, location="dataset.py:1 (g)")
    assert find_missing({0: ahead, 1: behind, 2: ahead}) == [1]
    assert find_missing({0: ahead, 1: ahead, 2: elsewhere}) == [2]
    assert find_missing({0: ahead, 1: elsewhere}) == [0, 1]  # it is unknown which one hangs
    assert find_missing({0: ahead, 1: ahead}) == [0, 1]


def test_few_processes_are_described_and_the_others_counted():
    heartbeats = {rank: Heartbeat("a", step=1234) for rank in range(5)}
    text = describe_processes([0, 1, 2, 3, 4], heartbeats)
    assert text.startswith("rank 0 on a (step 1,234) and rank 1 ")
    assert text.endswith("and 2 more") and "rank 3" not in text


def test_location_is_the_innermost_line_of_the_project():
    is_waiting = threading.Event()
    release = threading.Event()

    def wait_here():
        is_waiting.set()
        release.wait()

    thread = threading.Thread(target=wait_here, daemon=True)
    thread.start()
    assert is_waiting.wait(60)
    location = find_location(sys._current_frames()[thread.ident])
    release.set()
    thread.join()
    assert location.startswith("tests/training/test_heartbeat.py:")
    assert location.endswith("(wait_here)")


def test_heartbeat_contains_the_step_and_the_innermost_wait(watchdog):
    watchdog.step = 12
    with watchdog.watch("outer", is_joint=True), watchdog.watch("inner"), ThreadPool(1) as thread:
        beat = thread.apply(read_heartbeat, [watchdog, "node0"])
    assert (beat.step, beat.num_waits, beat.operation) == (12, 1, "inner")
    assert beat.location.startswith("tests/training/test_heartbeat.py:")


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch):
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    clock = ActiveClock()
    now = 2.0
    assert clock.read() == 2.0
    now = 3600.0
    assert clock.read() == 2.0 + heartbeat.MAX_GAP_SECONDS
