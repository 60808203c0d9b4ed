"""Tests of --profile."""

import json

import train
from tests.helpers import have_equal_weights, train_flags
from training import profiling


def test_profile_has_the_requested_steps_and_does_not_change_training(
    call, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(profiling, "SKIPPED_STEPS", 1)
    monkeypatch.setattr(profiling, "WARM_UP_STEPS", 1)
    steps = ("--max-train-steps", 5)
    code, out = call(train, *train_flags(cache, tmp_path, "profiled", *steps, "--profile", 2))
    assert code == 0 and f"saved {tmp_path}/profiled/profile/trace.json and kernels.txt" in out
    assert "before the profile" not in out
    trace = json.loads((tmp_path / "profiled/profile/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert sum("Optimizer.step#AdamW.step" in name for name in names) == 2
    assert "aten::addmm" in (tmp_path / "profiled/profile/kernels.txt").read_text()
    assert call(train, *train_flags(cache, tmp_path, "plain", *steps))[0] == 0
    assert have_equal_weights(tmp_path / "profiled", tmp_path / "plain", "0000005")


def test_run_that_is_too_short_for_the_profile_says_so(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 2, "--profile", 3)
    code, out = call(train, *flags)
    assert code == 0 and "--profile: the run ended 13 steps before the profile was complete" in out
