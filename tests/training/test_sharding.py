"""Sharded training equals DDP, and its checkpoints load with any number of processes."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from checkpointing.storage import list_checkpoints
from checkpointing.tensor_file import StoredTensors, find_parts
from common.cli import UserError
from common.metrics_log import read_rows
from dataset import TrainingStream
from latents.cache import LatentCache
from models.sit import PRESETS, SiTBlock
from tests.helpers import (
    ONE_THREAD,
    ROOT,
    list_children,
    make_ranks_command,
    read_metrics,
    run_ranks,
    train_flags,
)
from tests.training.sharded_steps import (
    assert_close,
    check_collectives,
    get_tolerance,
    train_in_processes,
)
from tests.training.steps import make_settings, make_step
from training import checkpoints, sharding
from training.checkpoints import SaveError, Snapshot, WrittenFile, write_checkpoint
from training.preview import Preview
from training.sharding import count_nodes, gather_tensor
from training.shared_files import wait_for_files

FILES = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a checkpoint."""
    tensors = {}
    for name in FILES:
        stored = StoredTensors(find_parts(folder, name))
        for key in stored.parts:
            tensors[f"{name}/{key}"] = torch.empty(stored.shape(key))
            stored.copy_rows(key, 0, tensors[f"{name}/{key}"])
    return tensors


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_processes", "optimizer", "modes"),
    [
        (2, "adamw", ["full", "full+2", "optimizer"]),
        (4, "adamw", ["full", "hybrid", "hybrid+2"]),
        (4, "muon", ["full", "hybrid"]),
    ],
)
def test_sharded_training_equals_ddp(cache, tmp_path, monkeypatch, num_processes, optimizer, modes):
    """Compare losses, gradient norms, weights, moments and EMAs; the gradients are clipped.

    test_all_methods.py has a short variant.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # with four processes, there are two nodes
    flags = ["--align", "sra2", "sra", "--max-grad-norm", "0.5", "--learning-rate", "1e-3"]
    flags += ["--optimizer", optimizer]
    run = {"flags": flags, "modes": modes, "num_steps": 20 if optimizer == "adamw" else 6}
    results = train_in_processes(num_processes, tmp_path, cache, {"both": run})["both"]
    expected = results.pop("none")["scalars"]
    assert max(row["grad_norm"] for row in expected) > 0.5, "the gradients are never clipped"
    num_exchanges = 8 if optimizer == "muon" else 0
    for mode, result in results.items():
        for row, expected_row in zip(result["scalars"], expected, strict=True):
            assert row == pytest.approx(expected_row, rel=get_tolerance(run)), mode
        check_collectives(mode, result["collectives"], 6, 4, num_exchanges)


def test_one_sharded_process_equals_an_unsharded_one(
    call, cache, tree, tmp_path, process_group, monkeypatch
):
    """The weights, the images of previews and the metrics of evaluations are the same."""
    monkeypatch.setattr(Preview, "num_steps", 2)
    runs = []
    for name, shard in {"plain": [], "sharded": ["--shard", "full"]}.items():
        flags = train_flags(cache, tmp_path, name, "--align", "sra2", "sra", *shard)
        flags += ["--gradient-accumulation-steps", 2, "--activation-checkpointing"]
        flags += ["--sampling-steps", 3, "--eval-every", 3, "--eval-reference", tree]
        flags += ["--eval-samples", 4, "--eval-features", "fashion", "--eval-num-steps", 2]
        flags += ["--eval-latents", cache]
        code, printed = call(train, *flags)
        assert code == 0, printed
        runs.append(tmp_path / name)
    expected, actual = (read_checkpoint(run / "checkpoints" / "0000003") for run in runs)
    assert_close(actual, expected)
    images, sharded_images = (
        np.asarray(Image.open(run / "samples" / "0000003.png")).astype(int) for run in runs
    )
    assert np.abs(sharded_images - images).max() <= 1  # grey levels
    metrics, sharded_metrics = (
        {name: value for name, value in read_rows(run)[-1].items() if isinstance(value, float)}
        for run in runs
    )
    assert "held_out" in metrics
    assert sharded_metrics == pytest.approx(metrics, rel=1e-4)


def test_normalization_of_queries_and_keys_is_sharded(cache, process_group):
    results = []
    for mode in ("none", "full"):
        settings = make_settings(cache, "--qk-norm", "--shard", mode, "--learning-rate", "1e-2")
        step = make_step(settings, torch.device("cpu"))
        stream = TrainingStream(LatentCache(cache), 0, 8, 0, 1, [])
        losses = [step(stream[index])[0]["loss"] for index in range(3)]
        weights = {
            name: gather_tensor(tensor)
            for name, tensor in step.state.model.state_dict().items()
            if not name.endswith("k_norm.bias")  # attention does not depend on it
        }
        results.append((torch.stack(losses), weights))
    (expected_losses, expected), (losses, weights) = results
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    assert_close(weights, expected)
    assert any("q_norm" in name and (weights[name] - 1).abs().max() > 1e-3 for name in weights)


@pytest.mark.parametrize(
    ("optimizer", "starts"),
    [
        ("muon", [(1, [], 1), (2, ["--shard", "full"], 2), (1, [], 3)]),
        pytest.param(
            "adamw",
            [
                (2, ["--shard", "full"], 1),
                (1, [], 2),
                (4, ["--shard", "full"], 3),
                (4, ["--shard", "hybrid"], 4),
                (2, ["--shard", "optimizer"], 5),
            ],
            marks=pytest.mark.long,
        ),
    ],
)
def test_sharded_checkpoint_is_resumed_with_any_number_of_processes(
    call, cache, tmp_path, monkeypatch, optimizer, starts
):
    """The state contains moments of AdamW and, with Muon, also those of Muon."""
    shared = ["--optimizer", optimizer]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # with four processes, there are two nodes
    for num_processes, shard, num_steps in starts:
        flags = train_flags(cache, tmp_path, "elastic", *shared, *shard)
        flags += ["--max-train-steps", num_steps]
        if num_processes > 1:
            run_ranks(num_processes, "train", *flags)
        else:
            code, printed = call(train, *flags)
            assert code == 0, printed
    flags = train_flags(cache, tmp_path, "plain", *shared, "--max-train-steps", starts[-1][2])
    code, printed = call(train, *flags)
    assert code == 0, printed
    last = f"checkpoints/{starts[-1][2]:07d}"
    expected, actual = (read_checkpoint(tmp_path / name / last) for name in ("plain", "elastic"))
    assert_close(actual, expected, tolerance=1e-4 if optimizer == "muon" else 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_is_identical_to_an_uninterrupted_one(cache, tmp_path, optimizer, shard):
    for name, ends in {"whole": [4], "resumed": [2, 4]}.items():
        for num_steps in ends:
            flags = train_flags(cache, tmp_path, name, "--shard", shard, "--optimizer", optimizer)
            flags += ["--lr-warmup-steps", "3"]
            run_ranks(2, "train", *flags, "--max-train-steps", num_steps)
    last = "checkpoints/0000004"
    expected, actual = (read_checkpoint(tmp_path / name / last) for name in ("whole", "resumed"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.long
def test_killed_sharded_run_resumes_without_loss(cache, tmp_path):
    """20 kills of all processes or of one, at random moments, do not change the result."""
    flags = ["--shard", "full", "--max-train-steps", 60, "--checkpointing-steps", 2]
    run_ranks(2, "train", *train_flags(cache, tmp_path, "whole", *flags))
    rng = random.Random(0)
    run = tmp_path / "killed"
    command = make_ranks_command(2, "train", *train_flags(cache, tmp_path, "killed", *flags))
    for _ in range(20):
        checkpoints = list_checkpoints(run)
        with start_session(command) as job:
            while list_checkpoints(run) == checkpoints and job.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            children = list_children(job.pid)
            if job.poll() is None and len(children) == 2 and rng.random() < 0.5:
                os.kill(rng.choice(children), signal.SIGKILL)
                job.wait(timeout=120)  # the other process notices that it is alone
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    run_ranks(2, "train", *train_flags(cache, tmp_path, "killed", *flags))
    expected, actual = (
        read_checkpoint(tmp_path / name / "checkpoints" / "0000060") for name in ("whole", "killed")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert read_metrics(run) == read_metrics(tmp_path / "whole")


def start_session(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_compiled_blocks_are_sharded(call, cache, tmp_path, process_group, monkeypatch):
    """A compiled, sharded run with a teacher has the losses of a plain run."""
    compile_function = torch.compile
    compiled_modules = []

    def compile_eagerly(function, **options):
        compiled_modules.append(getattr(function, "__self__", None))
        return compile_function(function, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    losses = []
    for name, extra in {"plain": [], "compiled": ["--shard", "full", "--compile"]}.items():
        flags = train_flags(cache, tmp_path, name, "--align", "sra2", "sra", *extra)
        code, printed = call(train, *flags)
        assert code == 0, printed
        losses.append([row["loss"] for row in read_rows(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    num_compiled_blocks = sum(isinstance(module, SiTBlock) for module in compiled_modules)
    assert num_compiled_blocks == 2 * PRESETS["SiT-Ti/2"]["depth"]  # of the network and its EMA


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_overflow_skips_the_update_of_a_sharded_network(cache, process_group, optimizer):
    """GradScaler finds infinite gradients in the rows of any process and lowers the scale."""
    settings = make_settings(cache, "--shard", "full", "--optimizer", optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    step = make_step(settings, torch.device("cpu"))
    batch = TrainingStream(LatentCache(cache), 0, 8, 0, 1, [])[0]
    before = [parameter.full_tensor().clone() for parameter in step.state.model.parameters()]
    total, _ = step.compute_losses(step.sample_inputs(batch))
    scaler.scale(total.mean() * 1e30).backward()
    scaler.unscale_(step.state.optimizer)
    scaler.step(step.state.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**125
    after = [parameter.full_tensor() for parameter in step.state.model.parameters()]
    assert all(map(torch.equal, before, after))


def test_failed_save_of_one_process_is_reported_by_all(tmp_path):
    """The checkpoint does not appear, and the partial one is removed."""
    answers = [["", ""], ["", "No space left on device"]]
    snapshot = Snapshot(3, {"ema_decay": []}, {}, {})
    with pytest.raises(SaveError, match="process 1: No space left on device"):
        write_checkpoint(snapshot, tmp_path, 0, lambda value: answers.pop(0))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_checkpoint_is_incomplete_if_the_first_process_does_not_see_all_files(
    tmp_path, monkeypatch
):
    """Otherwise, runs on nodes with separate disks would write checkpoints that cannot be read."""
    monkeypatch.setattr(checkpoints, "wait_for_files", partial(wait_for_files, seconds=0))
    other = {"model-00001-of-00002.safetensors": WrittenFile(8, "0" * 64)}

    def exchange(value):
        return [value, other if isinstance(value, dict) else ""]

    snapshot = Snapshot(3, {"ema_decay": []}, {}, {})
    with pytest.raises(UserError, match="must be on a file system that all nodes share"):
        write_checkpoint(snapshot, tmp_path, 0, exchange)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["2"] * 6, 3),
        (["4"] * 6, "6 processes are on nodes of 4; use --shard full"),
        (["4"] * 4 + ["2"] * 4, "8 processes are on nodes of 2 and 4; use --shard full"),
        (["2"] * 5 + [None], "needs LOCAL_WORLD_SIZE"),
    ],
)
def test_hybrid_sharding_needs_nodes_of_equal_size(monkeypatch, sizes, expected):
    monkeypatch.setattr(sharding, "gather_objects", lambda value: sizes)
    if isinstance(expected, int):
        assert count_nodes() == expected
        return
    with pytest.raises(UserError, match=expected):
        count_nodes()
