"""Test the file that stops a run. Other tests use it with two processes and in an evaluation."""

import errno
import os
import time

import pytest

import train
from checkpointing.storage import list_checkpoints
from tests.helpers import train_flags, wait_until
from training import stop_file
from training.preemption import StopRequest
from training.stop_file import watching_stop_file


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(stop_file, "POLL_SECONDS", 0.01)


def stop_by_file(folder, error: Exception | None = None) -> None:
    """Create the file, wait until it has been found, and end the run, possibly with an error."""
    request = StopRequest()
    with watching_stop_file(folder, request, is_main_process=True):
        (folder / "STOP").touch()
        wait_until(lambda: request.name, limit_seconds=60)
        if error:
            raise error


def test_file_stops_the_run_which_can_be_resumed(call, cache, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()  # a file that exists at the start stops the run as well
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 5)
    code, out = call(train, *flags)
    assert code == 0 and f"stopped by {run}/STOP at step" in out, out
    (checkpoint,) = list_checkpoints(run)
    assert int(checkpoint.name) < 5
    code, out = call(train, *flags)
    assert code == 0 and "finished at step 5" in out, out


def test_file_is_removed_when_the_run_ends(tmp_path):
    stop_by_file(tmp_path)
    assert not (tmp_path / "STOP").exists()


def test_file_remains_after_an_error_so_that_a_restarted_run_stops(tmp_path):
    with pytest.raises(RuntimeError):
        stop_by_file(tmp_path, RuntimeError("the GPU has failed"))
    assert (tmp_path / "STOP").exists()


def test_folder_that_cannot_be_read_or_changed(tmp_path, monkeypatch, caplog):
    stat = os.stat
    failures = [errno.ESTALE, errno.EIO]

    def fail_twice(path, **options):
        if str(path).endswith("STOP") and failures:
            raise OSError(failures.pop(), "the file server has restarted")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", fail_twice)
    request = StopRequest()
    with watching_stop_file(tmp_path, request, is_main_process=True):
        (tmp_path / "STOP").mkdir()  # cannot be removed like a file
        wait_until(lambda: request.name, limit_seconds=60)
    assert "STOP cannot be removed (" in caplog.text and not failures


def test_only_the_first_process_looks_for_the_file(tmp_path):
    (tmp_path / "STOP").touch()
    request = StopRequest()
    with watching_stop_file(tmp_path, request, is_main_process=False):
        time.sleep(0.05)
    assert request.name is None and (tmp_path / "STOP").exists()
