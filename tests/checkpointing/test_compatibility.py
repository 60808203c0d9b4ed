"""Test that files that version 1 of the code wrote remain usable (tests/data/v1/README.md)."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import train
from checkpointing import export, pretrained
from common.metrics_log import read_rows, upgrade_row
from latents.cache import LatentCache
from models import sit
from sampling.recipe import Recipe
from tests.helpers import ROOT

V1 = ROOT / "tests/data/v1"
EXPECTED = V1 / "expected"


def describe_machine() -> dict[str, str]:
    """Return the properties of this machine that affect floating-point results."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines()[:6] if cpu_info.exists() else []
    cpu = [
        line.split(":")[1].strip()
        for line in lines
        if line.startswith(("vendor_id", "cpu family", "model\t"))
    ]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": " ".join(cpu),
    }


IS_SAME_MACHINE = describe_machine() == json.loads((EXPECTED / "machine.json").read_text())


def assert_same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    if IS_SAME_MACHINE:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "ema_decay", "sampler", "expected"),
    [
        ("run", None, {"mode": "ode", "heun": True, "num_steps": 4}, "ode-heun"),
        ("export", None, {"mode": "ode", "heun": True, "num_steps": 4}, "ode-heun"),
        ("run", None, {"mode": "sde", "num_steps": 5}, "sde"),
        ("run", 0.9, {"mode": "ode", "num_steps": 4}, "ema-0.9"),
    ],
)
def test_latents_of_v1_checkpoints_are_unchanged(path, ema_decay, sampler, expected):
    source = pretrained.load(V1 / path, ema_decay)
    recipe = Recipe(
        seed=5,
        cfg_scale=1.5,
        path_type=source.path_type,
        prediction=source.prediction,
        **sampler,
    )
    latents = recipe.sample_latents(source.model, torch.tensor([0, 3, 17]))
    assert_same_numbers(latents, torch.from_numpy(np.load(EXPECTED / f"latents-{expected}.npy")))


def test_contents_of_v1_caches_are_unchanged():
    cache = LatentCache(V1 / "cache")
    indices = np.array([7, 0, 5, 4])
    is_flipped = np.array([True, False, True, False])
    moments, labels = cache.gather(indices, is_flipped)
    assert len(cache) == 8
    np.testing.assert_array_equal(moments, np.load(EXPECTED / "moments.npy"))
    np.testing.assert_array_equal(labels, np.load(EXPECTED / "labels.npy"))
    images = cache.read_input("images", indices, is_flipped)
    np.testing.assert_array_equal(images, np.load(EXPECTED / "images.npy"))


def test_resumed_v1_runs_train_the_same_weights(call, tmp_path, monkeypatch):
    tiny_preset = {"depth": 2, "width": 8, "heads": 2, "patch": 2}
    monkeypatch.setitem(sit.PRESETS, "SiT-Ti/2", tiny_preset)
    run = shutil.copytree(V1 / "run", tmp_path / "run")
    flags = "--exp-name run --model SiT-Ti/2 --batch-size 4 --learning-rate 0.03 --log-every 2"
    flags += " --align sra2 sra --projector-width 8 --ema-decay 0.5 0.9 --sampling-steps 0"
    flags += " --num-workers 0 --max-train-steps 5"
    code, out = call(train, "--data-dir", V1 / "cache", "--output-dir", tmp_path, *flags.split())
    assert code == 0, out

    before = run / "checkpoints/0000003"
    after = run / "checkpoints/0000005"
    assert_same_numbers_in_files(after / "ema.safetensors", EXPECTED / "resumed-ema.safetensors")
    if IS_SAME_MACHINE:
        hashes = json.loads((EXPECTED / "resumed-sha256.json").read_text())
        # The hashes are of files without metadata.
        files = {name: save(load_file(after / name)) for name in hashes}
        assert {name: hashlib.sha256(file).hexdigest() for name, file in files.items()} == hashes

    # In config.json only the step differs; in args.json only the paths and the last step differ.
    config = json.loads((before / "config.json").read_text())
    assert json.loads((after / "config.json").read_text()) == {**config, "step": 5}
    changed_flags = {
        "data_dir": [str(V1 / "cache")],
        "output_dir": str(tmp_path),
        "max_train_steps": 5,
    }
    stored = json.loads((V1 / "run/args.json").read_text()) | changed_flags
    flags = json.loads((run / "args.json").read_text())
    assert stored.keys() <= flags.keys()
    differing = {key for key in flags if key not in stored or flags[key] != stored[key]}
    # Version 1 stored null for these defaults, and "none" or nothing for the new flags.
    resolved = {"align_target": "mean", "align_normalize": "none", "sra_t_max": 0.2}
    new_flags = {"report_to", "wandb_project", "profile", "recomputed_blocks", "shard"}
    new_flags |= {"local_cache", "collective_timeout", "optimizer", "lr_schedule"}
    new_flags |= {"lr_warmup_steps", "lr_min_factor", "muon_momentum", "muon_weight_decay"}
    assert differing <= resolved.keys() | new_flags
    assert flags.items() >= resolved.items()

    # metrics.jsonl contains lines in the format of both versions. Reading converts all lines.
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0].keys() <= rows[1].keys()
    # The second line is the mean over a step before and a step after the checkpoint.
    expected = json.loads((EXPECTED / "resumed-metrics.json").read_text())
    for key, value in upgrade_row(expected, ["sra2", "sra"]).items():
        assert rows[1][key] == pytest.approx(value, rel=1e-3), key


def assert_same_numbers_in_files(actual: Path, expected: Path) -> None:
    actual_tensors = load_file(actual)
    expected_tensors = load_file(expected)
    assert actual_tensors.keys() == expected_tensors.keys()
    for key, tensor in actual_tensors.items():
        assert_same_numbers(tensor, expected_tensors[key])


def test_exports_of_v1_runs_are_unchanged(call, tmp_path):
    shutil.copytree(V1 / "run", tmp_path / "run")
    code, out = call(export, tmp_path / "run", "--to", tmp_path / "export")
    assert code == 0, out
    expected = sorted(path for path in (V1 / "export").rglob("*") if path.is_file())
    for path in expected:
        actual = tmp_path / "export" / path.relative_to(V1 / "export")
        if path.name == "diffusion_pytorch_model.safetensors":  # pinv depends on the machine
            assert_same_numbers_in_files(actual, path)
        elif path.name != "README.md":
            assert actual.read_bytes() == path.read_bytes()
