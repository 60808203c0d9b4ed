"""Previews and evaluations: run once per step; their failures do not end a run that progresses."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from checkpointing import pretrained
from checkpointing.storage import read_progress
from common.metrics_log import read_rows
from latents.cache import LatentCache
from models.autoencoder import Autoencoder
from sampling.recipe import Recipe
from tests.helpers import run_ranks, train_flags
from training.evaluation import Evaluator
from training.monitors import FailureCount, Monitors, restore_failures
from training.preview import Preview
from training.resume import find_position

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 16 GiB.")


def count_calls(results):
    """Return a function that returns or raises the results in turn, and the list of its calls."""
    calls = []

    def call(*args):
        calls.append(args)
        result = results[min(len(calls), len(results)) - 1]
        if isinstance(result, Exception):
            raise result
        return result

    return call, calls


@pytest.fixture
def evaluation_flags(cache, tree, tmp_path):
    """Return a function that gives the flags of a run that is evaluated after every step."""

    def make(*extra_flags) -> list[str]:
        flags = ["--eval-every", 1, "--eval-reference", tree, "--eval-samples", 9]
        flags += ["--eval-features", "fashion", "--eval-num-steps", 3, "--eval-batch-size", 4]
        flags += ["--eval-latents", cache]
        return train_flags(cache, tmp_path, "run", *flags, *extra_flags)

    return make


@pytest.fixture
def make_monitors(tmp_path):
    """Return a function of the preview's `draw` that builds Monitors of two EMAs.

    Its attributes `images` and `messages` list what is sent to the log.
    """

    def make(draw) -> Monitors:
        log = SimpleNamespace(
            folder=tmp_path,
            throughput=SimpleNamespace(pause=lambda kind: nullcontext()),
            record_image=lambda name, path, step: make.images.append((name, path.name, step)),
            info=make.messages.append,
        )
        preview = SimpleNamespace(draw=draw)
        return Monitors(log, (0.9, 0.5), 10, preview, None, preview_every=4, eval_every=0)

    make.images = []
    make.messages = []
    return make


def run(monitors, step) -> None:
    state = SimpleNamespace(step=step, emas=["first", "second"], sharding=None)
    assert monitors.run_due(state, gather=lambda tensor: tensor, is_stopped=lambda: False)


def test_previews_are_drawn_once_per_due_step(make_monitors):
    drawn = []

    def draw(ema, gather, title):
        drawn.append(ema)
        return Image.new("RGB", (1, 1))

    monitors = make_monitors(draw)
    for step in (3, 4, 4, 10):  # step 4 is repeated, as when a run is resumed there
        run(monitors, step)
    assert drawn == ["first", "second"] * 2
    assert make_monitors.images == [
        ("samples", "0000004.png", 4),
        ("samples-ema0.5", "0000004-ema0.5.png", 4),
        ("samples", "0000010.png", 10),
        ("samples-ema0.5", "0000010-ema0.5.png", 10),
    ]


def test_preview_that_cannot_be_saved_is_reported(make_monitors, monkeypatch):
    def save(image, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("training.monitors.save_png", save)
    monitors = make_monitors(lambda *args: Image.new("RGB", (1, 1)))
    run(monitors, 4)
    assert monitors.failures["preview"].consecutive == 0
    assert not make_monitors.images and len(make_monitors.messages) == 2
    assert "0000004.png: No space left on device" in make_monitors.messages[0]
    assert make_monitors.messages[0].endswith("; training continues")


def test_os_error_while_sampling_is_a_failure(make_monitors):
    """It must reach the other processes, which wait for the images of this one."""

    def draw(*args):
        raise OSError("no file descriptor is left")

    monitors = make_monitors(draw)
    run(monitors, 4)
    assert monitors.failures["preview"].consecutive == 2


@pytest.mark.parametrize("failing", ["preview", pytest.param("evaluation", marks=pytest.mark.long)])
def test_failing_work_is_skipped_and_switched_off_after_three_failures(
    call, evaluation_flags, tmp_path, monkeypatch, failing
):
    """A success resets the count, and a restart, which repeats the last attempt, continues it."""
    results = [OUT_OF_MEMORY, OUT_OF_MEMORY, None, OUT_OF_MEMORY]
    method = (Preview, "draw") if failing == "preview" else (Evaluator, "measure")
    other = (Evaluator, "measure") if failing == "preview" else (Preview, "draw")
    work, calls = count_calls(results)
    monkeypatch.setattr(*method, work)
    monkeypatch.setattr(*other, lambda *args: None)
    monkeypatch.setattr(Evaluator, "try_out", lambda *args: None)
    flags = evaluation_flags("--sampling-steps", 1)
    code, out = call(train, *flags, "--max-train-steps", 5)
    assert code == 0 and len(calls) == 5
    message = f"the {failing} at step 1 failed (OutOfMemoryError: CUDA out of memory.)"
    assert f"{message}; training continues" in out and "switched off" not in out
    code, out = call(train, *flags, "--max-train-steps", 8)
    assert code == 0 and len(calls) == 7
    assert f"the {failing} at step 5 failed" in out and f"the {failing} at step 6 failed" in out
    assert f"{failing}s are switched off after 3 failures in a row" in out
    # The work remains switched off after a restart, unless its flags change.
    assert call(train, *flags, "--max-train-steps", 9)[0] == 0
    assert len(calls) == 7
    changed = "--preview-cfg-scale" if failing == "preview" else "--eval-cfg-scale"
    assert call(train, *flags, "--max-train-steps", 10, changed, 2)[0] == 0
    assert len(calls) == 9  # at the steps 9 and 10


def test_failures_are_restored_from_a_checkpoint():
    flags = {"preview": {"sampling_steps": 2}, "evaluation": {}}
    progress = {"monitor_failures": {"preview": {"flags": {"sampling_steps": 2}, "consecutive": 2}}}
    failures = restore_failures(progress, flags)
    assert failures == {
        "preview": FailureCount({"sampling_steps": 2}, 2),
        "evaluation": FailureCount(),
    }
    assert restore_failures({}, flags)["preview"].consecutive == 0  # a checkpoint of older code
    flags["preview"] = {"sampling_steps": 3}
    assert restore_failures(progress, flags)["preview"] == FailureCount({"sampling_steps": 3}, 0)


@pytest.mark.parametrize("failing", ["preview", pytest.param("evaluation", marks=pytest.mark.long)])
def test_trial_ends_the_run_in_one_line_before_the_first_step(
    call, evaluation_flags, tmp_path, monkeypatch, failing
):
    trial, calls = count_calls([OUT_OF_MEMORY])
    monitor = Preview if failing == "preview" else Evaluator
    try_out = monitor.try_out
    monkeypatch.setattr(Preview, "num_steps", 2)
    monkeypatch.setattr(monitor, "try_out", trial)
    flags = evaluation_flags("--sampling-steps", 2, "--max-train-steps", 1)
    code, out = call(train, *flags)
    disabled = {"preview": "--sampling-steps 0", "evaluation": "--eval-every 0"}[failing]
    assert code == 2 and out.endswith(
        f"error: the trial {failing} before the first step failed (OutOfMemoryError: CUDA out of "
        f"memory.): fix the problem, or pass {disabled}\n"
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()
    monkeypatch.setattr(monitor, "try_out", try_out)
    assert call(train, *flags)[0] == 0
    monkeypatch.setattr(monitor, "try_out", trial)
    assert call(train, *flags, "--max-train-steps", 2)[0] == 0  # the run has made progress
    assert len(calls) == 1


def test_trials_run_the_code_of_previews_and_evaluations(
    call, evaluation_flags, tmp_path, monkeypatch
):
    """An error of sampling that occurs in every step ends the run before the first one."""
    monkeypatch.setattr(Recipe, "compute_labels", count_calls([ValueError("no labels")])[0])
    for flags, kind in ((("--sampling-steps", 2), "preview"), ((), "evaluation")):
        code, out = call(train, *evaluation_flags(*flags))
        assert code == 2 and f"the trial {kind} before the first step failed" in out
        assert "(ValueError: no labels)" in out and "Traceback" not in out


def test_samples_that_are_not_finite_are_not_evaluated(
    call, evaluation_flags, tmp_path, monkeypatch
):
    def measure_nan(self, model, *args, measure=Evaluator.measure):
        with torch.no_grad():
            model.final_layer.linear.bias.fill_(float("nan"))
        return measure(self, model, *args)

    monkeypatch.setattr(Evaluator, "measure", measure_nan)
    monkeypatch.setattr(Evaluator, "try_out", lambda *args: None)
    code, out = call(train, *evaluation_flags("--max-train-steps", 1))
    assert code == 0 and "FloatingPointError: the sampled latents are not finite" in out
    assert not any("evaluation" in row for row in read_rows(tmp_path / "run"))


@pytest.mark.parametrize("failing_rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_failure_on_one_process_is_agreed_on(evaluation_flags, tmp_path, failing_rank):
    """The other process neither waits for the features nor counts a success."""
    flags = evaluation_flags("--max-train-steps", 4)
    out = run_ranks(2, "tests.training.failing_evaluation", failing_rank, "error", *flags)
    log = (tmp_path / "run/log.txt").read_text()
    for step in (1, 2, 3):
        reason = f"process {failing_rank}: OutOfMemoryError: in batch 1"
        assert f"the evaluation at step {step} failed ({reason})" in log, out
    assert "evaluations are switched off" in log and "step 4 failed" not in log
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    failures = read_progress(checkpoint)["monitor_failures"]
    assert failures["evaluation"]["consecutive"] == 3


@pytest.mark.long
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_failed_preview_on_one_process_is_agreed_on(cache, tmp_path, failing_rank):
    """The other process does not wait for the images."""
    flags = train_flags(cache, tmp_path, "run", "--sampling-steps", 1, "--max-train-steps", 2)
    out = run_ranks(2, "tests.training.failing_preview", failing_rank, *flags)
    log = (tmp_path / "run/log.txt").read_text()
    for step in (1, 2):
        reason = f"process {failing_rank}: OSError: too many open files"
        assert f"the preview at step {step} failed ({reason}); training continues" in log, out


def test_processes_share_the_images_of_a_preview(make_preview, trained):
    """Each of three processes samples a third, and the grid is the same as that of one process."""
    model = pretrained.load(trained).model
    parts = []
    for rank, num_processes in ((0, 1), (0, 3), (1, 3), (2, 3)):
        preview = make_preview(rank, num_processes)
        recipe = replace(preview.recipe, num_steps=2)
        parts.append(preview._sample(model, lambda images: images, recipe))
    expected, *shares = parts
    assert [len(share) for share in shares] == [8, 8, 8]
    assert (torch.cat(shares).int() - expected.int()).abs().max() <= 1


@pytest.fixture
def make_preview(trained, vae_folder):
    """Return a function that builds the preview of a process for the classes of `trained`."""
    source = pretrained.load(trained)
    autoencoder = Autoencoder(str(vae_folder), torch.device("cpu"))

    def make(rank: int = 0, num_processes: int = 1) -> Preview:
        return Preview(
            autoencoder,
            source.class_names,
            source.trained_labels,
            cfg_scale=1.5,
            objective=SimpleNamespace(path_type="linear", prediction="v"),
            seed=0,
            rank=rank,
            num_processes=num_processes,
        )

    return make


def test_real_images_are_the_first_ones_of_the_classes_of_a_preview(make_preview, cache):
    """Each of three processes decodes a third; rows may have different numbers of images.

    The last batch is padded. The rows of this preview are in another order than the classes.
    """
    latents = LatentCache(cache)
    latents.labels[latents.labels == 1] = 2  # class 1 has no images, class 2 has sixteen
    latents.labels[:2] = 2  # class 0 has six
    shares, arranged = [], []
    for rank, num_processes in ((0, 1), (0, 3), (1, 3), (2, 3)):
        preview = make_preview(rank, num_processes)
        preview.classes = torch.tensor([2, 1, 0])
        preview._arrange = lambda images, row_sizes, title: arranged.append(row_sizes)
        gathered = []

        def gather(images, gathered=gathered):
            gathered.append(images)
            return images

        preview.draw_real(latents, gather)
        shares.append(torch.cat(gathered))
    assert arranged == [[8, 0, 6]] * 2  # on the first process
    preview = make_preview()
    indices = [np.flatnonzero(latents.labels == k)[:8] for k in (2, 1, 0)]
    moments, _ = latents.gather(np.concatenate(indices))
    expected = preview.vae.decode(preview.vae.scale.mean(moments)).int()
    for images in (shares[0], torch.cat(shares[1:])):
        assert (images[:14].int() - expected).abs().max() <= 1
    assert isinstance(make_preview().draw_real(latents, lambda images: images), Image.Image)


def test_real_images_are_drawn_once_and_again_after_a_failure(make_monitors):
    monitors = make_monitors(lambda *args: Image.new("RGB", (1, 1)))
    monitors.real_cache = cache = object()
    results = [OUT_OF_MEMORY, Image.new("RGB", (1, 1))]
    monitors.preview.draw_real, calls = count_calls(results)
    for step in (3, 4, 8, 10):
        run(monitors, step)
    assert [call[0] for call in calls] == [cache, cache]
    (message,) = make_monitors.messages
    assert "the preview at step 4 failed" in message
    real_images = [image for image in make_monitors.images if image[0] == "samples-real"]
    assert real_images == [("samples-real", "real.png", 8)]


def test_trial_preview_arranges_images_only_on_the_first_process(
    make_preview, trained, monkeypatch
):
    """The other processes receive no images, so arranging them would fail."""
    arrange, calls = count_calls([None])
    monkeypatch.setattr(Preview, "_arrange", arrange)
    model = pretrained.load(trained).model
    for rank, num_calls in ((1, 0), (0, 1)):
        make_preview(rank, num_processes=2).try_out(model, lambda images: images)
        assert len(calls) == num_calls


def test_new_run_replaces_the_real_images_of_an_earlier_one(tmp_path):
    """The images of a run that was stopped before its first checkpoint may be of other data."""
    for folder in ("samples", "checkpoints"):
        (tmp_path / folder).mkdir()
    (tmp_path / "samples/real.png").touch()
    assert not find_position(tmp_path, 4, (0.9,), 2, 0).has_real_images


@pytest.mark.parametrize("killed_rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_process_ends_in_one_line_if_the_other_is_killed_in_an_evaluation(
    evaluation_flags, killed_rank
):
    with pytest.raises(AssertionError) as ended:
        run_ranks(
            2, "tests.training.failing_evaluation", killed_rank, "killed", *evaluation_flags()
        )
    printed = str(ended.value)
    prefix = f"[rank {1 - killed_rank}] "
    lines = [line for line in printed.splitlines() if prefix in line and "Warning" not in line]
    assert f" rank {killed_rank} on " in lines[0], printed
    assert "ended before the work was done" in lines[0], printed
    assert "Traceback" not in printed
