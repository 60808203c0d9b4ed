"""Evaluation during training: the metrics of the commands, and no effect on the training."""

import json
import os
import signal
import time

import numpy as np
import pytest

import sample_ddp
import train
from common.cli import EXIT_STOPPED
from common.metrics_log import read_rows
from evaluations import evaluate
from tests.helpers import call_main, have_equal_weights, read_metrics, run_ranks, train_flags
from training import stop_file
from training.evaluation import Evaluator
from training.held_out import HeldOutLoss

EVALUATION = (
    "--eval-every 2 --eval-samples 9 --eval-features fashion --eval-num-steps 3 "
    "--eval-batch-size 4 --ema-decay 0.9 0"
)


@pytest.fixture(scope="module")
def flags(cache, tree):
    """Return a function that gives the flags of five steps.

    Two EMAs are evaluated after the second, the fourth and the last step.
    """

    def make(exps, *more) -> list[str]:
        steps = ("--max-train-steps", 5, "--checkpointing-steps", 5)
        common = train_flags(cache, exps, "run", *steps)
        held_out = [] if more == ("--eval-every", 0) else ["--eval-latents", str(cache)]
        reference = ["--eval-reference", str(tree)]
        return [*common, *EVALUATION.split(), *reference, *held_out, *map(str, more)]

    return make


def read_evaluations(run) -> dict[tuple, dict]:
    lines = [row for row in read_rows(run) if "evaluation" in row]
    found = {(row["step"], row["evaluation"]["ema_decay"]): row for row in lines}
    assert len(found) == len(lines), "an evaluation was repeated"
    return found


def drop_identity(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "evaluation"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, flags):
    exps = tmp_path_factory.mktemp("evaluated")
    call_main(train, *flags(exps))
    return exps / "run"


def test_metrics_equal_those_of_the_commands(call, unbroken, tree, cache, tmp_path):
    found = read_evaluations(unbroken)
    assert list(found) == [(step, decay) for step in (2, 4, 5) for decay in (0.9, 0.0)]
    sampler = ["--num-fid-samples", 9, "--num-steps", 3, "--per-proc-batch-size", 4]
    for decay in (0.9, 0.0):
        names = ["--ema-decay", decay, "--sample-dir", tmp_path, "--name", decay]
        assert call(sample_ddp, "--ckpt", unbroken, *sampler, *names)[0] == 0
        result = tmp_path / f"metrics-{decay}.json"
        options = ["--reference", tree, "--features", "fashion", "--out", result]
        assert call(evaluate, tmp_path / f"{decay}.npz", *options)[0] == 0
        expected = json.loads(result.read_text())
        row = found[5, decay]
        identity = row["evaluation"]
        assert expected["sampling"]["ema_decay"] == decay
        measured = {key: row[key] for key in expected["metrics"]}
        assert measured == pytest.approx(expected["metrics"], rel=1e-6)
        assert identity["reference_sha256"] == expected["reference_sha256"]
        assert row["held_out"] > 0 and identity["held_out"] == HeldOutLoss(cache, 9).identity
        assert row["images"] == 40
        assert (identity["solver"], identity["samples"]) == ("euler-maruyama", 9)
    samples = [np.load(tmp_path / f"{decay}.npz")["arr_0"] for decay in (0.9, 0.0)]
    assert not np.array_equal(*samples)


def test_evaluation_does_not_change_the_training(call, flags, unbroken, tmp_path):
    assert call(train, *flags(tmp_path, "--eval-every", 0))[0] == 0
    run = tmp_path / "run"
    training_rows = [row for row in read_metrics(unbroken) if "evaluation" not in row]
    assert read_metrics(run) == training_rows and not read_evaluations(run)
    assert have_equal_weights(run, unbroken, "0000005")


def test_two_processes_measure_the_same_as_one(call, flags, unbroken, tmp_path):
    """The weights are the same: a finished run is evaluated when evaluation is requested later."""
    assert call(train, *flags(tmp_path, "--eval-every", 0))[0] == 0
    run_ranks(2, "train", *flags(tmp_path))
    two, one = read_evaluations(tmp_path / "run"), read_evaluations(unbroken)
    assert list(two) == [(5, 0.9), (5, 0.0)]
    for key, row in two.items():
        assert drop_identity(row) == pytest.approx(drop_identity(one[key]), rel=1e-6)


@pytest.mark.parametrize(
    ("step", "reason"),
    [pytest.param(2, "signal", marks=pytest.mark.long), (4, "file"), (5, "signal")],
)
def test_evaluation_interrupted_by_a_signal_or_file_is_completed_on_resume(
    call, flags, unbroken, tmp_path, monkeypatch, step, reason
):
    run = tmp_path / "run"
    measure = Evaluator.measure
    complete_before = {2: 0, 4: 2, 5: 5}[step]  # at the last step, between the two EMAs

    def measure_with_interruption(self, model, gather, is_stopped):
        if len(read_evaluations(run)) == complete_before:
            if reason == "file":
                (run / "STOP").touch()
                while not is_stopped():
                    time.sleep(0.01)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, model, gather, is_stopped)

    with monkeypatch.context() as patch:
        patch.setattr(stop_file, "POLL_SECONDS", 0.01)
        patch.setattr(Evaluator, "measure", measure_with_interruption)
        patch.setattr(Evaluator, "try_out", lambda *args: None)
        assert call(train, *flags(tmp_path))[0] == {"signal": EXIT_STOPPED, "file": 0}[reason]
    assert (run / f"checkpoints/000000{step}").exists()
    code, out = call(train, *flags(tmp_path))
    assert code == 0 and "finished at step 5" in out
    assert read_metrics(run) == read_metrics(unbroken)
    assert have_equal_weights(run, unbroken, "0000005")
    code, out = call(train, *flags(tmp_path))
    assert code == 0 and "has completed its 5 steps" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-reference", "/nonexistent"], "--eval-reference /nonexistent does not exist"),
        (["--eval-cfg-scale", 0.5], "--eval-cfg-scale"),
        (["--eval-heun"], "--eval-heun"),
        (["--eval-samples", 3], "--eval-samples 3 is too few"),
        (["--eval-every", 0, "--resolution", 32], "--eval-latents needs --eval-every"),
        (["--recomputed-blocks", 2], "--recomputed-blocks needs --activation-checkpointing"),
        (["--eval-latents", "/nonexistent"], "--eval-latents: /nonexistent"),
        (["--ema-decay", 0.9, 0.9], "--ema-decay 0.9 0.9 repeats a value"),
        (["--eval-features", "inception", "--inception-weights", "/none"], "Inception weights"),
        (["--epochs", 2], "--epochs and --max-train-steps both set the length"),
    ],
)
def test_errors_end_in_one_line_before_any_work(call, flags, tmp_path, more, message):
    code, out = call(train, *flags(tmp_path), *more)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_a_reference(call, cache, tmp_path):
    code, out = call(train, *train_flags(cache, tmp_path, "run"), "--eval-every", 2)
    assert code == 2 and "--eval-every needs --eval-reference" in out
