"""Runs whose numbers, or whose checkpoints, go bad: what is wrong is named, and what was good is kept."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from tests.helpers import read_metrics, run_ranks, train_flags


def poison(monkeypatch, steps):
    """Turns the denoising loss of these steps, counted from 1, into NaN."""
    losses, calls = train.training_losses, []

    def spy(*args, **kwargs):
        calls.append(1)
        terms = losses(*args, **kwargs)
        return (
            terms._replace(denoising=terms.denoising * float("nan"))
            if len(calls) in steps
            else terms
        )

    monkeypatch.setattr(train, "training_losses", spy)


def test_a_step_gone_bad_is_skipped_and_named(call, cache, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 5})
    flags = train_flags(cache, tmp_path, "run", "--log-every", 2, "--max-train-steps", 6)
    code, out = call(train, *flags)
    assert (
        code == 0
        and "step 3: denoising loss, gradient not finite, update skipped" in out
        and "step 5: denoising" in out
    )
    assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [0, 1, 1]
    assert all(
        row["loss"] < 10 for row in read_metrics(tmp_path / "run")
    )  # the means are of the good steps
    state = load_file(tmp_path / "run/checkpoints/0000006/optimizer.safetensors")
    assert state["0.step"] == 4 and all(torch.isfinite(value).all() for value in state.values())
    weights = load_file(tmp_path / "run/checkpoints/0000006/model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_bad_steps_in_a_row_end_the_run_with_the_last_checkpoint_as_it_was(
    call, cache, tmp_path, monkeypatch
):
    flags = train_flags(
        cache,
        tmp_path,
        "run",
        "--log-every",
        3,
        "--max-train-steps",
        20,
        "--checkpointing-steps",
        2,
    )
    poison(monkeypatch, set(range(4, 30)))
    code, out = call(train, *flags)
    assert (
        code == 2
        and "step 8: denoising loss, gradient not finite, update skipped, like the 4 before it"
        in out
    )
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["0000002", "0000004", "0000006"]
    assert same_tensors(
        *(tmp_path / f"run/checkpoints/000000{k}/model.safetensors" for k in (4, 6))
    )


def test_a_nan_on_one_process_is_skipped_by_all(call, cache, tmp_path):
    """One image of the cache is NaN; it comes once an epoch, to one of the processes."""
    data = shutil.copytree(cache, tmp_path / "data")
    shard = sorted((data / "moments").glob("*.npy"))[1]
    moments = np.load(shard)
    moments[3] = np.nan
    np.save(shard, moments)
    flags = ["--max-train-steps", 3]
    run_ranks(2, "train", *train_flags(data, tmp_path, "two", *flags))
    assert call(train, *train_flags(data, tmp_path, "one", *flags))[0] == 0
    ours, theirs = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert sorted(row["skipped"] for row in ours) == [0, 0, 1]
    for row, other in zip(ours, theirs, strict=True):
        assert row["skipped"] == other["skipped"]
        if not row["skipped"]:
            assert row == pytest.approx(other, rel=1e-4)
    assert (
        "denoising loss, alignment loss, gradient not finite, update skipped"
        in (tmp_path / "two/log.txt").read_text()
    )


def same_tensors(a, b) -> bool:
    a, b = load_file(a), load_file(b)
    return all(torch.equal(a[key], b[key]) for key in a)


def test_damage_to_the_newest_checkpoint_is_named_and_the_one_before_offered(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--checkpointing-steps", 1)
    assert call(train, *flags, "--max-train-steps", 2)[0] == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert all(f"saved {tmp_path}/run/checkpoints/{step:07d}" in log for step in (1, 2))
    for name in ("config.json", "progress.json"):
        path = tmp_path / "run/checkpoints/0000002" / name
        whole = path.read_bytes()
        digit = whole.index(b"0.")
        changed = whole[:digit] + b"9" + whole[digit + 1 :]
        for bad in (whole[:50], changed, whole[:20] + b"\xff" + whole[21:], None):
            path.unlink() if bad is None else path.write_bytes(bad)
            code, out = call(train, *flags, "--max-train-steps", 3)
            assert (
                code == 2
                and name in out
                and "0000002 to continue from 0000001" in out
                and len(out.splitlines()) == 1
            ), out
        path.write_bytes(whole)
    assert call(train, *flags, "--max-train-steps", 3)[0] == 0
