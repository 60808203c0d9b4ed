"""Checkpoints hold the complete training state, appear atomically, and are verified when loaded."""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpointing import storage
from checkpointing.storage import (
    CheckpointError,
    ema_filename,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    lock_run,
    read_config,
    save_tensors,
    verify_checkpoint,
)
from checkpointing.tensor_file import StoredTensors
from common.files import sha256
from training import checkpoints as checkpoints_module
from training import networks as networks_module
from training.checkpoints import CheckpointWriter, take_snapshot, write_checkpoint
from training.state import EMA, TrainState

CONFIG = {"ema_decay": [0.9, 0.5], "data": {}}


def make_state(seed=0) -> TrainState:
    """Return the state of a small network after one update, at step 7."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    emas = [copy.deepcopy(model) for _ in CONFIG["ema_decay"]]
    progress = {"log_sums": [0.1], "log_steps": 3}
    return TrainState(model, emas, optimizer, step=7, progress=progress)


def save(state: TrainState, run: Path) -> Path:
    """Write a checkpoint and return its folder."""
    return write_checkpoint(take_snapshot(state, CONFIG), run)


def save_in_background(state: TrainState, writer: CheckpointWriter) -> None:
    """Write a checkpoint with a `CheckpointWriter` and wait until it is complete."""
    writer.submit(state)
    writer.wait()


def checkpoint_names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def raise_disk_full(path, data):
    raise OSError(28, "No space left on device", str(path))


def assert_equal_moments(state: TrainState, expected: TrainState) -> None:
    moments = state.optimizer.state.values()
    expected_moments = expected.optimizer.state.values()
    for actual, expected in zip(moments, expected_moments, strict=True):
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_loading_restores_the_saved_state(tmp_path):
    state = make_state()
    other = make_state(seed=1)
    other.step = 0
    other.progress = {}
    with torch.no_grad():
        state.emas[1].weight += 1  # the two EMAs differ
    folder = save(state, tmp_path)
    assert folder == find_checkpoint(tmp_path) == find_checkpoint(folder)
    other.load(folder, verify_checkpoint(folder))
    assert (other.step, other.progress) == (7, {"log_sums": [0.1], "log_steps": 3})
    assert torch.equal(other.model.weight, state.model.weight)
    for actual, expected in zip(other.emas, state.emas, strict=True):
        assert torch.equal(actual.weight, expected.weight)
    assert_equal_moments(other, state)
    assert json.loads((folder / "config.json").read_text()) == CONFIG | {"step": 7}


def test_each_process_verifies_some_of_the_files(tmp_path, monkeypatch):
    folder = save(make_state(), tmp_path)
    shares: list[set[str]] = []

    def record(path):
        shares[-1].add(path.name)
        return sha256(path)

    monkeypatch.setattr(storage, "sha256", record)
    for rank in range(2):
        shares.append(set())
        verify_checkpoint(folder, (rank, 2))
    assert shares[0] and shares[1] and not shares[0] & shares[1]
    assert shares[0] | shares[1] == {path.name for path in folder.iterdir()} - {"progress.json"}


def test_process_that_receives_the_tensors_reads_none(tmp_path, monkeypatch):
    state = make_state()
    folder = save(state, tmp_path)
    other = make_state(seed=1)
    other.optimizer.state.clear()
    monkeypatch.setattr(StoredTensors, "copy_rows", None)  # reading fails
    other.load(folder, verify_checkpoint(folder), reads_tensors=False)
    assert other.step == 7
    moments, expected = other.get_moments(), state.get_moments()
    assert {k: v.shape for k, v in moments.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("num_written", range(6))
def test_failed_save_leaves_no_files(tmp_path, monkeypatch, num_written):
    written = []

    def limit(write):
        def write_until_full(*args):
            if len(written) == num_written:
                raise OSError(28, "No space left on device")
            written.append(args)
            write(*args)

        return write_until_full

    for name in ("write_file", "save_tensors"):
        monkeypatch.setattr(checkpoints_module, name, limit(getattr(checkpoints_module, name)))
    with pytest.raises(OSError, match="No space left"):
        save(make_state(), tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_error_while_writing_tensors_names_the_file(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.safetensors"):
        save_tensors({"x": torch.zeros(3)}, tmp_path / "a.safetensors")


def test_leftovers_of_a_killed_save_or_removal_are_ignored_and_removed(tmp_path):
    for name in (".0000007.partial", ".0000003.removed"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    assert list_checkpoints(tmp_path) == []
    folder = save(make_state(), tmp_path)
    with lock_run(tmp_path, [folder]):
        pass
    assert list((tmp_path / "checkpoints").iterdir()) == list_checkpoints(tmp_path) == [folder]


def test_snapshot_does_not_change_with_training(tmp_path):
    state = make_state()
    snapshot = take_snapshot(state, CONFIG)
    with torch.no_grad():
        state.model.weight += 1
        next(iter(state.optimizer.state.values()))["exp_avg"] += 1
    other = make_state(seed=1)
    folder = write_checkpoint(snapshot, tmp_path)
    other.load(folder, verify_checkpoint(folder))
    expected = make_state()
    assert torch.equal(other.model.weight, expected.model.weight)
    assert_equal_moments(other, expected)


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(make_state(seed=1), tmp_path)
    state = make_state()
    folder = save(state, tmp_path)
    other = make_state(seed=1)
    other.load(folder, verify_checkpoint(folder))
    assert torch.equal(other.model.weight, state.model.weight)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_writer_keeps_the_newest_checkpoints_and_the_milestones(tmp_path):
    state = make_state()
    writer = CheckpointWriter(tmp_path, CONFIG, keep_last=2, milestone_steps=4)
    for state.step in range(1, 12):
        writer.submit(state)
    writer.wait()
    assert [int(name) for name in checkpoint_names(tmp_path)] == [4, 8, 10, 11]
    assert writer.take_messages()[-1].endswith("/0000011")
    assert not writer.take_messages()


def test_writer_keeps_the_old_checkpoint_while_the_disk_is_full(tmp_path, monkeypatch):
    state = make_state()
    writer = CheckpointWriter(tmp_path, CONFIG, keep_last=1)
    save_in_background(state, writer)
    state.step = 8
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "write_file", raise_disk_full)
        save_in_background(state, writer)
    assert writer.problem and "could not save step 8: No space left" in writer.take_messages()[-1]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["0000007"]
    save_in_background(state, writer)
    assert not writer.problem and find_checkpoint(tmp_path).name == "0000008"


def test_writer_reports_errors_other_than_disk_errors(tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("not tensors")

    writer = CheckpointWriter(tmp_path, CONFIG, keep_last=1)
    monkeypatch.setattr(checkpoints_module, "save_tensors", fail)
    save_in_background(make_state(), writer)
    assert writer.problem
    assert "could not save step 7: ValueError: not tensors" in writer.take_messages()[-1]


def test_writer_reports_checkpoints_that_it_cannot_remove(tmp_path, monkeypatch):
    def rename(path, target, rename=Path.rename):
        # Fails as on a network disk while another process reads the old checkpoint.
        if target.name.endswith(".removed"):
            raise OSError(39, "Directory not empty", str(path))
        return rename(path, target)

    state = make_state()
    writer = CheckpointWriter(tmp_path, CONFIG, keep_last=1)
    monkeypatch.setattr(Path, "rename", rename)
    for state.step in (8, 9):
        save_in_background(state, writer)
    assert not writer.problem and checkpoint_names(tmp_path) == ["0000008", "0000009"]
    *_, saved, kept = writer.take_messages()
    assert saved.endswith("0000009")
    assert kept.startswith("could not remove") and "Directory not empty" in kept


class ListWithConcurrentAppend(list):
    """Appends an element after the first read, as the writer's thread may do at any time."""

    has_appended = False

    def _append_once(self):
        if not self.has_appended:
            self.has_appended = True
            self.append("second")

    def __getitem__(self, key):
        result = super().__getitem__(key)
        self._append_once()
        return result

    def __iter__(self):
        yield from list(super().__iter__())
        self._append_once()

    def copy(self):
        return self[:]


def test_message_appended_while_messages_are_taken_is_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, CONFIG)
    writer.messages = ListWithConcurrentAppend(["first"])
    assert writer.take_messages() == ["first"]
    assert writer.take_messages() == ["second"]
    assert not writer.take_messages()


def test_files_are_synced_before_the_checkpoint_appears(tmp_path, monkeypatch):
    synced = {False: [], True: []}  # whether the checkpoint was visible -> names
    fsync = os.fsync

    def record_fsync(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced[bool(list_checkpoints(tmp_path))].append(name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    folder = save(make_state(), tmp_path)
    for path in folder.iterdir():
        # The temporary name of config.json, for example, is .config.json.123.partial.
        assert any(path.name in name for name in synced[False]), path.name
    assert synced[False][-1] == ".0000007.partial" and synced[True] == ["checkpoints"]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "ema.safetensors",
        "ema-0.5.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "progress.json",
    ],
)
def test_error_for_a_damaged_file_names_it_and_the_previous_checkpoint(tmp_path, name):
    state = make_state()
    for state.step in (7, 9):
        folder = save(state, tmp_path)
    data = (folder / name).read_bytes()
    truncated = data[:-1]
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    other = make_state(seed=1)
    before = other.model.weight.clone()
    for damaged in (truncated, flipped):
        (folder / name).write_bytes(damaged)
        message = rf"{name}.*remove .*0000009 to continue from 0000007"
        with pytest.raises(CheckpointError, match=message):
            other.load(folder, verify_checkpoint(folder))
        assert torch.equal(other.model.weight, before)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        other.load(folder, verify_checkpoint(folder))


def test_newest_checkpoint_has_the_largest_number(tmp_path):
    state = make_state()
    for state.step in (9_999_999, 10_000_000, 50):
        save(state, tmp_path)
    (tmp_path / "checkpoints/20000000-copy").mkdir()
    assert find_checkpoint(tmp_path).name == "10000000"


def test_error_for_a_missing_or_damaged_checkpoint_states_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoints yet"):
        find_checkpoint(tmp_path)
    folder = save(make_state(), tmp_path)
    (folder / "ema.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors cannot be loaded"):
        load_weights(torch.nn.Linear(4, 4), folder / "ema.safetensors")


def test_checkpoint_contains_no_pickle(tmp_path):
    folder = save(make_state(), tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_ema_is_the_exponential_moving_average():
    model = torch.nn.Linear(3, 3)
    average = copy.deepcopy(model)
    ema = EMA(average, model, 0.9)
    expected = model.weight.detach().clone()
    for i in range(3):
        with torch.no_grad():
            model.weight += i + 1
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.weight, expected)


def test_ema_files_are_found_by_their_decay():
    names = [ema_filename(CONFIG, decay) for decay in (0.9, 0.5)]
    assert names == ["ema.safetensors", "ema-0.5.safetensors"]
    message = r"no EMA of --ema-decay 0\.7; choose one of 0\.9 0\.5"
    with pytest.raises(CheckpointError, match=message):
        ema_filename(CONFIG, 0.7)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_the_work_of_restoring(trained, monkeypatch, rank):
    """Each process verifies some of the files, and only the first one reads tensors."""
    (checkpoint,) = list_checkpoints(trained)
    calls = []
    monkeypatch.setattr(networks_module, "verify_checkpoint", lambda _, share: calls.append(share))
    state = SimpleNamespace(
        sharding=None,
        load=lambda checkpoint, progress, reads_tensors: calls.append(reads_tensors),
        broadcast_from_first_process=lambda: calls.append("broadcast"),
    )
    networks_module.restore_checkpoint(
        SimpleNamespace(state=state, config=read_config(checkpoint)),
        SimpleNamespace(data=None, run=SimpleNamespace(folder=trained)),
        SimpleNamespace(process_index=rank, num_processes=2, is_main_process=not rank, scaler=None),
        checkpoint,
    )
    assert calls == [(rank, 2), rank == 0, "broadcast"]
