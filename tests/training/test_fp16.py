"""The gradient scaler of fp16, which accelerate offers on GPUs only: here around a float32 step on the CPU."""

import json

import pytest
import torch
from accelerate.utils import AutocastKwargs

import train
from tests.helpers import have_equal_weights, read_metrics, train_flags
from training import config


@pytest.fixture
def fp16(monkeypatch):
    """train.py's flags for fp16; the scale starts so high that even float32 overflows, and doubles every third step."""

    class OnCPU(train.Accelerator):
        def __init__(self, kwargs_handlers, **kwargs):
            handlers = [*kwargs_handlers, AutocastKwargs(enabled=False)]
            super().__init__(kwargs_handlers=handlers, **(kwargs | {"mixed_precision": "no"}))
            self.state._mixed_precision, self.native_amp = "fp16", True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)

    monkeypatch.setattr(train, "Accelerator", OnCPU)
    monkeypatch.setattr(train, "precision", lambda flag: flag)
    monkeypatch.setattr(
        train, "matmul_rate", lambda device, dtype: 1e12
    )  # of fp16 it is very slow on CPUs
    return ["--mixed-precision", "fp16", "--log-every", "2", "--align-weight", "8"]


def scaler(run, step) -> dict:
    return json.loads((run / f"checkpoints/{step:07d}/progress.json").read_text())["scaler"]


def test_the_scaler_is_part_of_the_run_and_its_overflows_are_ordinary(call, fp16, cache, tmp_path):
    for name, stops in (("whole", (12,)), ("broken", (1, 7, 12))):
        for stop in stops:
            command = train_flags(
                cache, tmp_path, name, *fp16, "--max-train-steps", stop, "--checkpointing-steps", 1
            )
            code, out = call(train, *command)
            assert code == 0 and "not finite" not in out, out
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    scales = [scaler(whole, step)["scale"] for step in range(1, 13)]
    assert scales[0] < 2.0**127 and any(b > a for a, b in zip(scales, scales[1:])), (
        scales
    )  # both ways
    assert [scaler(broken, step) for step in (1, 7, 12)] == [
        scaler(whole, step) for step in (1, 7, 12)
    ]
    assert read_metrics(broken) == read_metrics(whole) and have_equal_weights(
        broken, whole, "0000012"
    )
    assert all(row["skipped"] == 0 for row in read_metrics(whole))
    assert read_metrics(whole)[0]["loss"] is None  # both steps overflowed: nothing to average
    assert all(0 < row["grad_norm"] < 100 for row in read_metrics(whole)[-3:])


def test_fp16_without_a_gpu_is_refused(monkeypatch):
    with pytest.raises(config.UserError, match="--mixed-precision fp16 needs a GPU"):
        config.precision("fp16")
