"""A frozen network of a run must fit the run, and stays the same when the run is resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpointing import export
from latents.cache import LatentCache
from models.errors import FieldError
from models.sit import SiTConfig
from tests.helpers import train_flags
from training.frozen_network import load_frozen_network

NETWORK = SiTConfig(depth=6, width=128, heads=4, patch=2, latent_size=8, channels=4, num_classes=3)


@pytest.fixture
def load(cache):
    """Return a function that loads a frozen network for a run on the cache."""

    def load_for_run(path: Path, **changes):
        requirements = {
            "needs_null_class": True,
            "network": NETWORK,
            "path_type": "linear",
            "manifest": LatentCache(cache).manifest,
            "device": torch.device("cpu"),
        }
        return load_frozen_network(path, **requirements | changes)

    return load_for_run


def copy_with_config(run: Path, folder: Path, **changes) -> Path:
    """Copy a run and change the config.json of its checkpoint."""
    shutil.copytree(run, folder)
    path = folder / "checkpoints/0000002/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_frozen_network_is_the_ema_of_the_newest_checkpoint(load, call, trained, tmp_path):
    frozen = load(trained)
    weights = load_file(trained / "checkpoints/0000002/ema.safetensors")
    state = frozen.network.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not any(parameter.requires_grad for parameter in frozen.network.parameters())
    assert call(export, trained, "--to", tmp_path / "export")[0] == 0
    for path in (trained / "checkpoints/0000002", tmp_path / "export"):
        assert load(path).ema_sha256 == frozen.ema_sha256


def test_error_states_the_difference_from_the_network_of_the_run(load, cache, trained, tmp_path):
    manifest = replace(LatentCache(cache).manifest, vae_fingerprint="0" * 64)
    without_null_class = copy_with_config(trained, tmp_path / "copy", cfg_prob=0.0)
    assert load(without_null_class, needs_null_class=False)
    for name in ("0400000.pt", "model.bin", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "args.json").write_text("{}")
    for path, changes, message in (
        (tmp_path / "none", {}, "none does not exist"),
        (tmp_path, {}, "has no checkpoints yet"),
        (tmp_path / "0400000.pt", {}, "0400000.pt is a file of another repository: pass a run of"),
        (tmp_path / "model.bin", {}, "model.bin is a file of another repository: pass a run of"),
        (tmp_path / "model.safetensors", {}, "model.safetensors needs the config.json of its run"),
        (trained, {"network": replace(NETWORK, depth=5)}, "is SiT-Ti/2, which differs from the"),
        (trained, {"network": replace(NETWORK, num_classes=4)}, "(num_classes 3 instead of 4): "),
        (trained, {"network": replace(NETWORK, qk_norm=True)}, "(qk_norm False instead of True): "),
        (trained, {"manifest": manifest}, "was trained on the latents of another VAE: pass"),
        (trained, {"path_type": "cosine"}, "was trained with --path-type linear: pass"),
        (without_null_class, {}, "was trained with --cfg-prob 0 and has no null class, which"),
    ):
        with pytest.raises(FieldError) as raised:
            load(path, **changes)
        assert raised.value.field == "checkpoint"
        assert message in raised.value.reason and "\n" not in raised.value.reason


def test_other_frozen_network_does_not_resume_a_run(call, cache, trained, tmp_path):
    """The same network in another folder resumes it."""
    flags = train_flags(cache, tmp_path, "run", "--align", "selftrans")
    moved = shutil.copytree(trained, tmp_path / "moved")

    def start(num_steps, frozen):
        options = ("--max-train-steps", num_steps, "--selftrans-checkpoint", frozen)
        return call(train, *flags, *options)

    assert start(1, trained)[0] == 0
    code, out = start(2, tmp_path / "run")
    assert code == 2 and "another setting of --align selftrans: ema_sha256 was" in out
    assert "pass the settings and files it was started with" in out
    code, out = start(2, trained)
    assert code == 0, out
    code, out = start(3, moved)
    assert code == 0 and "resuming from" in out, out
    code, out = call(
        train, *flags, "--selftrans-checkpoint", trained, "--path-type", "cosine", "--exp-name", "x"
    )
    lines = out.strip().splitlines()
    assert code == 2 and len(lines) == 1, out
    assert "--selftrans-checkpoint" in out and "was trained with --path-type linear" in out
