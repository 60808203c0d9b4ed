"""Test exports: samples, model card, diffusers version and errors."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file

import sample_ddp
import train
from checkpointing import diffusers_dit, export
from checkpointing.pretrained import load
from checkpointing.storage import CheckpointError
from evaluations import evaluate
from models.sit import SiT, SiTConfig, TimestepEmbedder
from samplers import GuidedVelocity, euler, ode_times
from tests.helpers import ROOT, train_flags


@pytest.fixture(scope="module")
def run(tmp_path_factory, trained):
    """Return a run with two EMAs of random weights.

    After two training steps, the output of the network would still be almost zero.
    """
    run = shutil.copytree(trained, tmp_path_factory.mktemp("random") / "random")
    folder = run / "checkpoints/0000002"
    generator = torch.Generator().manual_seed(0)
    state = load_file(folder / "ema.safetensors")
    for name in ("ema", "ema-0.5"):
        perturbed = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator)
            for key, value in state.items()
            if "pos" not in key
        }
        save_file({**state, **perturbed}, folder / f"{name}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ema_decay": [0.9, 0.5]}))
    (folder / "progress.json").unlink()  # it contains the hash of the original weights
    return run


def test_export_reproduces_the_samples_and_documents_the_run(call, run, tree, tmp_path):
    """Check the samples, the metrics in the card, and the latents from its diffusers code."""

    def sample(ckpt, name):
        flags = [
            "--num-fid-samples",
            "6",
            "--per-proc-batch-size",
            "6",
            "--num-steps",
            "2",
            "--mode",
            "ode",
        ]
        code, out = call(sample_ddp, "--ckpt", ckpt, "--sample-dir", run, "--name", name, *flags)
        assert code == 0, out
        with np.load(run / f"{name}.npz") as content:
            return content["arr_0"]

    images = sample(run, "s")
    folder = tmp_path / "to"
    code, out = call(evaluate, run / "s.npz", "--reference", tree, "--features", "fashion")
    assert code == 0, out
    other = {"metrics": {"FD-fashion": 123.0}, "sampling": {"ema_sha256": "0" * 64}}
    (run / "other.metrics.json").write_text(json.dumps(other))
    code, out = call(export, run, "--to", folder)
    assert code == 0 and "the same network for diffusers" in out
    assert np.array_equal(sample(folder, "exported"), images)

    card = (folder / "README.md").read_text()
    distance = json.loads((run / "s.metrics.json").read_text())["metrics"]["FD-fashion"]
    assert f"FD-fashion {distance:.4g}" in card and "123" not in card
    assert "2 steps of 8 images: 16 images seen" in card
    assert str(run.parent) not in card
    (example,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert 'folder = "."' in example
    assert "steps = torch.tensor([0, 1, 2]), 1.5, 50" in example
    source = load(folder)
    start = torch.randn(3, 4, 8, 8, generator=torch.manual_seed(0))
    example = (
        example.replace('folder = "."', f'folder = "{folder}"')
        .replace("1.5, 50", "1.5, 5")
        .replace("x = ", "torch.manual_seed(0)\nx = ", 1)
    )
    variables = {}
    exec(example, variables)
    velocity = GuidedVelocity(source.model, torch.arange(3), 3, 1.5)
    expected = euler(velocity, start, ode_times(5))
    torch.testing.assert_close(variables["x"], expected, rtol=1e-4, atol=1e-4)
    assert (expected - start).abs().max() > 0.5  # the velocity is not close to zero
    assert variables["images"].shape == (3, 3, 32, 32)


def test_diffusers_version_computes_the_same_function_for_other_sizes():
    """Check the epsilon of the norms separately, because it changes velocities only by 1e-6."""
    torch.manual_seed(0)
    config = SiTConfig(
        depth=2, width=48, heads=3, patch=4, latent_size=8, channels=3, num_classes=2
    )
    model = SiT(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    dit = diffusers_dit.to_diffusers(model)
    assert diffusers_dit.relative_difference(model, dit) < 3e-6
    assert {
        module.eps
        for module in [*model.modules(), *dit.modules()]
        if isinstance(module, torch.nn.LayerNorm)
    } == {1e-6}
    dit.proj_out_2.bias += 1e-3
    assert diffusers_dit.relative_difference(model, dit) > 1e-4


def test_network_with_qk_norm_is_trained_sampled_and_exported_without_diffusers(
    call, cache, tmp_path
):
    code, out = call(train, *train_flags(cache, tmp_path, "run", "--qk-norm"))
    assert code == 0 and "forward, QK normalization" in out
    assert load(tmp_path / "run").model.config.qk_norm
    code, out = call(export, tmp_path / "run", "--to", tmp_path / "to")
    assert (
        code == 0 and "no diffusers version: DiTTransformer2DModel has no QK normalization" in out
    )
    assert not (tmp_path / "to/diffusers").exists()
    assert "SiT-Ti/2 with QK normalization" in (tmp_path / "to/README.md").read_text()
    flags = ["--num-fid-samples", 3, "--num-steps", 2, "--qk-norm", "--model", "SiT-Ti/2"]
    flags += ["--resolution", 32, "--num-classes", 3, "--sample-dir", tmp_path]
    for ckpt in (tmp_path / "run", tmp_path / "to"):
        code, out = call(sample_ddp, "--ckpt", ckpt, *flags, "--name", ckpt.name)
        assert code == 0, out
    run_images, exported_images = (
        np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("run", "to")
    )
    assert np.array_equal(run_images, exported_images)


def test_ema_decay_selects_the_exported_weights(call, run, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to/.gitattributes").touch()  # as in the clone of an empty hub repository
    assert call(export, run, "--to", tmp_path / "to", "--ema-decay", 0.5)[0] == 0
    exported = load(tmp_path / "to")
    assert exported.identity["ema_decay"] == 0.5 and exported.name == "to"
    assert exported.identity["ema_sha256"] == load(run, 0.5).identity["ema_sha256"]
    assert call(export, run, "--to", tmp_path / "to")[0] == 0  # overwrites the earlier export
    assert load(tmp_path / "to").identity["ema_sha256"] == load(run).identity["ema_sha256"]
    path = tmp_path / "to/ema.safetensors"
    save_file({key: 2 * value for key, value in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"ema.safetensors has changed since it was saved"):
        load(tmp_path / "to")


def test_diffusers_version_is_written_only_if_its_outputs_match(call, run, tmp_path, monkeypatch):
    """The frequency map reduces the difference of the sinusoidal features from 3e-3 to 1e-7.

    Without the map, no diffusers version is written, and the version in the folder is removed.
    """
    t = torch.linspace(0, 1, 1001)
    angle = t[:, None].double() * TimestepEmbedder(1).omega.double()
    expected = torch.cat((angle.cos(), angle.sin()), 1)
    unscaled = Timesteps(256, True, 1)(t).double()
    scaled = Timesteps(256, True, 1)(t * 1000).double()
    assert 2e-3 < (expected - unscaled).abs().max() < 3e-3
    assert (expected - scaled @ diffusers_dit.frequency_map().T).abs().max() < 1.5e-7
    assert diffusers_dit.frequency_map().abs().max() < 0.1

    assert call(export, run, "--to", tmp_path / "to")[0] == 0
    monkeypatch.setattr(diffusers_dit, "TIMESTEPS", 1)
    monkeypatch.setattr(
        diffusers_dit,
        "frequency_map",
        lambda num_features: torch.eye(num_features, dtype=torch.float64),
    )
    code, out = call(export, run, "--to", tmp_path / "to")
    assert code == 0 and "no diffusers version: velocities would differ by" in out
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [
        "README.md",
        "config.json",
        "ema.safetensors",
    ]
    assert "from_pretrained" not in (tmp_path / "to/README.md").read_text()


@pytest.mark.parametrize("destination", ["other folder", "run", "checkpoint", "file"])
def test_files_other_than_exports_are_never_overwritten(call, run, tmp_path, destination):
    (tmp_path / "others").mkdir()
    (tmp_path / "others/thesis.tex").write_text("text")
    to = {
        "other folder": tmp_path / "others",
        "run": run,
        "checkpoint": run / "checkpoints/0000002",
        "file": tmp_path / "others/thesis.tex",
    }[destination]
    before = sorted(path for path in tmp_path.rglob("*"))
    code, out = call(export, run, "--to", to)
    assert code == 2 and f"--to {to}" in out and len(out.strip().splitlines()) == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["/nowhere"], "/nowhere: /nowhere does not exist"),
        (["{run}", "--ema-decay", 0.7], "has no EMA of --ema-decay 0.7"),
        (["{file}"], "only checkpoints of this repository can be exported"),
    ],
)
def test_invalid_flags_print_one_line_and_write_nothing(call, run, tmp_path, flags, message):
    (tmp_path / "x.pt").touch()
    flags = [str(flag).format(run=run, file=tmp_path / "x.pt") for flag in flags]
    code, out = call(export, *flags, "--to", tmp_path / "to")
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "to").exists()


def test_old_command_names_the_new_one():
    command = [sys.executable, "-m", "evaluations.export", "exps/run", "--to", "to"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = "evaluations.export has moved: run python -m checkpointing.export with the same"
    assert result.returncode == 1 and result.stderr.startswith(expected)
