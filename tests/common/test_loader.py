"""Test that failures of worker processes end the command with one line, and leave no process."""

import errno
import multiprocessing
import os
import resource
import signal
import threading
from contextlib import closing

import pytest
import torch
from torch.utils.data._utils import signal_handling

from common.cli import UserError
from common.loader import Loader

NUM_BYTES = 1 << 20


def ignore_signals(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_tensor(index: int) -> torch.Tensor:
    return torch.full((NUM_BYTES,), index, dtype=torch.uint8)


def load_all(load, num_workers=1, indices=range(4), **options) -> list:
    loader = Loader(load, "numbers", num_workers, **options)
    with closing(loader.iterate(indices)) as items:
        return list(items)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_items_are_loaded_in_order(num_workers):
    items = load_all(make_tensor, num_workers, [3, 1, 2, 0, 5])
    assert [item.unique().tolist() for item in items] == [[3], [1], [2], [0], [5]]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_user_error_of_a_worker_arrives_unchanged(num_workers):
    def fail(index):
        raise UserError("/data/00001.npy cannot be read")

    with pytest.raises(UserError, match=r"^/data/00001\.npy cannot be read$"):
        load_all(fail, num_workers)


@pytest.mark.parametrize("error", [KeyError, RuntimeError])
def test_other_errors_of_a_worker_keep_their_type(error):
    def fail(index):
        raise error("bug")

    with pytest.raises(error, match="bug"):
        load_all(fail, worker_init=ignore_signals)
    assert not multiprocessing.active_children()


def limit_size_of_shared_memory(worker: int) -> None:
    """Make shared memory of more than 1000 bytes fail, as it does if /dev/shm is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def limit_number_of_open_files(worker: int) -> None:
    """Make it impossible to open more files than the worker has opened."""
    highest = os.open(os.devnull, os.O_RDONLY)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


@pytest.mark.parametrize("limit", [limit_size_of_shared_memory, limit_number_of_open_files])
def test_lack_of_shared_memory_or_open_files_ends_in_one_line(limit):
    message = r"^a worker process cannot send numbers \(.*\); free space in /dev/shm.*ulimit -n"
    with pytest.raises(UserError, match=message):
        load_all(make_tensor, worker_init=limit)


class UnsendableItem:
    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_item_that_cannot_be_sent_ends_in_one_line():
    with pytest.raises(UserError, match=r"cannot send numbers \(.*No space left on device"):
        load_all(lambda index: UnsendableItem())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_killed_worker_ends_in_one_line(number, frequent_worker_checks):
    parent = os.getpid()

    def die(index):
        if os.getpid() != parent:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with pytest.raises(UserError, match=r"a worker process for numbers died .*--num-workers"):
        load_all(die, worker_init=ignore_signals)
    assert not multiprocessing.active_children()


@pytest.fixture
def no_dataloader_before(monkeypatch):
    """Undo the handler of SIGCHLD that a DataLoader of another test has installed."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, previous)


def test_worker_that_is_killed_between_two_items_is_reported_by_the_next_wait(
    frequent_worker_checks, no_dataloader_before
):
    with closing(Loader(make_tensor, "numbers", num_workers=1).iterate(range(8))) as items:
        next(items)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join(60)  # a handler of SIGCHLD would raise an error here
        with pytest.raises(UserError, match=r"a worker process for numbers died .*SIGKILL"):
            list(items)


def test_blocked_workers_that_ignore_signals_are_ended(frequent_worker_checks):
    num_blocked = multiprocessing.Semaphore(0)

    def load(index):
        if index:
            num_blocked.release()
            threading.Event().wait()  # like a disk that hangs
        return index

    loader = Loader(load, "numbers", num_workers=2, worker_init=ignore_signals)
    items = loader.iterate(range(8))
    assert next(items) == 0
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for _ in workers:
        assert num_blocked.acquire(timeout=60)
    items.close()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
