"""Learning rates as functions of the step, and their use in the optimizer, the log and resuming."""

import shutil

import pytest

import train
from common.cli import UserError
from tests.helpers import call_main, have_equal_weights, read_metrics, train_flags
from training.config import parse_settings
from training.log import format_line
from training.optimizer import build_schedule
from training.schedule import SCHEDULES, LearningRateSchedule

FLAGS = ["--lr-schedule", "cosine", "--lr-warmup-steps", 1, "--optimizer", "muon"]


def make_rates(kind, warmup_steps=0, min_factor=0.0, num_steps=8) -> list[float]:
    schedule = LearningRateSchedule(2.0, kind, warmup_steps, min_factor, num_steps)
    return [schedule.compute(step) for step in range(num_steps + 2)]


def test_warmup_is_linear_and_ends_at_the_peak():
    rates = make_rates("constant", warmup_steps=3)
    assert rates == [0.5, 1.0, 1.5] + [2.0] * 7
    assert make_rates("cosine", warmup_steps=3)[:4] == [0.5, 1.0, 1.5, 2.0]


def test_linear_schedule_has_equal_differences():
    rates = make_rates("linear", warmup_steps=4, min_factor=0.5)
    assert rates[4:] == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]


def test_cosine_schedule_is_symmetric_around_the_middle():
    rates = make_rates("cosine")
    assert rates[0] == 2.0 and rates[4] == pytest.approx(1.0) and rates[8:] == [0.0, 0.0]
    assert [rates[step] + rates[8 - step] for step in range(9)] == pytest.approx([2.0] * 9)
    assert rates[:9] == sorted(rates[:9], reverse=True)


def test_default_is_exactly_the_learning_rate():
    settings = parse_settings(["--exp-name", "x", "--data-dir", "x", "--learning-rate", "0.0003"])
    schedule = build_schedule(settings.optimizer, settings.loop, 100)
    assert {schedule.compute(step) for step in (0, 1, 399_999, 10**9)} == {0.0003}
    assert schedule.is_fixed


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_properties_agree_with_the_learning_rates(kind, warmup_steps):
    schedule = LearningRateSchedule(2.0, kind, warmup_steps, 0.0, 8)
    rates = make_rates(kind, warmup_steps)
    assert schedule.is_fixed == (len(set(rates)) == 1)
    longer = make_rates(kind, warmup_steps, num_steps=9)
    assert schedule.depends_on_length == (longer[: len(rates)] != rates)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr-min-factor 0.1", "--lr-min-factor 0.1 needs --lr-schedule cosine or linear"),
        ("--muon-momentum 0.9", "--muon-momentum 0.9 needs --optimizer muon"),
        ("--muon-weight-decay 0", "--muon-weight-decay 0.0 needs --optimizer muon"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_settings(["--exp-name", "x", "--data-dir", "x", *flags.split()])


def test_warmup_must_be_shorter_than_a_decreasing_schedule(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--lr-warmup-steps", 3)
    code, out = call(train, *flags, "--lr-schedule", "linear")
    assert code == 2 and not (tmp_path / "run").exists()
    assert "--lr-warmup-steps 3 leaves no steps for --lr-schedule linear: the run has 3" in out
    code, out = call(train, *flags, "--lr-schedule", "constant", "--print-config")
    assert code == 0, out


def test_each_update_has_the_learning_rate_of_its_step(make_meta_step):
    step, batch = make_meta_step(*FLAGS, "--max-train-steps", 4)
    rates = []

    def record_rates():
        rates.append({group["lr"] for group in step.optimizer.param_groups})

    step.optimizer.step = record_rates
    for _ in range(4):
        step(batch)
    schedule = LearningRateSchedule(1e-4, "cosine", 1, 0.0, 4)
    assert rates == [{schedule.compute(number)} for number in range(4)]


def test_learning_rate_is_shown_with_the_losses():
    line = format_line(1, 2, 0.5, None, {"loss": 2.5}, 1e-3 / 3)
    assert line.endswith("remaining: loss 2.5000, lr 0.000333")


@pytest.fixture(scope="module")
def scheduled(cache, tmp_path_factory):
    """Return a run of four steps with a schedule and Muon, and its flags."""
    exps = tmp_path_factory.mktemp("scheduled")
    flags = train_flags(cache, exps, "whole", *FLAGS, "--max-train-steps", 4)
    flags += ["--checkpointing-steps", "2"]
    call_main(train, *flags)
    return exps / "whole", flags


def test_learning_rates_are_logged(scheduled):
    run, _ = scheduled
    schedule = LearningRateSchedule(1e-3, "cosine", 1, 0.0, 4)
    rates = [row["lr"] for row in read_metrics(run)]
    assert rates == [schedule.compute(step) for step in range(4)]
    assert rates[0] == 5e-4 and rates[1] == 1e-3 and 0 < rates[3] < rates[2] < 1e-3


def test_interrupted_run_equals_an_uninterrupted_one(call, scheduled, tmp_path):
    """Its weights, EMA, moments and metrics are identical, with a schedule and Muon."""
    run, flags = scheduled
    resumed = shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(resumed / "checkpoints/0000004")
    code, out = call(train, *flags, "--output-dir", tmp_path)
    assert code == 0 and "resuming from" in out and "lr 0.00075" in out, out
    assert have_equal_weights(resumed, run, "0000004")
    assert read_metrics(resumed) == read_metrics(run)


def test_length_of_a_decreasing_schedule_is_fixed(call, scheduled):
    _, flags = scheduled
    code, out = call(train, *flags)
    assert code == 0 and "has completed its 4 steps\n" in out
    code, out = call(train, *flags, "--max-train-steps", 6)
    assert code == 2 and len(out.splitlines()) == 1
    assert "--max-train-steps was 4, now 6 (--lr-schedule cosine depends on it)" in out
    code, out = call(train, *flags, "--lr-schedule", "constant")
    assert code == 2 and "--lr-schedule was cosine, now constant" in out
    code, out = call(train, *flags, "--optimizer", "adamw")
    assert code == 2 and "--optimizer was muon, now adamw" in out
