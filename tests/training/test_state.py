import copy
import json
import os
from pathlib import Path

import pytest
import torch

from checkpointing.storage import (
    CheckpointError,
    ema_filename,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    lock_run,
    save_tensors,
    verify_checkpoint,
)
from training import state as state_module
from training.state import EMA, CheckpointWriter, TrainState

CONFIG = {"ema_decay": [0.9, 0.5]}


def make_state(seed=0) -> TrainState:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    averages = [copy.deepcopy(model) for _ in CONFIG["ema_decay"]]
    return TrainState(
        model, averages, optimizer, step=7, progress={"log_sums": [0.1], "log_steps": 3}
    )


def test_a_saved_state_comes_back_whole(tmp_path):
    state, other = make_state(), make_state(seed=1)
    with torch.no_grad():
        state.emas[1].weight += 1  # tells the two averages apart
    folder = state.snapshot(CONFIG).write(tmp_path)
    assert folder == find_checkpoint(tmp_path) == find_checkpoint(folder)
    other.load(folder, verify_checkpoint(folder))
    assert (other.step, other.progress) == (7, {"log_sums": [0.1], "log_steps": 3})
    assert torch.equal(other.model.weight, state.model.weight) and len(other.emas) == 2
    assert all(
        torch.equal(ours.weight, theirs.weight) for ours, theirs in zip(other.emas, state.emas)
    )
    for ours, theirs in zip(other.optimizer.state.values(), state.optimizer.state.values()):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((folder / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("fail_at", range(6))
def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch, fail_at):
    written = []

    def full(write):
        def limited(*args):
            if len(written) == fail_at:
                raise OSError(28, "No space left on device")
            written.append(args)
            write(*args)

        return limited

    for name in ("write_file", "save_tensors"):
        monkeypatch.setattr(state_module, name, full(getattr(state_module, name)))
    with pytest.raises(OSError, match="No space left"):
        make_state().snapshot(CONFIG).write(tmp_path)
    assert list_checkpoints(tmp_path) == [] and not list((tmp_path / "checkpoints").glob("*"))


def test_a_disk_that_refuses_tensors_is_an_os_error_that_names_the_file(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.safetensors"):
        save_tensors({"x": torch.zeros(3)}, tmp_path / "a.safetensors")


def test_leftovers_of_a_killed_save_or_removal_are_not_checkpoints_and_are_cleared(tmp_path):
    for name in (".0000007.partial", ".0000003.removed"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    assert list_checkpoints(tmp_path) == []
    folder = make_state().snapshot(CONFIG).write(tmp_path)
    with lock_run(tmp_path, [folder]):
        pass
    assert list((tmp_path / "checkpoints").iterdir()) == list_checkpoints(tmp_path) == [folder]


def test_a_snapshot_is_cut_off_from_training(tmp_path):
    state, same = make_state(), make_state()
    snapshot = state.snapshot(CONFIG)
    with torch.no_grad():
        state.model.weight += 1
        next(iter(state.optimizer.state.values()))["exp_avg"] += 1
    other = make_state(seed=1)
    folder = snapshot.write(tmp_path)
    other.load(folder, verify_checkpoint(folder))
    assert torch.equal(other.model.weight, same.model.weight)
    for ours, theirs in zip(other.optimizer.state.values(), same.optimizer.state.values()):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_writer_keeps_the_newest_and_the_milestones(tmp_path):
    state, writer = make_state(), CheckpointWriter(tmp_path, CONFIG, keep_last=2, milestone_steps=4)
    for state.step in range(1, 11):
        writer.submit(state)
    writer.wait()
    assert [int(folder.name) for folder in list_checkpoints(tmp_path)] == [4, 8, 9, 10]
    assert [message.split("/")[-1] for message in writer.take_messages()][
        -1
    ] == "0000010" and not writer.take_messages()


def test_writer_survives_a_full_disk_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    state, writer, write = (
        make_state(),
        CheckpointWriter(tmp_path, CONFIG, keep_last=1),
        state_module.write_file,
    )

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    writer.submit(state)
    writer.wait()
    state.step = 8
    monkeypatch.setattr(state_module, "write_file", full)
    writer.submit(state)
    writer.wait()
    assert writer.problem and "could not save step 8: No space left" in writer.take_messages()[-1]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["0000007"]
    monkeypatch.setattr(state_module, "write_file", write)
    writer.submit(state)
    writer.wait()
    assert not writer.problem and find_checkpoint(tmp_path).name == "0000008"


def stuck(path, target, rename=Path.rename):
    """As a network disk on which somebody still reads the old checkpoint."""
    if target.name.endswith(".removed"):
        raise OSError(39, "Directory not empty", str(path))
    return rename(path, target)


def test_writer_tells_of_whatever_goes_wrong_and_apart_of_what_it_cannot_remove(
    tmp_path, monkeypatch
):
    state, writer = make_state(), CheckpointWriter(tmp_path, CONFIG, keep_last=1)

    def broken(tensors, path):
        raise ValueError("not tensors")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_tensors", broken)
        writer.submit(state)
        writer.wait()
    assert (
        writer.problem
        and "could not save step 7: ValueError: not tensors" in writer.take_messages()[-1]
    )
    monkeypatch.setattr(Path, "rename", stuck)
    for state.step in (8, 9):
        writer.submit(state)
        writer.wait()
    assert not writer.problem and [folder.name for folder in list_checkpoints(tmp_path)] == [
        "0000008",
        "0000009",
    ]
    *_, saved, kept = writer.take_messages()
    assert (
        saved.endswith("0000009")
        and kept.startswith("could not remove")
        and "Directory not empty" in kept
    )


def test_messages_that_come_while_they_are_taken_are_not_lost(tmp_path, monkeypatch):
    state, writer = make_state(), CheckpointWriter(tmp_path, CONFIG)
    write = state_module.Snapshot.write
    monkeypatch.setattr(
        state_module.Snapshot, "write", lambda *args: (writer.take_messages(), write(*args))[1]
    )
    writer.submit(state)
    writer.wait()
    assert writer.take_messages() == [f"saved {list_checkpoints(tmp_path)[0]}"]


def test_every_file_is_on_the_disk_before_the_checkpoint_appears(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(descriptor):
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((place.name, bool(list_checkpoints(tmp_path))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    folder = make_state().snapshot(CONFIG).write(tmp_path)
    before, after = (
        [name for name, visible in synced if visible is when] for when in (False, True)
    )
    for path in folder.iterdir():
        assert any(path.name in name for name in before), (
            path.name
        )  # config.json is .config.json.123.partial until it is whole
    assert before[-1] == ".0000007.partial" and after == ["checkpoints"]


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
def test_a_truncated_or_tampered_file_is_named_and_the_one_before_offered(tmp_path, name):
    state = make_state()
    for state.step in (7, 9):
        folder = state.snapshot(CONFIG).write(tmp_path)
    data = (folder / name).read_bytes()
    for bad in (data[:-1], data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]):
        (folder / name).write_bytes(bad)
        other = make_state(seed=1)
        before = other.model.weight.clone()
        with pytest.raises(
            CheckpointError, match=rf"{name}.*remove .*0000009 to continue from 0000007"
        ):
            other.load(folder, verify_checkpoint(folder))
        assert torch.equal(other.model.weight, before)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        other.load(folder, verify_checkpoint(folder))


def test_newest_is_by_number(tmp_path):
    state = make_state()
    for state.step in (9_999_999, 10_000_000, 50):
        state.snapshot(CONFIG).write(tmp_path)
    assert find_checkpoint(tmp_path).name == "10000000"


def test_unknown_and_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoints yet"):
        find_checkpoint(tmp_path)
    folder = make_state().snapshot(CONFIG).write(tmp_path)
    (folder / "ema.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors cannot be loaded"):
        load_weights(torch.nn.Linear(4, 4), folder / "ema.safetensors")


def test_nothing_of_a_checkpoint_is_unpickled(tmp_path):
    folder = make_state().snapshot(CONFIG).write(tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_ema_is_the_moving_average():
    model = torch.nn.Linear(3, 3)
    average = copy.deepcopy(model)
    ema, expected = EMA(average, model, 0.9), model.weight.detach().clone()
    for i in range(3):
        with torch.no_grad():
            model.weight += i + 1
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.weight, expected)


def test_averages_are_found_by_their_decay():
    names = [ema_filename(CONFIG, decay) for decay in (None, 0.9, 0.5)]
    assert names == ["ema.safetensors", "ema.safetensors", "ema-0.5.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"no EMA of --ema-decay 0\.7; choose one of 0\.9 0\.5"
    ):
        ema_filename(CONFIG, 0.7)
