"""Test that training reports the batches and processes that it waits for."""

import queue
import signal
import threading

import pytest
import torch.distributed as dist

import train
from common import loader, watchdog
from common.watchdog import Watchdog
from dataset import TrainingStream
from tests.helpers import train_flags
from training.checkpoints import CheckpointWriter
from training.preemption import FlagReducer


@pytest.fixture
def printed_lines(monkeypatch) -> queue.Queue:
    """A queue of the lines that the watchdog of this process prints."""
    lines = queue.Queue()
    dog = Watchdog(report_seconds=0.02)
    previous_pipe = signal.set_wakeup_fd(-1)
    monkeypatch.setattr(watchdog, "_watchdog", dog)
    monkeypatch.setattr(watchdog, "_print", lines.put)
    yield lines
    dog.reset()
    signal.set_wakeup_fd(previous_pipe)


def test_wait_for_a_batch_is_reported(call, cache, tmp_path, monkeypatch, printed_lines):
    read = TrainingStream.__getitem__
    reports = []

    def read_after_a_report(stream, step):
        reports.append(printed_lines.get(timeout=60))
        return read(stream, step)

    monkeypatch.setattr(TrainingStream, "__getitem__", read_after_a_report)
    code, out = call(train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 1))
    assert code == 0, out
    assert reports[0].startswith("waiting for batches of --data-dir (")


def test_stop_signal_ends_a_wait_for_a_batch(call, cache, tmp_path, monkeypatch, printed_lines):
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "_end_process", lambda *_: ended.set())
    monkeypatch.setattr(loader, "STOP_SECONDS", 0.0)
    read = TrainingStream.__getitem__

    def read_from_a_disk_that_hangs(stream, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
            assert ended.wait(60)
        return read(stream, step)

    monkeypatch.setattr(TrainingStream, "__getitem__", read_from_a_disk_that_hangs)
    call(train, *train_flags(cache, tmp_path, "run"))
    assert ended.is_set()


def test_wait_for_a_save_is_reported(tmp_path, printed_lines):
    writer = CheckpointWriter(tmp_path, {})
    writer.thread = threading.Thread(target=lambda: reports.append(printed_lines.get(timeout=60)))
    reports = []
    writer.thread.start()
    writer.wait()
    assert reports[0].startswith("waiting for the previous checkpoint to be written (")


def test_wait_for_the_other_processes_is_reported(monkeypatch, printed_lines):
    class Collective:
        def wait(self):
            assert printed_lines.get(timeout=60).startswith(
                "waiting for the other processes to finish"
            )

    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Collective())
    reducer = FlagReducer(num_processes=1, num_flags=1)
    reducer.group = object()
    reducer.reduce(True)
    assert reducer.reduce(False) == [True]
