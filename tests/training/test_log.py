"""The log of a run continues at a checkpoint, and the measured speed excludes pauses."""

import json
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from training import log as log_module
from training import throughput as throughput_module
from training.guard import NonFiniteGuard
from training.log import Console, MetricMeans, RunLog, drop_repeated_lines, format_line
from training.peak_rates import find_peak_rate
from training.schedule import LearningRateSchedule
from training.throughput import Throughput

CPU = torch.device("cpu")


def one_process(tensor, reduction):
    return tensor


@pytest.fixture
def tracked():
    """Return the list of what the logs of the test send to their trackers."""
    return []


@pytest.fixture
def make_log(tmp_path, tracked):
    """Return a function that opens the log of a run at a checkpoint, with lines every 3 steps."""

    def make(step=0, progress=None, schedule=None) -> RunLog:
        progress = progress or {}
        log = RunLog(
            tmp_path,
            Console("run", num_steps=12, initial_step=step, batch_size=8, is_main_process=True),
            SimpleNamespace(log=lambda *values: tracked.append(values), close=lambda: None),
            MetricMeans(["loss"], CPU, one_process, progress),
            Throughput(8, CPU, step, lambda start, end: 1.0, {"matmul_share": 1.0}),
            NonFiniteGuard(SimpleNamespace()),
            schedule or LearningRateSchedule(1e-3, "constant", 0, 0.0, 12),
            log_every=3,
        )
        log.restore(step, progress)
        return log

    return make


def record(log, first_step, losses) -> None:
    for step, loss in enumerate(map(torch.tensor, losses), first_step):
        is_finite = log.guard.mark_step(step, {"loss": loss}, loss)
        log.record_step(step, {"loss": loss}, is_finite)


def read_lines(folder) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["skipped"]) for row in rows]


def test_log_continues_at_a_checkpoint(make_log, tmp_path, tracked):
    """Buffered lines, the means since the last line, and the skipped steps are restored."""
    log = make_log()
    (tmp_path / "metrics.jsonl").mkdir()  # the file cannot be written
    record(log, 1, [1.0, 2.0, 3.0, 4.0, float("nan")])
    progress = json.loads(json.dumps(log.collect_progress()))
    assert progress["bad_in_a_row"] == [1, 0]
    (tmp_path / "metrics.jsonl").rmdir()
    record(make_log(5, progress), 6, [8.0, 5.0, 6.0, 7.0])
    assert read_lines(tmp_path) == [(3, 2.0, 0), (6, 6.0, 1), (9, 6.0, 0)]
    assert [(step, values["loss"]) for values, step in tracked] == [(3, 2.0), (6, 6.0), (9, 6.0)]


def test_means_of_other_scalars_are_not_restored(make_log, tmp_path):
    """Older code also logged methods of weight 0."""
    progress = make_log().collect_progress() | {"log_sums": [1.0, 2.0], "log_good": 1.0}
    record(make_log(2, progress), 3, [4.0])
    assert read_lines(tmp_path) == [(3, 4.0, 0)]


def test_line_of_skipped_steps_has_no_mean(make_log, tmp_path):
    record(make_log(), 1, [float("nan"), float("inf"), float("nan"), 3.0, 5.0, 4.0])
    assert read_lines(tmp_path) == [(3, None, 3), (6, 4.0, 0)]


def test_lines_of_repeated_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_repeated_lines(path, 2, "")
    assert not path.exists()
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    path.write_text("".join([lines[0], lines[2], '{"st']))
    drop_repeated_lines(path, 2, lines[0] + lines[1])
    assert path.read_text() == lines[0] + lines[1]


def test_evaluations_are_sent_to_the_trackers(make_log, tmp_path, tracked):
    metrics = {"FID": 3.0, "recall": None}
    make_log().record_evaluation("eval-ema0.5", 4, metrics, {"ema_decay": 0.5})
    assert tracked == [({"eval-ema0.5/FID": 3.0, "eval-ema0.5/recall": None}, 4)]
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    expected = {"schema": 3, "step": 4, "images": 32, **metrics, "evaluation": {"ema_decay": 0.5}}
    assert row == expected


def test_progress_is_one_line_per_log_line_without_a_terminal(make_log, monkeypatch, capsys):
    """The remaining time includes pauses but not the first step, which compiles the network."""
    now = 0.0
    monkeypatch.setattr(log_module, "time", SimpleNamespace(monotonic=lambda: now))
    log = make_log()
    monkeypatch.setattr(log.throughput, "measure", lambda step: {"images_per_s": 8.5})
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1):
        now += 1000.0 if step == 1 else 60.0
        record(log, step, [loss])
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 3 of 12, 8.50 images/s, 09:00 remaining: loss 2.0000",
        "step 6 of 12, 8.50 images/s, 06:00 remaining: loss 5.0000",
    ]


def test_line_contains_only_the_losses():
    means = {"loss": 2.5, "align/sra2": 0.5, "cosine/sra2": 0.25, "grad_norm": 1.0}
    line = format_line(1200, 400_000, 3949.653, 431_999.0, means)
    assert line == (
        "step 1,200 of 400,000, 3949.65 images/s, 119:59:59 remaining: loss 2.5000, "
        "align/sra2 0.5000"
    )
    line = format_line(1, 2, 0.5, None, {"loss": None, "grad_norm": None})
    assert line == "step 1 of 2, 0.50 images/s, ? remaining: no finite step"


def test_speed_is_measured_between_lines_without_pauses(monkeypatch):
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds

    def load_batches():
        for seconds in (1, 2, 3):
            wait(seconds)
            yield "batch"

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(throughput_module, "time", clock)

    def count_flops(start, end):
        return {(10, 12): 6.0, (12, 13): 4.0}[start, end]

    throughput = Throughput(8, CPU, 10, count_flops, {"mfu": 2.0})
    measured = []
    for step, _ in enumerate(throughput.time_batches(load_batches()), 11):
        wait(4)
        with suppress(ValueError), throughput.pause("preview"):
            wait(100)
            raise ValueError("a failed preview")
        if step > 11:
            measured.append(throughput.measure(step))
    assert throughput.describe_pauses() == "save 0.0 s, preview 300.0 s, evaluation 0.0 s"
    # The first line covers two steps.
    for values, steps, data_s, flops in zip(measured, (2, 1), (1.5, 3), (6, 4), strict=True):
        rate = 8 / (data_s + 4)
        expected = {"images_per_s": rate, "step_s": data_s + 4, "data_s": data_s, "compute_s": 4}
        pauses = {"save_s": 0, "preview_s": 100 * steps, "evaluation_s": 0}
        assert values == pytest.approx({**expected, **pauses, "mfu": rate * flops / 2})


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_rates_by_device_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    rate = find_peak_rate(torch.device("cuda"), torch.bfloat16, allow_tf32=False)
    assert rate == (tflops and pytest.approx(tflops * 1e12))
