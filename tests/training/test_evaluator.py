"""Evaluation while training: the numbers of the commands, and a training that does not notice."""

import json
import os
import signal

import numpy as np
import pytest

import sample_ddp
import train
from evaluations import evaluate
from tests.helpers import have_equal_weights, read_metrics, run_ranks, train_flags
from training import evaluation
from training.held_out import HeldOut
from training.log import read_rows
from training.preemption import EXIT_STOPPED

EVAL = "--eval-every 2 --eval-samples 9 --eval-features fashion --eval-num-steps 3 --eval-batch-size 4 --ema-decay 0.9 0"


@pytest.fixture(scope="module")
def flags(cache, tree):
    """Five steps, evaluated after the second, the fourth and the last, of two averages."""

    def make(exps, *more) -> list[str]:
        common = train_flags(cache, exps, "run", "--max-train-steps", 5, "--checkpointing-steps", 5)
        held_out = [] if more == ("--eval-every", 0) else ["--eval-latents", str(cache)]
        return [*common, *EVAL.split(), "--eval-reference", str(tree), *held_out, *map(str, more)]

    return make


def evaluations(run) -> dict[tuple, dict]:
    lines = [row for row in read_rows(run) if "evaluation" in row]
    found = {(row["step"], row["evaluation"]["ema_decay"]): row for row in lines}
    assert len(found) == len(lines), "doubled"
    return found


def training(run) -> list[dict]:
    return [row for row in read_metrics(run) if "evaluation" not in row]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, flags):
    exps = tmp_path_factory.mktemp("evaluated")
    run_ranks(1, "train", *flags(exps))
    return exps / "run"


def test_it_reports_what_the_commands_report(call, unbroken, tree, cache, tmp_path):
    found = evaluations(unbroken)
    assert list(found) == [(step, decay) for step in (2, 4, 5) for decay in (0.9, 0.0)]
    for decay in (0.9, 0.0):
        sample = [
            "--ckpt",
            unbroken,
            "--num-fid-samples",
            9,
            "--num-steps",
            3,
            "--per-proc-batch-size",
            4,
        ]
        assert (
            call(
                sample_ddp, *sample, "--ema-decay", decay, "--sample-dir", tmp_path, "--name", decay
            )[0]
            == 0
        )
        measured = tmp_path / f"{decay}.npz"
        assert (
            call(
                evaluate,
                measured,
                "--reference",
                tree,
                "--features",
                "fashion",
                "--out",
                tmp_path / "m.json",
            )[0]
            == 0
        )
        metrics = json.loads((tmp_path / "m.json").read_text())
        (tmp_path / "m.json").unlink()
        row = found[5, decay]
        assert metrics["sampling"]["ema_decay"] == decay
        assert {key: row[key] for key in metrics["metrics"]} == pytest.approx(
            metrics["metrics"], rel=1e-6
        )
        assert row["evaluation"]["reference_sha256"] == metrics["reference_sha256"]
        assert row["held_out"] > 0 and row["evaluation"]["held_out"] == HeldOut(cache, 9).identity
        assert (row["images"], row["evaluation"]["solver"], row["evaluation"]["samples"]) == (
            40,
            "euler-maruyama",
            9,
        )
    ours, theirs = (np.load(tmp_path / f"{decay}.npz")["arr_0"] for decay in (0.9, 0.0))
    assert not np.array_equal(ours, theirs)


def test_training_does_not_notice(call, flags, unbroken, tmp_path):
    assert call(train, *flags(tmp_path, "--eval-every", 0))[0] == 0
    assert training(tmp_path / "run") == training(unbroken) and not evaluations(tmp_path / "run")
    assert have_equal_weights(tmp_path / "run", unbroken, "0000005")


def test_two_processes_report_what_one_does(flags, unbroken, tmp_path):
    """Of the same weights: a run finished without evaluation is evaluated when it is asked for."""
    run_ranks(1, "train", *flags(tmp_path, "--eval-every", 0))
    run_ranks(2, "train", *flags(tmp_path))
    ours, theirs = evaluations(tmp_path / "run"), evaluations(unbroken)
    assert list(ours) == [(5, 0.9), (5, 0.0)]
    for key, row in ours.items():
        assert {k: v for k, v in row.items() if k != "evaluation"} == pytest.approx(
            {k: v for k, v in theirs[key].items() if k != "evaluation"}, rel=1e-6
        )


@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_signal_cuts_an_evaluation_short_and_it_is_made_up_for(
    call, flags, unbroken, tmp_path, monkeypatch, at
):
    measure = evaluation.Evaluator.measure

    def signalled(self, model, gather_all, stopped):
        if (
            len(evaluations(tmp_path / "run")) == {2: 0, 4: 2, 5: 5}[at]
        ):  # at the last step, between the two averages
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, model, gather_all, stopped)

    monkeypatch.setattr(train.Evaluator, "measure", signalled)
    assert call(train, *flags(tmp_path))[0] == EXIT_STOPPED
    monkeypatch.setattr(train.Evaluator, "measure", measure)
    assert (tmp_path / f"run/checkpoints/000000{at}").exists()
    code, out = call(train, *flags(tmp_path))
    assert code == 0 and "finished at step 5" in out
    assert read_metrics(tmp_path / "run") == read_metrics(unbroken)
    assert have_equal_weights(tmp_path / "run", unbroken, "0000005")
    code, out = call(train, *flags(tmp_path))
    assert code == 0 and "has finished its 5 steps" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-reference", "/nonexistent"], "--eval-reference /nonexistent does not exist"),
        (["--eval-cfg-scale", 0.5], "--eval-cfg-scale 0.5 is below 1"),
        (["--eval-heun"], "--eval-heun is an ODE solver; set the mode to ode"),
        (["--eval-samples", 3], "--eval-samples 3 is too few"),
        (["--eval-every", 0, "--resolution", 32], "--eval-latents needs --eval-every"),
        (["--eval-latents", "/nonexistent"], "--eval-latents: /nonexistent"),
        (["--ema-decay", 0.9, 0.9], "--ema-decay 0.9 0.9: each only once"),
        (
            ["--eval-features", "inception", "--inception-weights", "/nonexistent"],
            "no Inception weights: fetch",
        ),
        (["--epochs", 2], "--epochs and --max-train-steps both say how long to train"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(call, flags, tmp_path, more, message):
    code, out = call(train, *flags(tmp_path), *more)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_a_reference(call, cache, tmp_path):
    code, out = call(train, *train_flags(cache, tmp_path, "run"), "--eval-every", 2)
    assert code == 2 and "--eval-every needs --eval-reference" in out
