"""Runs with non-finite losses or damaged checkpoints: the cause is named, earlier work is kept."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from tests.helpers import read_metrics, run_ranks, train_flags
from training import alignment


def make_loss_nan(monkeypatch, steps):
    """Turn the denoising loss of these steps, counted from 1, into NaN."""
    loss, calls = train.denoising_loss, []

    def spy(prediction, target):
        calls.append(1)
        value = loss(prediction, target)
        return value * float("nan") if len(calls) in steps else value

    monkeypatch.setattr(train, "denoising_loss", spy)


def have_equal_tensors(a, b) -> bool:
    a, b = load_file(a), load_file(b)
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("shard", "part"),
    [([], ""), (["--shard", "full"], "-00000-of-00001")],
    ids=["whole", "sharded"],
)
def test_non_finite_step_is_skipped_and_reported(
    call, cache, tmp_path, monkeypatch, shard, part, process_group
):
    make_loss_nan(monkeypatch, {3, 5})
    flags = train_flags(cache, tmp_path, "run", "--log-every", 2, "--max-train-steps", 6, *shard)
    code, out = call(train, *flags)
    assert code == 0
    assert "step 3: not finite: denoising, grad_norm; update skipped" in out
    assert "step 5: not finite: denoising" in out
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert all(row["loss"] < 10 for row in rows)  # means over the finite steps
    checkpoint = tmp_path / "run/checkpoints/0000006"
    moments = load_file(checkpoint / f"optimizer{part}.safetensors")
    assert moments["0.step"] == 4
    for tensors in (moments, load_file(checkpoint / f"model{part}.safetensors")):
        assert all(torch.isfinite(value).all() for value in tensors.values())


@pytest.mark.parametrize("starts", [[20], [6, 20]], ids=["without-resuming", "resumed"])
def test_consecutive_non_finite_steps_end_the_run_and_keep_the_last_checkpoint(
    call, cache, tmp_path, monkeypatch, starts
):
    flags = train_flags(cache, tmp_path, "run", "--log-every", 3, "--checkpointing-steps", 2)
    make_loss_nan(monkeypatch, set(range(4, 30)))
    for steps in starts:
        code, out = call(train, *flags, "--max-train-steps", steps)
        assert code == (2 if steps == 20 else 0)
    assert (
        "step 8: not finite: denoising, grad_norm; update skipped; 5 consecutive steps were bad."
        in out
    )
    checkpoints = tmp_path / "run/checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["0000002", "0000004", "0000006"]
    models = [checkpoints / name / "model.safetensors" for name in names[1:]]
    assert have_equal_tensors(*models)


def test_non_finite_loss_of_weight_zero_does_not_affect_the_training(
    call, cache, tmp_path, monkeypatch
):
    def give_nan(prediction, *args):
        return prediction.mean((1, 2)) * float("nan")

    monkeypatch.setattr(alignment, "alignment_loss", give_nan)
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 2, "--align-weight", 0)
    assert call(train, *flags)[0] == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0]
    assert all(row["loss"] == row["denoising"] > 0 for row in rows)


def test_nan_on_one_process_is_skipped_by_all(call, cache, tmp_path):
    """One image of the cache is NaN; it occurs once per epoch, on one of the processes."""
    data = shutil.copytree(cache, tmp_path / "data")
    shard = sorted((data / "moments").glob("*.npy"))[1]
    moments = np.load(shard)
    moments[3] = np.nan
    np.save(shard, moments)
    run_ranks(2, "train", *train_flags(data, tmp_path, "two", "--max-train-steps", 3))
    code, _ = call(train, *train_flags(data, tmp_path, "one", "--max-train-steps", 3))
    assert code == 0
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert sorted(row["skipped"] for row in two) == [0, 0, 1]
    for row, other in zip(two, one, strict=True):
        assert row["skipped"] == other["skipped"]
        if not row["skipped"]:
            assert row == pytest.approx(other, rel=1e-4)
    log = (tmp_path / "two/log.txt").read_text()
    assert "not finite: denoising, align/sra2, grad_norm; update skipped" in log
    cause = (
        f"because the moments of image 13 (row 3 of {shard}) are not finite; check the cache with "
        f"python -m preprocessing.verify {data}\n"
    )
    assert cause in log and cause in (tmp_path / "one/log.txt").read_text()


def test_damage_to_the_newest_checkpoint_is_named_with_the_previous_one(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--checkpointing-steps", 1)
    assert call(train, *flags, "--max-train-steps", 2)[0] == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert all(f"saved {tmp_path}/run/checkpoints/{step:07d}" in log for step in (1, 2))
    for name in ("config.json", "progress.json"):
        path = tmp_path / "run/checkpoints/0000002" / name
        content = path.read_bytes()
        digit = content.index(b"0.")
        changed = content[:digit] + b"9" + content[digit + 1 :]
        not_utf8 = content[:20] + b"\xff" + content[21:]
        for damaged in (content[:50], changed, not_utf8, None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            code, out = call(train, *flags, "--max-train-steps", 3)
            assert code == 2 and len(out.splitlines()) == 1, out
            assert name in out and "0000001" in out, out
        path.write_bytes(content)
    assert call(train, *flags, "--max-train-steps", 3)[0] == 0
