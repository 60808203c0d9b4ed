"""The gradient scaler of fp16, which accelerate offers on GPUs only.

These tests use it around a float32 step on the CPU.
"""

import json

import accelerate
import pytest
import torch
from accelerate.utils import AutocastKwargs

import train
from common.cli import UserError
from tests.helpers import have_equal_weights, read_metrics, train_flags
from training import accelerator, config


@pytest.fixture
def fp16(monkeypatch):
    """Return train.py's flags for fp16.

    The loss scale starts so high that even float32 overflows, and doubles every third step.
    """

    class CPUAccelerator(accelerate.Accelerator):
        def __init__(self, kwargs_handlers, **kwargs):
            handlers = [*kwargs_handlers, AutocastKwargs(enabled=False)]
            super().__init__(kwargs_handlers=handlers, **(kwargs | {"mixed_precision": "no"}))
            self.state._mixed_precision = "fp16"
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)

    monkeypatch.setattr(accelerator, "Accelerator", CPUAccelerator)
    monkeypatch.setattr(config, "resolve_precision", lambda mixed_precision: mixed_precision)
    return ["--mixed-precision", "fp16", "--log-every", "2", "--align-weight", "8"]


def read_scaler(run, step) -> dict:
    return json.loads((run / f"checkpoints/{step:07d}/progress.json").read_text())["scaler"]


def test_scaler_is_resumed_and_its_overflows_are_not_reported(call, fp16, cache, tmp_path):
    for name, stops in (("unbroken", (12,)), ("resumed", (1, 7, 12))):
        for stop in stops:
            options = (*fp16, "--max-train-steps", stop, "--checkpointing-steps", 1)
            code, out = call(train, *train_flags(cache, tmp_path, name, *options))
            assert code == 0 and "not finite" not in out, out
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    scales = [read_scaler(unbroken, step)["scale"] for step in range(1, 13)]
    assert scales[0] < 2.0**127
    assert any(later > earlier for earlier, later in zip(scales, scales[1:])), scales
    for step in (1, 7, 12):
        assert read_scaler(resumed, step) == read_scaler(unbroken, step)
    rows = read_metrics(unbroken)
    assert read_metrics(resumed) == rows
    assert have_equal_weights(resumed, unbroken, "0000012")
    assert all(row["skipped"] == 0 for row in rows)
    assert rows[0]["loss"] is None  # both steps overflowed, so that there is nothing to average
    assert all(0 < row["grad_norm"] < 100 for row in rows[-3:])


def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--mixed-precision fp16 needs a GPU"):
        config.resolve_precision("fp16")
