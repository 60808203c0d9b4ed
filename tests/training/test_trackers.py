"""Experiment trackers: Weights & Biases with its real client in offline mode, and TensorBoard.

What they wrote is read back from their files.
"""

import json
import struct
import time
from types import SimpleNamespace

import pytest
from accelerate.tracking import WandBTracker

import train
from tests.helpers import read_metrics, train_flags
from training.preview import Preview
from training.trackers import Trackers


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    folder = str(tmp_path / "wandb-cache")
    options = {"MODE": "offline", "SILENT": "true", "CONFIG_DIR": folder, "CACHE_DIR": folder}
    for key, value in options.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    yield
    import wandb

    wandb.finish()  # otherwise, the next test would continue a run whose tracker failed


def read_complete_log(folder) -> list:
    """Return the records of a finished offline run; wandb's service writes them asynchronously."""
    deadline = time.monotonic() + 60
    records = []
    while not records or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "wandb did not finish its log"
        time.sleep(0.05)
        records = read_records(folder)
    return records


def read_records(folder) -> list:
    """Return the complete records of an offline run's transaction log, which may not exist yet.

    The format is LevelDB's log: blocks of 32 KiB, after a header of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))  # at most one file
    position, content, records = 7, b"", []
    while position + 7 <= len(data):
        if -position % 32768 < 7:  # no room for a chunk's header
            position += -position % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        if position + 7 + size > len(data):  # not yet written completely
            break
        content += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            records.append(Record.FromString(content))
            content = b""
    return records


def parse_items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_gets_config_metrics_and_previews_and_resumes_under_the_same_id(
    call, offline_wandb, cache, tmp_path, monkeypatch
):
    import wandb

    init, starts = wandb.init, []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: starts.append(kwargs) or init(**kwargs))
    monkeypatch.setattr(Preview, "num_steps", 2)
    flags = train_flags(cache, tmp_path, "run", "--report-to", "wandb", "--sampling-steps", 2)
    for steps in (2, 4):
        code, out = call(train, *flags, "--max-train-steps", steps)
        assert code == 0, out
        time.sleep(1)  # wandb names folders by second and loses a log if two names are equal
    run = tmp_path / "run"
    run_id = (run / "wandb_id").read_text()
    assert [(start["id"], start["resume"]) for start in starts] == 2 * [(run_id, "allow")]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    metrics, images = [], []
    for folder in folders:
        records = read_complete_log(folder)
        config = {}
        for record in records:
            if record.WhichOneof("record_type") == "run":
                config |= parse_items(record.run.config.update)
            if record.WhichOneof("record_type") == "config":
                config |= parse_items(record.config.update)
        assert config["learning_rate"] == 1e-3 and config["data"]["count"] == 24
        history = [
            parse_items(record.history.item)
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        metrics += [row for row in history if "loss" in row]
        for row in history:
            for name in ("samples-real", "samples"):
                paths = row.get(f"{name}/filenames", [])
                images += [(name, (folder / "files" / path).read_bytes()) for path in paths]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for written, tracked in zip(read_metrics(run), metrics, strict=True):
        written.pop("schema")
        assert {key: tracked[key] for key in written} == written
    saved = {path.stem: path.read_bytes() for path in (run / "samples").iterdir()}
    real_images = ("samples-real", saved.pop("real"))  # sent once, before the first preview
    assert images == [real_images, *(("samples", saved[step]) for step in ("0000002", "0000004"))]


def test_failing_tracker_is_disabled_and_training_continues(
    call, offline_wandb, cache, tmp_path, monkeypatch
):
    log, calls = WandBTracker.log, []

    def fail_on_second_call(self, values, step=None, **kwargs):
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("the service is gone\nfor good")
        log(self, values, step, **kwargs)

    monkeypatch.setattr(WandBTracker, "log", fail_on_second_call)
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 4, "--report-to", "wandb")
    code, out = call(train, *flags)
    assert code == 0 and len(calls) == 2
    assert out.count("--report-to wandb failed (RuntimeError: the service is gone)") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_tracker_that_cannot_start_is_reported_before_any_work(call, cache, tmp_path, monkeypatch):
    import wandb

    def refuse(**kwargs):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 4, "--report-to", "wandb")
    code, out = call(train, *flags)
    assert code == 2
    assert "--report-to wandb cannot start (UsageError: No API key configured.)" in out
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["comet_ml"], "--report-to comet_ml needs comet_ml: pip install comet_ml"),
        (
            ["none", "wandb"],
            "--report-to none wandb: none cannot be combined with trackers; remove it",
        ),
    ],
)
def test_unusable_trackers_are_refused(call, cache, tmp_path, names, message):
    code, out = call(train, *train_flags(cache, tmp_path, "run", "--report-to", *names))
    assert code == 2 and message in out


def test_null_values_are_not_sent():
    sent = []
    tracker = SimpleNamespace(log=lambda values, step: sent.append((values, step)))
    trackers = Trackers(SimpleNamespace(trackers=[tracker]), info=print)
    trackers.log({"loss": None, "skipped": 2}, 4)
    assert sent == [({"skipped": 2}, 4)]


def test_tensorboard_gets_metrics_and_previews(call, cache, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(Preview, "num_steps", 2)
    flags = train_flags(cache, tmp_path, "run", "--report-to", "tensorboard")
    flags += ["--logging-dir", "logs"]  # below --output-dir, as in REPA
    code, out = call(train, *flags, "--max-train-steps", 2, "--sampling-steps", 2)
    assert code == 0, out
    assert not (tmp_path / "run/sra2").exists()
    events = EventAccumulator(str(tmp_path / "logs/run/sra2"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    rows = read_metrics(tmp_path / "run")
    assert losses == pytest.approx([row["loss"] for row in rows])
    assert {"samples", "samples-real"} <= set(events.Tags()["images"])


@pytest.fixture
def start_wandb(tmp_path):
    """Return a function that starts wandb at a step, and returns its id, config and messages."""

    def start(step, last_logged_step):
        messages, options = [], {}
        accelerator = SimpleNamespace(
            log_with=["wandb"],
            logging_dir=str(tmp_path / "logs"),
            is_main_process=True,
            init_trackers=lambda project, init_kwargs: options.update(init_kwargs["wandb"]),
            trackers=[],
        )
        trackers = Trackers(accelerator, messages.append)
        trackers.start("project", tmp_path, {"seed": 0}, step, last_logged_step)
        assert options["dir"] == str(tmp_path / "logs") and (tmp_path / "logs").is_dir()
        return options["id"], options["config"], messages

    return start


def test_wandb_lists_the_steps_that_are_repeated_after_a_crash(start_wandb):
    run_id, config, messages = start_wandb(step=0, last_logged_step=0)
    assert config == {"seed": 0} and not messages
    # A run that was not interrupted repeats no step.
    assert start_wandb(step=100, last_logged_step=100) == (run_id, {"seed": 0}, [])
    same_id, config, messages = start_wandb(step=100, last_logged_step=180)
    assert same_id == run_id and config == {"seed": 0, "repeated_steps": ["101-180"]}
    assert "steps 101 to 180 are repeated: wandb keeps the values" in messages[0]
    # After another crash, and after a regular end, wandb still has the first values.
    _, config, _ = start_wandb(step=100, last_logged_step=120)
    assert config["repeated_steps"] == ["101-180", "101-120"]
    assert start_wandb(step=300, last_logged_step=300)[1:] == (config, [])


def test_run_that_crashed_before_its_first_checkpoint_gets_a_new_wandb_id(start_wandb):
    run_id, _, _ = start_wandb(step=0, last_logged_step=0)
    new_id, config, messages = start_wandb(step=0, last_logged_step=7)
    assert new_id != run_id and config == {"seed": 0} and not messages


def test_tensorboard_agrees_with_the_log_after_a_crash(call, cache, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step = train.Step.__call__

    def crash(self, batch):
        if self.state.step == 4:
            raise RuntimeError("crash")
        scalars, is_finite = step(self, batch)
        return {name: value + 1 for name, value in scalars.items()}, is_finite

    flags = train_flags(cache, tmp_path, "run", "--report-to", "tensorboard")
    flags += ["--checkpointing-steps", "3", "--max-train-steps", "5"]
    monkeypatch.setattr(train.Step, "__call__", crash)
    with pytest.raises(RuntimeError, match="crash"):
        call(train, *flags)
    monkeypatch.setattr(train.Step, "__call__", step)
    code, out = call(train, *flags)
    assert code == 0, out
    events = EventAccumulator(str(tmp_path / "run/sra2"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    rows = read_metrics(tmp_path / "run")
    assert len(events.Scalars("loss")) == len(rows) == 5
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows})
