import copy
import json

import pytest
import torch

import train_state
from train_state import EMA, CheckpointError, TrainState, checkpoints, find_checkpoint, load_weights


def make_state(seed=0) -> TrainState:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return TrainState(model, copy.deepcopy(model), optimizer, step=7, extra={"log_sums": [0.1], "log_steps": 3})


def test_a_saved_state_comes_back_whole(tmp_path):
    state, other = make_state(), make_state(seed=1)
    folder = state.save(tmp_path, {"model": 1})
    assert folder == find_checkpoint(tmp_path) == find_checkpoint(folder)
    other.load(folder)
    assert (other.step, other.extra) == (7, {"log_sums": [0.1], "log_steps": 3})
    assert torch.equal(other.model.weight, state.model.weight) and torch.equal(other.ema.weight, state.ema.weight)
    for ours, theirs in zip(other.optimizer.state.values(), state.optimizer.state.values()):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((folder / "config.json").read_text()) == {"model": 1}


@pytest.mark.parametrize("fail_at", range(5))
def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch, fail_at):
    write, written = train_state.write_file, []

    def full(path, data):
        if len(written) == fail_at:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(train_state, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        make_state().save(tmp_path, {})
    assert checkpoints(tmp_path) == [] and not list((tmp_path / "checkpoints").glob("*"))


def test_leftovers_of_a_killed_save_are_not_checkpoints(tmp_path):
    state = make_state()
    (tmp_path / "checkpoints" / ".0000007.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".0000007.partial" / "config.json").write_text("{}")
    assert checkpoints(tmp_path) == []
    assert [folder.name for folder in (state.save(tmp_path, {}), *checkpoints(tmp_path))] == ["0000007", "0000007"]


def test_newest_is_by_number(tmp_path):
    state = make_state()
    for state.step in (9_999_999, 10_000_000, 50):
        state.save(tmp_path, {})
    assert find_checkpoint(tmp_path).name == "10000000"


def test_unknown_and_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoints yet"):
        find_checkpoint(tmp_path)
    folder = make_state().save(tmp_path, {})
    (folder / "ema.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors cannot be loaded"):
        load_weights(torch.nn.Linear(4, 4), folder / "ema.safetensors")
    folder = make_state().save(tmp_path, {})
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read"):
        make_state().load(folder)


def test_nothing_is_executed_when_a_checkpoint_is_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    folder = make_state().save(tmp_path, {})
    torch.save(Evil(), folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        make_state().load(folder)


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
