"""Test that a checkpoint that becomes visible late is waited for."""

import shutil
import threading
from dataclasses import replace
from functools import partial

import pytest

import train
from common.cli import UserError
from tests.helpers import train_flags
from training import setup, shared_files
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


def test_checkpoint_that_a_process_does_not_see_is_reported(
    call, cache, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path / "trained")
    find_position = setup.find_position

    def find_position_on_another_node(*args):
        position = find_position(*args)
        assert position.file_sizes["progress.json"] > 0
        return replace(position, file_sizes={"later.json": 1})

    monkeypatch.setattr(setup, "find_position", find_position_on_another_node)
    monkeypatch.setattr(setup, "wait_for_files", partial(wait_for_files, seconds=0))
    code, out = call(train, *train_flags(cache, tmp_path, "trained"))
    assert code == 2 and "0000002/later.json is not complete on" in out, out
