"""Guidance requires a null class that was trained."""

import pytest

import sample_ddp
import train
from checkpointing import export
from tests.helpers import train_flags
from training.preview import Preview

MESSAGE = "requires the null class, on which the network was not trained"


@pytest.fixture
def run(call, cache, tmp_path, monkeypatch):
    """A run that was trained without label dropout, and whose previews show no guidance."""
    titles = []
    monkeypatch.setattr(Preview, "num_steps", 2)
    monkeypatch.setattr(
        "training.preview.draw_labelled_grid", lambda rows, title: titles.append(title)
    )
    monkeypatch.setattr("training.monitors.save_png", lambda grid, path: None)
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 1, "--cfg-prob", 0)
    code, out = call(train, *flags, "--sampling-steps", 1)
    assert code == 0, out
    assert "previews are drawn without guidance (--preview-cfg-scale 1.5 is ignored)" in out
    assert titles.pop(1).startswith("training images")
    assert len(titles) == 2 and all(title.endswith("guidance 1") for title in titles)
    return tmp_path / "run"


def test_networks_without_a_null_class_are_sampled_only_without_guidance(call, run, tmp_path):
    flags = ["--ckpt", run, "--num-fid-samples", 2, "--num-steps", 2, "--sample-dir", tmp_path]
    code, out = call(sample_ddp, *flags, "--cfg-scale", 2)
    assert code == 2 and f"--cfg-scale 2 {MESSAGE}" in out and len(out.splitlines()) == 1
    code, out = call(sample_ddp, *flags)
    assert code == 0, out
    code, out = call(export, run, "--to", tmp_path / "export")
    assert code == 0, out
    assert (
        "guidance, steps = torch.tensor([0, 1, 2]), 1, 50"
        in (tmp_path / "export/README.md").read_text()
    )


def test_guided_evaluations_without_a_null_class_are_rejected(call, cache, tree, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--eval-every", 2, "--eval-reference", tree)
    flags += ["--eval-features", "fashion", "--eval-cfg-scale", "1.5", "--eval-samples", "4"]
    code, out = call(train, *flags, "--cfg-prob", 0)
    assert code == 2 and f"--eval-cfg-scale 1.5 {MESSAGE}" in out and len(out.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_label_dropout_allows_guidance_without_a_message(call, cache, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(Preview, "draw", lambda self, *args: recipes.append(self.recipe))
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 1, "--cfg-prob", 0.01)
    code, out = call(train, *flags, "--sampling-steps", 1)
    assert code == 0 and "without guidance" not in out
    assert [recipe.cfg_scale for recipe in recipes] == [1.5]
