"""Test that processes share --cache-in-ram with each start method, and that the memory is freed."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import TrainingStream
from latents.cache import LatentCache
from latents.shared_array import SharedArray
from tests.helpers import ROOT

INDEX = np.arange(24)


@pytest.fixture(params=["memfd", "shared memory"])
def any_system(request, monkeypatch):
    if request.param == "shared memory":  # as on macOS
        monkeypatch.delattr(os, "memfd_create")


def test_pickling_transfers_only_the_location(any_system):
    original = SharedArray((1000, 3), np.dtype(np.float16))
    original.array[:] = np.arange(3000).reshape(1000, 3)
    content = pickle.dumps(original)
    assert len(content) < 1000
    received = pickle.loads(pickle.dumps(pickle.loads(content)))  # it may be passed on
    original.array[5] = 7
    np.testing.assert_array_equal(received.array, original.array)
    with pytest.raises(ValueError, match="read-only"):
        received.array[5] = 8


def test_memory_is_freed_with_the_last_array(any_system):
    original = SharedArray((1000,), np.dtype(np.uint8))
    path = Path(original.location)
    if not path.is_absolute():
        path = Path("/dev/shm") / path
    received = pickle.loads(pickle.dumps(original))
    assert received.array.sum() == 0 and path.exists()
    del original, received
    assert not path.exists()


CREATE_WITHOUT_MEMFD = """
import os, sys
del os.memfd_create
import numpy as np
from latents.shared_array import SharedArray
array = SharedArray((1000,), np.dtype(np.uint8))
print(array.location, flush=True)
sys.stdin.read()
"""


def test_memory_is_freed_after_a_kill():
    command = [sys.executable, "-c", CREATE_WITHOUT_MEMFD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        path = Path("/dev/shm") / process.stdout.readline().strip()
        assert path.is_file()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not path.exists()


@pytest.fixture(params=[pytest.param("spawn", marks=pytest.mark.long), "forkserver"])
def start_method(request):
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(default, force=True)


def check_worker(worker: int) -> None:
    """Check in a DataLoader worker that the memory is mapped instead of copied."""
    stream = torch.utils.data.get_worker_info().dataset.load.__self__
    moments = stream.cache._moments_in_ram
    assert moments._array is None  # not transferred, not yet mapped
    assert moments.array.shape[0] == len(stream.cache)
    assert "memfd:latents" in Path("/proc/self/maps").read_text()


def test_workers_share_the_cache_with_every_start_method(cache, start_method):
    data = LatentCache(cache)
    data.load_into_ram()
    stream = TrainingStream(data, 0, 8)
    batches = stream.read_batches(0, 2, 1, pin_memory=False, worker_init=check_worker)
    for step, batch in enumerate(batches):
        assert torch.equal(batch.moments, stream[step].moments)
