"""Test that a checkpoint that becomes visible late is waited for."""

import shutil
import threading

import pytest

from common.cli import UserError
from training import shared_files
from training.shared_files import measure_files, wait_for_files


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_files, "POLL_SECONDS", 0.01)
    folder = tmp_path / "0000010"
    (folder / "shards").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "shards/0.safetensors").write_bytes(b"12345678")
    return folder


def test_files_that_become_visible_late_are_waited_for(checkpoint):
    sizes = measure_files(checkpoint)
    assert sizes == {"config.json": 2, "shards/0.safetensors": 8}
    hidden = checkpoint.rename(checkpoint.with_name("hidden"))
    timer = threading.Timer(0.1, lambda: shutil.copytree(hidden, checkpoint))
    timer.start()
    wait_for_files(checkpoint, sizes, seconds=60)
    assert measure_files(checkpoint) == sizes


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_files_that_do_not_become_visible_are_named(checkpoint, damage):
    sizes = measure_files(checkpoint)
    file = checkpoint / "shards/0.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"1234")
    with pytest.raises(UserError, match=r"0.safetensors is not complete on .*: --output-dir"):
        wait_for_files(checkpoint, sizes, seconds=0)
