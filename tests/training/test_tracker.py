"""Weights & Biases, the real client in offline mode: what it wrote is read back from its own file."""

import json
import struct

import pytest

import train
from tests.helpers import read_metrics, train_flags


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for key, value in {
        "MODE": "offline",
        "SILENT": "true",
        "CONFIG_DIR": str(tmp_path / "c"),
        "CACHE_DIR": str(tmp_path / "c"),
    }.items():
        monkeypatch.setenv(f"WANDB_{key}", value)


def records(folder) -> list:
    """All records of an offline run's transaction log: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at < len(data):
        if -at % 32768 < 7:  # no room for a chunk's header
            at += -at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_run_is_logged_with_config_and_pictures_and_taken_up_under_the_same_id(
    call, offline, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.Preview, "num_steps", 2)
    flags = [*train_flags(cache, tmp_path, "run", "--report-to", "wandb"), "--sampling-steps", 2]
    for steps in (2, 4):
        code, out = call(train, *flags, "--max-train-steps", steps)
        assert code == 0, out
    identity = (tmp_path / "run/wandb_id").read_text()
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(identity) for folder in folders)
    logged, pictures = [], []
    for folder in folders:
        found = records(folder)
        config = next(
            values(r.run.config.update) for r in found if r.WhichOneof("record_type") == "run"
        )
        assert config["learning_rate"] == 1e-3 and config["data"]["count"] == 24
        history = [
            values(r.history.item) for r in found if r.WhichOneof("record_type") == "history"
        ]
        logged += [row for row in history if "loss" in row]
        pictures += [
            folder / "files" / row["samples/path"] for row in history if "samples/path" in row
        ]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for ours, theirs in zip(read_metrics(tmp_path / "run"), logged, strict=True):
        assert {key: theirs[key] for key in ours} == ours
    drawn = sorted((tmp_path / "run/samples").glob("*.png"))
    assert [picture.read_bytes() for picture in pictures] == [
        path.read_bytes() for path in drawn
    ] and len(drawn) == 2


def test_a_tracker_that_fails_is_let_go_and_training_goes_on(call, cache, tmp_path, monkeypatch):
    class Failing:
        def __init__(self, *args):
            self.calls = 0

        def log(self, row, step):
            self.calls += 1
            if self.calls == 2:
                raise ConnectionError("the service is gone\nfor good")
            assert self.calls < 2, "asked again"

        image = finish = None

    monkeypatch.setattr(train, "Wandb", Failing)
    code, out = call(
        train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 4, "--report-to", "wandb")
    )
    assert (
        code == 0
        and out.count("--report-to wandb failed (ConnectionError: the service is gone)") == 1
    )
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_start_says_so_before_any_work(call, cache, tmp_path, monkeypatch):
    import wandb

    def refuse(**kwargs):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    code, out = call(
        train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 4, "--report-to", "wandb")
    )
    assert (
        code == 2 and "--report-to wandb cannot start (UsageError: No API key configured.)" in out
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()
