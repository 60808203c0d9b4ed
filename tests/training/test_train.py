import errno
import fcntl
import io
import json
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from checkpointing.storage import (
    CheckpointError,
    RunOwner,
    list_checkpoints,
    progress_digest,
    read_progress,
)
from common.cli import UserError
from latents.cache import LatentCache
from models.autoencoder import LatentScale
from models.targets import latent_tokens
from tests.helpers import (
    call_main,
    have_equal_weights,
    make_vae,
    read_metrics,
    run_ranks,
    train_flags,
)
from tests.training.steps import make_settings
from training.inputs import InputSampler
from training.preview import Preview
from training.resume import build_args_json, check_same_run

# Two methods, one of which stops during the run.
ALIGNED = ("--align", "sra2", "sra", "--align-stop-step", 6, 0, "--log-every", 2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    """Ten steps without interruption, logged every two steps.

    A checkpoint after five steps therefore falls between two log lines.
    """
    exps = tmp_path_factory.mktemp("unbroken")
    call_main(train, *train_flags(cache, exps, "run", "--max-train-steps", 10, *ALIGNED))
    return exps / "run"


@pytest.fixture
def drawn_inputs(monkeypatch):
    """Return the list of the inputs that the steps of the test draw."""
    inputs = []
    draw = InputSampler.__call__

    def spy(self, batch):
        inputs.append(draw(self, batch))
        return inputs[-1]

    monkeypatch.setattr(InputSampler, "__call__", spy)
    return inputs


def assert_close_metrics(run, other):
    for row, expected in zip(read_metrics(run), read_metrics(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED)
    assert call(train, *flags, "--max-train-steps", 5)[0] == 0
    # A run that was killed after its last checkpoint leaves newer lines, the last one incomplete.
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    code, out = call(train, *flags, "--max-train-steps", 10)
    assert code == 0 and "resuming from" in out
    assert read_metrics(tmp_path / "run") == read_metrics(unbroken)
    assert have_equal_weights(tmp_path / "run", unbroken)
    code, out = call(train, *flags, "--max-train-steps", 10)
    assert code == 0 and "has completed its 10 steps" in out


def test_ema_follows_the_weights_of_every_step(call, cache, tmp_path):
    options = ("--max-train-steps", 3, "--checkpointing-steps", 1, "--ema-decay", 0.9, 0.5)
    assert call(train, *train_flags(cache, tmp_path, "run", *options))[0] == 0
    folders = [tmp_path / f"run/checkpoints/000000{k}" for k in (1, 2, 3)]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for name, decay in (("ema", 0.9), ("ema-0.5", 0.5)):
        emas = [load_file(folder / f"{name}.safetensors") for folder in folders]
        for before, after, now in zip(emas, emas[1:], weights[1:]):
            for key in after:
                expected = decay * before[key] + (1 - decay) * now[f"backbone.{key}"]
                torch.testing.assert_close(after[key], expected)
        key = "blocks.0.attn.qkv.weight"
        assert not torch.equal(emas[0][key], emas[2][key])


def test_two_processes_give_the_losses_of_one(cache, tmp_path, unbroken):
    options = (*ALIGNED, "--max-train-steps", 10, "--cache-in-ram")  # one memory for both
    output = run_ranks(2, "train", *train_flags(cache, tmp_path, "run", *options))
    keys = ("loss", "denoising", "align/sra2", "align/sra")
    rows = zip(read_metrics(tmp_path / "run"), read_metrics(unbroken), strict=True)
    for row, expected in rows:
        assert row["step"] == expected["step"]
        assert [row[k] for k in keys] == pytest.approx([expected[k] for k in keys], abs=1e-5)
    assert expected["align/sra2"] == 0 < expected["align/sra"]
    # Without a terminal, each line of metrics.jsonl has a line in the output of the first process.
    assert output.count(" remaining: loss ") == len(read_metrics(tmp_path / "run"))
    first, *_, last = (tmp_path / "run/rank-1.log").read_text().splitlines()
    assert "started rank 1 of 2 on " in first and "finished at step 10" in last
    assert output.count("finished at step 10") == 1


def test_number_of_processes_may_change_on_resume(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED)
    assert call(train, *flags, "--max-train-steps", 3)[0] == 0
    # A STOP file stops both processes with exit code 0. It is removed, so the run can be resumed.
    (tmp_path / "run/STOP").touch()
    run_ranks(2, "train", *flags, "--max-train-steps", 10, "--gradient-accumulation-steps", 2)
    assert not (tmp_path / "run/STOP").exists()
    (stop,) = re.findall(
        r"stopped by .*run/STOP at step (.)", (tmp_path / "run/log.txt").read_text()
    )
    assert 3 < int(stop) < 10
    assert call(train, *flags, "--max-train-steps", 10, "--gradient-accumulation-steps", 4)[0] == 0
    assert_close_metrics(tmp_path / "run", unbroken)


def test_joined_caches_train_and_may_be_loaded_into_ram_later(call, cache, tmp_path, unbroken):
    copy = shutil.copytree(cache, tmp_path / "copy")
    flags = train_flags(cache, tmp_path, "run")
    flags[2:2] = [str(copy)]
    assert flags[:3] == ["--data-dir", str(cache), str(copy)]
    assert call(train, *flags, "--max-train-steps", 3)[0] == 0
    code, out = call(train, *flags, "--max-train-steps", 6, "--cache-in-ram")
    assert code == 0 and "48 images per epoch" in out, out
    rows = read_metrics(tmp_path / "run")
    first = read_metrics(unbroken)[0]  # of the cache alone: other images come first
    assert len(rows) == 6 and rows[0]["denoising"] != first["denoising"]
    code, out = call(train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 9))
    assert code == 2 and "is not the cache that" in out and "count" in out
    (copy / "moments/00001.npy").unlink()
    code, out = call(train, *flags, "--max-train-steps", 9)
    assert code == 2 and "00001.npy" in out
    assert f"preprocessing.verify --repair {copy}" in out


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_shard_ends_the_run_in_one_line(call, cache, tmp_path, monkeypatch, num_workers):
    """A DataLoader worker returns the error, so that its message arrives unchanged."""
    from latents.cache import CacheError

    gather = LatentCache.gather
    reads = []

    def fail_on_second_read(self, *args):
        reads.append(1)
        if len(reads) == 2:
            raise CacheError("/data/moments/00001.npy cannot be read")
        return gather(self, *args)

    monkeypatch.setattr(LatentCache, "gather", fail_on_second_read)
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 4)
    code, out = call(train, *flags, "--num-workers", num_workers)
    assert code == 2
    assert out.strip().endswith("error: /data/moments/00001.npy cannot be read")


def test_bf16_trains_close_to_float32(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED, "--max-train-steps", 10)
    assert call(train, *flags, "--mixed-precision", "bf16")[0] == 0
    last, expected = read_metrics(tmp_path / "run")[-1], read_metrics(unbroken)[-1]
    assert last["denoising"] != expected["denoising"]
    assert last["denoising"] == pytest.approx(expected["denoising"], rel=0.05)
    weights = load_file(tmp_path / "run/checkpoints/0000010/ema.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_time_spent_waiting_for_data_is_logged(call, cache, tmp_path, monkeypatch):
    gather = LatentCache.gather
    monkeypatch.setattr(LatentCache, "gather", lambda *args: (time.sleep(0.05), gather(*args))[1])
    assert call(train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 3))[0] == 0
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["data_s"] >= 0.05
        assert row["step_s"] == pytest.approx(row["data_s"] + row["compute_s"])


def test_every_alignment_option_changes_the_loss(call, cache, tmp_path):
    options = [
        "",
        "--align-loss smooth_l1",
        "--align-loss smooth_l1 --align-beta 0.5",
        "--align-target sample",
        "--align-normalize channel",
        "--align-t-range 0 0.5",
        "--align-depth 3",
        "--projector-layers 2",
        "--path-type cosine",
    ]
    losses = []
    for i, flags in enumerate(options):
        given = train_flags(cache, tmp_path, str(i), "--max-train-steps", 2, *flags.split())
        code, out = call(train, *given)
        assert code == 0, out
        losses.append(read_metrics(tmp_path / str(i))[-1]["align/sra2"])
    assert len(set(losses)) == len(options) and min(losses) > 0, losses


def test_previews_show_the_ema_with_fixed_noise_and_change_nothing(
    call, cache, tmp_path, monkeypatch
):
    weights, recipes = [], []
    draw = Preview.draw

    def spy_draw(self, ema, gather, title):
        assert not ema.training and not any(p.requires_grad for p in ema.parameters())
        weights.append({key: value.clone() for key, value in ema.state_dict().items()})
        recipes.append(self.recipe)
        return draw(self, ema, gather, title)

    monkeypatch.setattr(Preview, "draw", spy_draw)
    monkeypatch.setattr(Preview, "num_steps", 2)
    options = [
        "--max-train-steps",
        "3",
        "--seed",
        "5",
        "--prediction",
        "x",
        "--path-type",
        "cosine",
    ]
    flags = train_flags(cache, tmp_path, "run", *options)
    code, out = call(train, *flags, "--sampling-steps", 2)
    assert code == 0, out
    names = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert names == ["0000002.png", "0000003.png", "real.png"]
    for recipe in recipes:
        assert (recipe.seed, recipe.prediction, recipe.path_type) == (5, "x", "cosine")
        assert recipe.explicit_labels.tolist() == 8 * [0] + 8 * [1] + 8 * [2]  # a class per row
    saved = load_file(tmp_path / "run/checkpoints/0000003/ema.safetensors")
    assert all(torch.equal(weights[1][key], saved[key]) for key in saved)
    code, _ = call(train, *train_flags(cache, tmp_path, "plain", *options))
    assert code == 0 and read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "run")


def test_name_that_the_terminal_cannot_represent_does_not_end_the_run(
    call, cache, tmp_path, monkeypatch
):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    flags = train_flags(cache, tmp_path, "λόγος", "--max-train-steps", 1)
    assert call(train, *flags)[0] == 0
    assert "saved" in (tmp_path / "λόγος/log.txt").read_text()


def test_print_config_prints_the_resolved_flags_and_stops(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--epochs", 2.1)
    code, out = call(train, *flags, "--print-config")
    assert code == 0 and not (tmp_path / "run").exists()
    lines = out.strip().splitlines()
    assert "--max-train-steps 7" in lines  # 2.1 epochs of 24 images in batches of 8
    assert "--mixed-precision no" in lines and "--align-depth 2" in lines


def test_resume_step_must_be_the_newest_checkpoint(call, cache, tmp_path):
    """The error states how to continue from an older one, and this works."""
    flags = train_flags(cache, tmp_path, "run", "--checkpointing-steps", 1)
    code, out = call(train, *flags, "--resume-step", 1)
    assert code == 2 and "--resume-step 1: " in out and "has no checkpoint; remove" in out
    for step in (0, 2):
        code, out = call(train, *flags, "--max-train-steps", step + 2, "--resume-step", step)
        assert code == 0, out
    code, out = call(train, *flags, "--max-train-steps", 5, "--resume-step", 9)
    newest = f"the newest checkpoint of {tmp_path}/run is that of step 4"
    assert code == 2 and f"--resume-step 9: there is no such checkpoint, and {newest}" in out
    code, out = call(train, *flags, "--max-train-steps", 5, "--resume-step", 3)
    assert code == 2 and newest in out and len(out.splitlines()) == 1
    source, destination = re.search(r"copy (\S+) to (\S+) and pass --exp-name NEW", out).groups()
    shutil.copytree(source, destination)
    flags += ["--exp-name", "NEW", "--max-train-steps", 4, "--resume-step", 3]
    code, out = call(train, *flags)
    assert code == 0, out
    assert have_equal_weights(tmp_path / "run", tmp_path / "NEW", "0000004")


def test_folder_of_a_run_of_repa_is_left_unchanged(call, cache, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for path in ("args.json", "checkpoints/0050000.pt", "checkpoints/0100000.pt"):
        (tmp_path / "run" / path).touch()
    before = sorted(tmp_path.rglob("*"))
    code, out = call(train, *train_flags(cache, tmp_path, "run"))
    assert code == 2 and "checkpoints/0100000.pt is a checkpoint of another repository" in out
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "run/args.json").read_text()


def test_other_flags_on_a_started_run_are_listed(call, trained, cache):
    flags = train_flags(cache, trained.parent, trained.name, "--max-train-steps", 4)
    code, out = call(train, *flags, "--learning-rate", 5e-4, "--align-loss", "l2")
    assert code == 2
    assert "--learning-rate was 0.001, now 0.0005" in out
    assert "--align-loss was cosine, now l2" in out
    assert len(read_metrics(trained)) == 2


def test_flags_of_speed_and_memory_may_change_and_new_flags_may_be_missing(tmp_path):
    flags = build_args_json(make_settings(tmp_path, "--max-train-steps", 4))
    new_names = "optimizer lr_schedule lr_warmup_steps lr_min_factor qk_norm adam_beta2"
    for name in new_names.split():
        del flags[name]  # as if the run was started before the flag existed
    progress = {"step": 4, "flags": flags}
    checkpoint = tmp_path / "checkpoints/0000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(
        json.dumps(progress | {"digest": progress_digest(progress)})
    )
    changed = "--max-train-steps 9 --compile --activation-checkpointing --num-workers 1"
    check_same_run(build_args_json(make_settings(tmp_path, *changed.split())), tmp_path)
    with pytest.raises(UserError, match="--seed was 0, now 1"):
        check_same_run(build_args_json(make_settings(tmp_path, "--seed", 1)), tmp_path)
    with pytest.raises(UserError, match="--qk-norm was False, now True"):
        check_same_run(build_args_json(make_settings(tmp_path, "--qk-norm")), tmp_path)
    changed = "--max-train-steps 4 --optimizer muon --lr-schedule linear --lr-warmup-steps 2"
    expected = "--optimizer was adamw, now muon; --lr-schedule was constant, now linear; "
    with pytest.raises(UserError, match=f"{expected}--lr-warmup-steps was 0, now 2. Choose"):
        check_same_run(build_args_json(make_settings(tmp_path, *changed.split())), tmp_path)


def test_flags_may_change_until_the_first_checkpoint(call, cache, tmp_path, monkeypatch):
    """Afterwards, the lines and previews of the first attempt are replaced."""

    def run_out_of_memory(self, batch):
        if self.state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch)

    step = train.Step.__call__
    monkeypatch.setattr(Preview, "num_steps", 2)
    flags = train_flags(cache, tmp_path, "run", "--sampling-steps", 1, "--seed", 1)
    monkeypatch.setattr(train.Step, "__call__", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        call(train, *flags)
    monkeypatch.setattr(train.Step, "__call__", step)
    preview = tmp_path / "run/samples/0000001.png"
    before = preview.read_bytes()
    changed = ["--batch-size", 4, "--learning-rate", "0.1", "--align", "none", "--seed", 2]
    index = flags.index("--projector-width")  # --align none has no projection head
    code, out = call(train, *flags[:index], *flags[index + 2 :], *changed)
    assert code == 0, out
    rows = read_metrics(tmp_path / "run")
    assert [row["images"] for row in rows] == [4, 8, 12] and "align/sra2" not in rows[0]
    assert preview.read_bytes() != before
    code, out = call(train, *flags, "--max-train-steps", 4)
    assert code == 2 and "other flags: --align was none, now sra2. Choose" in out


@pytest.fixture
def copied_run(trained, tmp_path):
    """Return a copy of a run of two steps."""
    return shutil.copytree(trained, tmp_path / "exps" / trained.name)


@pytest.mark.parametrize("content", [b'{"seed": 0, "lear', b"[]", b"null", b"\xff{}", b"", None])
def test_flags_are_compared_with_the_checkpoint_if_args_json_is_damaged(
    call, copied_run, cache, content
):
    args = copied_run / "args.json"
    original = json.loads(args.read_text())
    args.unlink() if content is None else args.write_bytes(content)
    flags = train_flags(cache, copied_run.parent, copied_run.name, "--max-train-steps", 3)
    changed = ["--learning-rate", 5e-4, "--seed", 1, "--adam-beta2", 0.95]
    code, out = call(train, *flags, *changed)
    assert code == 2 and len(out.splitlines()) == 1
    assert "--seed was 0, now 1" in out and "--learning-rate was 0.001, now 0.0005" in out
    assert "--adam-beta2 was 0.999, now 0.95" in out
    assert args.exists() == (content is not None)
    assert call(train, *flags)[0] == 0
    assert json.loads(args.read_text()).keys() == original.keys()


@pytest.mark.parametrize("has_args", [False, True])
def test_flags_of_a_checkpoint_of_older_code_are_compared(call, copied_run, cache, has_args):
    (checkpoint,) = list_checkpoints(copied_run)
    progress = read_progress(checkpoint)
    del progress["flags"]
    progress["digest"] = progress_digest(progress)
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    if not has_args:
        (copied_run / "args.json").unlink()
    flags = train_flags(cache, copied_run.parent, copied_run.name, "--max-train-steps", 3)
    changed = ["--learning-rate", 5e-4, "--cfg-prob", 0.2, "--batch-size", 16]
    code, out = call(train, *flags, *changed)
    assert code == 2 and "--learning-rate was 0.001, now 0.0005" in out
    assert "--cfg-prob was 0.1, now 0.2" in out and "--batch-size was 8, now 16" in out
    assert ("the values of --seed" in out) == (not has_args)
    assert call(train, *flags)[0] == 0


def test_lines_that_a_power_failure_damaged_do_not_prevent_a_restart(call, copied_run, cache):
    metrics = copied_run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    newer = [line.replace(b'"step": 2', b'"step": 3') for line in lines[1:]]
    damaged = [b"\0" * 50 + b"\n", newer[0][:20] + b"\0" * 30 + newer[0][50:], *newer, b"\0" * 9]
    metrics.write_bytes(b"".join([*lines, *damaged]))
    flags = train_flags(cache, copied_run.parent, copied_run.name, "--max-train-steps", 4)
    code, out = call(train, *flags)
    assert code == 0 and "removed 2 lines that a power failure damaged" in out
    assert [row["step"] for row in read_metrics(copied_run)] == [1, 2, 3, 4]
    assert metrics.read_bytes().startswith(b"".join(lines))


@pytest.fixture
def no_locks(monkeypatch):
    """Simulate a file system without locks."""

    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)


@pytest.mark.parametrize("writes_first", [False, True])
def test_one_of_two_trainers_without_locks_stops_before_it_writes(
    call, copied_run, cache, no_locks, monkeypatch, writes_first
):
    """A second trainer starts while the first one runs, and may write first."""
    owners = []
    step = train.Step.__call__

    def start_another_trainer(self, batch):
        if self.state.step == 4:
            owners.append(RunOwner(copied_run))
            if writes_first:
                owners[0].confirm()
        return step(self, batch)

    monkeypatch.setattr(train.Step, "__call__", start_another_trainer)
    flags = train_flags(cache, copied_run.parent, copied_run.name, "--max-train-steps", 6)
    code, out = call(train, *flags)
    steps = [row["step"] for row in read_metrics(copied_run)]
    if writes_first:
        assert code == 2
        assert out.count(f"error: {copied_run} is being trained by another process") == 1
        assert steps == [1, 2, 3, 4] and len(list_checkpoints(copied_run)) == 1
        owners[0].confirm()
    else:
        assert code == 0 and steps == [1, 2, 3, 4, 5, 6]
        with pytest.raises(CheckpointError, match="is being trained by another process"):
            owners[0].confirm()


def test_trainer_that_finds_another_one_leaves_the_metrics_unchanged(
    call, copied_run, cache, no_locks, monkeypatch
):
    """Its start does not remove the lines that the other one has written since its checkpoint."""
    with (copied_run / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 2, "step": 3, "images": 24, "loss": 1.0}\n')
    before = (copied_run / "metrics.jsonl").read_text()
    other = RunOwner(copied_run)
    other.confirm()
    step = train.Step.__call__

    def other_trainer_writes(self, batch):
        other.confirm()
        return step(self, batch)

    monkeypatch.setattr(train.Step, "__call__", other_trainer_writes)
    flags = train_flags(cache, copied_run.parent, copied_run.name, "--max-train-steps", 6)
    code, out = call(train, *flags)
    assert code == 2
    assert out.count(f"error: {copied_run} is being trained by another process") == 1
    assert (copied_run / "metrics.jsonl").read_text() == before
    assert len(list_checkpoints(copied_run)) == 1


def test_another_cache_on_a_started_run_is_refused(call, trained, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"vae_fingerprint": "0" * 64}))
    flags = train_flags(other, trained.parent, trained.name, "--max-train-steps", 4)
    code, out = call(train, *flags)
    assert code == 2 and "not the cache" in out and "vae_fingerprint" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align-depth", 7], "--align-depth 7: SiT-Ti/2 has blocks 1 to 6"),
        (["--align-depth", 0], "--align-depth/--encoder-depth: 0 is not"),
        (["--align-depth", "two"], "--encoder-depth: two is not"),
        (["--align-t-range", 0.5, 0.4], "--align-t-range 0.5 0.4: LO must not exceed HI"),
        (["--cfg-prob", 1], "argument --cfg-prob: 1 is not a number in [0, 1)"),
        (["--gradient-accumulation-steps", 3], "--batch-size 8 (global) is not a multiple of 1"),
        (["--model", "SiT-S/8", "--resolution", 64], "--resolution 64"),
        (["--num-classes", 1000], "--num-classes 1000"),
        (["--data-dir", "/nonexistent"], "--data-dir: /nonexistent does not exist"),
        (["--exp-name", "a/b"], "--exp-name 'a/b'"),
        (["--exp-name", ""], "--exp-name ''"),
        (["--learning-rate", -1], "argument --learning-rate: -1 is not"),
        (["--max-grad-norm", 0], "argument --max-grad-norm: 0 is not"),
        (["--align-weight", "nan"], "argument --align-weight/--proj-coeff: nan is not"),
        (["--adam-beta1", 1], "argument --adam-beta1"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 needs a GPU"),
        (["--align-loss", "huber"], "invalid choice: 'huber'"),
        (["--batch-size", 0], "argument --batch-size: 0 is not"),
        (["--sampling-steps", 2, "--vae", "/nonexistent/vae"], "--vae /nonexistent/vae"),
    ],
)
def test_errors_end_in_one_line_before_any_work(call, cache, tmp_path, flags, message):
    code, out = call(train, *train_flags(cache, tmp_path, "run"), *flags)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_vae_that_did_not_create_the_cache_is_refused(call, cache, tmp_path):
    other = make_vae(tmp_path / "vae", seed=1)
    flags = train_flags(cache, tmp_path, "run", "--sampling-steps", 2, "--vae", other)
    code, out = call(train, *flags)
    assert code == 2 and "is not the VAE that created the cache" in out


def test_patches_must_fit_the_latents(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "ok", "--model", "SiT-S/8", "--max-train-steps", 1)
    assert call(train, *flags)[0] == 0  # 8x8 latents are one patch of 8
    other = shutil.copytree(cache, tmp_path / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = other / "moments" / shard["file"]
        np.save(path, np.load(path)[:, :, :6, :6])
    (other / "manifest.json").write_text(json.dumps(manifest | {"latent_shape": [4, 6, 6]}))
    code, out = call(train, *train_flags(other, tmp_path, "run", "--model", "SiT-S/4"))
    assert code == 2 and "cannot cut the latents" in out


def test_posterior_sample_lies_around_the_mean_of_the_same_image(
    call, cache, tmp_path, drawn_inputs
):
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 3)
    assert call(train, *flags)[0] == 0
    latents = torch.cat([inputs.latents for inputs in drawn_inputs])  # one epoch: each image once
    means = torch.cat([inputs.posterior_mean for inputs in drawn_inputs])
    data = LatentCache(cache)
    moments = data.gather(np.arange(24))[0]
    scale = LatentScale(data.manifest.scale, data.manifest.shift)
    all_means, all_stds = scale.mean(moments), moments.float().chunk(2, 1)[1] * scale.scale
    for latent, mean in zip(latents, means):
        matches = [i for i in range(24) if torch.equal(all_means[i], mean)]
        assert len(matches) == 1
        assert ((latent - mean).abs() < 6 * all_stds[matches[0]]).all()
    assert latent_tokens(latents, 2).shape == (24, 16, 16)


def test_label_dropout_is_cfg_prob(call, cache, tmp_path, drawn_inputs):
    for probability, low, high in ((0.0, 0, 0), (0.9, 0.7, 1), (0.3, 0.1, 0.55)):
        drawn_inputs.clear()
        options = ("--max-train-steps", 6, "--cfg-prob", probability)
        assert call(train, *train_flags(cache, tmp_path, f"p{probability}", *options))[0] == 0
        labels = torch.cat([inputs.labels for inputs in drawn_inputs])
        is_dropped = labels == 3  # the null class of three classes
        assert low <= is_dropped.float().mean().item() <= high
        classes = torch.cat([inputs.classes for inputs in drawn_inputs])
        assert torch.equal(classes[~is_dropped], labels[~is_dropped]) and classes.max() < 3
