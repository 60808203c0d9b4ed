"""Classes without images, from the training log to sampling."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample_ddp
import train
from checkpointing import pretrained
from checkpointing.storage import progress_digest
from common.files import sha256
from common.metrics_log import read_rows
from models.labels import TrainedLabels, describe_empty_classes
from sampling.recipe import Recipe, format_ranges
from tests.helpers import train_flags
from training.preview import Preview

NOTE = "no images of 1 of 3 classes: 0 (class0)"


@pytest.fixture(scope="module")
def gap_cache(tmp_path_factory, cache):
    """A cache without images of class 0."""
    folder = shutil.copytree(cache, tmp_path_factory.mktemp("gap") / "data")
    for path in (folder / "labels").iterdir():
        labels = np.load(path)
        np.save(path, np.where(labels == 0, 2, labels))
    return folder


@pytest.fixture
def flags(gap_cache, tree, tmp_path):
    """Flags of a run of two steps without images of class 0, with an evaluation."""
    flags = train_flags(gap_cache, tmp_path, "run", "--max-train-steps", 2, "--eval-every", 2)
    flags += ["--eval-reference", str(tree), "--eval-features", "fashion"]
    return [*flags, "--eval-num-steps", "2", "--eval-samples", "4"]


@pytest.fixture
def gap_run(call, flags, tmp_path):
    """The run of these flags."""
    code, out = call(train, *flags)
    assert code == 0 and NOTE in out
    return tmp_path / "run"


def read_config(run, step=2):
    path = run / f"checkpoints/{step:07d}/config.json"
    return path, json.loads(path.read_text())


def test_evaluations_and_samples_leave_classes_without_images_out(call, gap_run, tmp_path):
    path, config = read_config(gap_run)
    assert config["data"]["images_per_class"] == [0, 8, 16]
    (row,) = (row for row in read_rows(gap_run) if "evaluation" in row)
    assert row["evaluation"]["label_classes"] == "1-2"

    def sample(name, *flags):
        size = ["--num-fid-samples", 6, "--num-steps", 2, "--per-proc-batch-size", 6]
        options = ["--ckpt", gap_run, "--sample-dir", tmp_path, "--name", name, *size, *flags]
        code, out = call(sample_ddp, *options)
        assert code == 0, out
        record = json.loads((tmp_path / f"{name}.json").read_text())
        with np.load(tmp_path / f"{name}.npz") as content:
            return out, content["arr_1"].tolist(), record

    out, labels, record = sample("balanced", "--labels", "balanced")
    assert labels == [1, 2, 1, 2, 1, 2] and NOTE in out
    assert record["label_classes"] == "1-2"
    _, labels, _ = sample("random")
    assert set(labels) == {1, 2}

    # On request, all classes are sampled.
    out, labels, record = sample("all", "--labels", "balanced", "--all-classes")
    assert labels == [0, 1, 2, 0, 1, 2] and "label_classes" not in record
    assert "warning: the labels contain classes without training images: 0" in out
    out, labels, _ = sample("one", "--labels", 0)
    assert labels == [0] * 6 and "without training images: 0" in out
    out, _, _ = sample("trained", "--labels", 1)
    assert "without training images" not in out

    # A checkpoint of an older version does not record the counts.
    del config["data"]["images_per_class"]
    path.write_text(json.dumps(config))
    out, labels, record = sample("old", "--labels", "balanced")
    assert labels == [0, 1, 2, 0, 1, 2] and "label_classes" not in record
    assert "does not record the number of training images per class" in out
    assert "all 3 classes" in out


def test_default_names_distinguish_all_classes_from_trained_classes():
    source = SimpleNamespace(name="run")
    names = {
        sample_ddp.make_default_name(source, Recipe(labels=labels, all_classes=all_classes))
        for labels in ("random", "balanced")
        for all_classes in (True, False)
    }
    assert len(names) == 4


def test_previews_show_trained_classes(trained):
    source = pretrained.load(trained)
    vae = SimpleNamespace()
    objective = SimpleNamespace(path_type="linear", prediction="v")
    names = [f"class {k}" for k in range(40)]
    counts = [k % 3 for k in range(40)]
    preview = Preview(vae, names, TrainedLabels(counts), 1.5, objective, seed=0)
    shown = preview.recipe.explicit_labels.unique().tolist()
    assert len(shown) == 10 and all(counts[k] for k in shown)
    assert preview.row_names == [f"class {k}" for k in shown]
    assert source.trained_labels.list_classes(3) == [0, 1, 2]


def test_runs_of_older_versions_continue_to_draw_all_classes(call, flags, gap_run):
    # Older versions did not record the counts.
    path, config = read_config(gap_run)
    del config["data"]["images_per_class"]
    path.write_text(json.dumps(config))
    progress = json.loads(path.with_name("progress.json").read_text())
    progress["sha256"]["config.json"] = sha256(path)
    del progress["digest"]
    progress["digest"] = progress_digest(progress)
    path.with_name("progress.json").write_text(json.dumps(progress))

    code, out = call(train, *flags, "--max-train-steps", 4)
    assert code == 0 and "except in this run, which an older version started" in out
    assert read_config(gap_run, step=4)[1] == {**config, "step": 4}
    rows = [row for row in read_rows(gap_run) if "evaluation" in row]
    assert [row["evaluation"].get("label_classes") for row in rows] == ["1-2", None]


def test_resumed_runs_require_the_same_labels(call, flags, gap_run, cache):
    code, out = call(train, *flags, "--max-train-steps", 4)
    assert code == 0, out
    assert read_config(gap_run, step=4)[1]["data"] == read_config(gap_run)[1]["data"]
    flags[flags.index("--data-dir") + 1] = str(cache)  # the same images with other labels
    code, out = call(train, *flags, "--max-train-steps", 6)
    assert code == 2 and "images_per_class differ" in out


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1, 2, 3], [0, 1, 2]), ([0, 5, 5, 0], [1, 2]), ([0, 0, 1], [2])],
)
def test_labels_are_drawn_only_from_trained_classes(counts, expected):
    indices = torch.arange(200)
    num_classes = len(counts)
    for labels in ("random", "balanced"):
        recipe = Recipe(labels=labels)
        trained = recipe.for_trained_labels(TrainedLabels(counts))
        drawn = trained.compute_labels(indices, num_classes)
        assert drawn.unique().tolist() == expected
        assert (trained is recipe) == all(counts)
        everything = Recipe(labels=labels, all_classes=True).for_trained_labels(
            TrainedLabels(counts)
        )
        drawn = everything.compute_labels(indices, num_classes)
        assert torch.equal(drawn, recipe.compute_labels(indices, num_classes))


def test_empty_classes_are_summarized():
    assert describe_empty_classes([1, 1], ["a", "b"]) is None
    note = describe_empty_classes([0] * 8 + [1], [str(k) for k in range(9)])
    assert note.startswith("no images of 8 of 9 classes: 0, 1, 2, 3, 4, 3 more;")
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
