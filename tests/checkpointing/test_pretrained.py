import argparse
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sample_ddp
from checkpointing import export
from checkpointing.official import turn_time
from checkpointing.pretrained import load, resolve_checkpoint
from checkpointing.storage import CheckpointError
from common.cli import UserError
from interpolant import INTERPOLANTS
from models.sit import PRESETS, SiT, SiTConfig


def network(seed=0, **more) -> SiT:
    """A SiT-Ti/2 of five classes and latents 4x8x8, with random weights that all do something."""
    torch.manual_seed(seed)
    model = SiT(
        SiTConfig(**PRESETS["SiT-Ti/2"], **{"latent_size": 8, "num_classes": 5, **more})
    ).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.1)
    return model


def learned_sigma(model: SiT) -> SiT:
    """With an output layer twice as wide, cut as the SiT repository does: patches to a picture, then its first half."""
    model.final_layer.linear = nn.Linear(128, 2 * 2 * 8).requires_grad_(False)

    def unpatchify(tokens):
        picture = torch.einsum("nhwpqc->nchpwq", tokens.reshape(-1, 4, 4, 2, 2, 8)).reshape(
            -1, 8, 8, 8
        )
        return picture.chunk(2, 1)[0]

    model.unpatchify = unpatchify
    return model


def official(kind: str, model: SiT) -> dict:
    """What torch.save wrote: SiT-XL-2-256x256.pt is a bare state dict, train.py of all three keeps four things."""
    state = model.state_dict()
    if kind == "sit, bare":
        return state
    heads = {"repa": "projectors.0.0.weight", "sra": "ap_head.linear1.weight"}
    if kind in heads:
        state = {**state, heads[kind]: torch.ones(2, 2)}
    if kind == "repa":
        state = {f"module.{key}": value for key, value in state.items()}
    settings = argparse.Namespace(
        path_type="Linear" if kind == "sit" else "linear", exp_name="x", ema=None
    )
    content = {
        "model": network(seed=9).state_dict(),
        "ema": state,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
    }
    return content | {"args": settings} | ({} if kind == "sit" else {"steps": 40})


@pytest.fixture
def save(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "0000040.pt")
        return tmp_path / "0000040.pt"

    return write


def inputs():
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0, 1, 6), torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("kind", ["sit", "sit, bare", "repa", "sra"])
def test_official_networks_come_out_as_they_are_and_in_our_time(save, kind):
    origin = kind.split(",")[0]
    theirs = learned_sigma(network()) if origin == "sit" else network()
    (x, t, y), got = inputs(), load(save(official(kind, theirs)), model="SiT-Ti/2")
    if origin == "sit":
        torch.testing.assert_close(got.model(x, t, y), -theirs(x, 1 - t, y), rtol=1e-5, atol=1e-5)
        assert (got.model(x, t, y) + theirs(x, t, y)).abs().max() > 0.1  # time matters here
    else:
        assert torch.equal(got.model(x, t, y), theirs(x, t, y))
    assert (got.path_type, got.name, got.class_names) == ("linear", "0000040", list("01234"))
    assert got.identity["origin"] == origin and got.identity["step"] == (
        40 if origin in ("repa", "sra") else None
    )
    assert got.vae == "stabilityai/sd-vae-ft-ema" and got.vae_fingerprint is None
    assert not got.model.training and not any(
        parameter.requires_grad for parameter in got.model.parameters()
    )


def test_shapes_say_how_many_classes_and_how_large_a_latent(save):
    got = load(
        save(official("repa", network(num_classes=3, latent_size=4, channels=2))), model="SiT-Ti/2"
    )
    assert got.model.config == SiTConfig(
        **PRESETS["SiT-Ti/2"], latent_size=4, channels=2, num_classes=3
    )


def test_turning_time_twice_turns_nothing():
    state = network().state_dict()
    once, twice = turn_time(state), turn_time(turn_time(state))
    for key in state:
        torch.testing.assert_close(twice[key], state[key], rtol=0, atol=1e-7)
    assert not torch.equal(once["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.weight"])


def test_origin_is_asked_for_only_where_the_file_does_not_tell(save):
    path, (x, t, y) = save(network().state_dict()), inputs()
    with pytest.raises(UserError, match="add --origin"):
        load(path, model="SiT-Ti/2")
    reversed_, same = (
        load(path, model="SiT-Ti/2", origin=origin).model(x, t, y) for origin in ("sit", "sra")
    )
    torch.testing.assert_close(reversed_, -network()(x, 1 - t, y), rtol=1e-5, atol=1e-5)
    assert torch.equal(same, network()(x, t, y))


@pytest.mark.parametrize(
    ("settings", "flag", "expected"),
    [
        ({}, None, "linear"),
        ({}, "cosine", "cosine"),
        ({"path_type": "GVP"}, None, "cosine"),
        ({"path_type": "cosine"}, "cosine", "cosine"),
        ({"path_type": "VP"}, None, "vp"),
        ({"path_type": "EDM"}, None, "trained on the path EDM"),
        (
            {"path_type": "GVP"},
            "linear",
            "--path-type linear: .* itself that it was trained on the cosine path",
        ),
        ({"prediction": "noise"}, None, "predicts noise, not velocity"),
    ],
)
def test_path_is_what_the_file_says_or_else_the_flag(save, settings, flag, expected):
    path = save({**official("repa", network()), "args": argparse.Namespace(**settings)})
    if expected in INTERPOLANTS:
        assert load(path, model="SiT-Ti/2", path_type=flag)[1:3] == (expected, "v")
    else:
        with pytest.raises((CheckpointError, UserError), match=expected):
            load(path, model="SiT-Ti/2", path_type=flag)


def without(content: dict, key: str) -> dict:
    return {k: v for k, v in content.items() if k != key}


@pytest.mark.parametrize(
    ("change", "flags", "expected"),
    [
        (lambda state: state, {}, "shapes are those of SiT-Ti/2: add --model SiT-Ti/2"),
        (
            lambda state: state,
            {"model": "SiT-B/2"},
            "--model SiT-B/2 does not fit .* are those of SiT-Ti/2",
        ),
        (
            lambda state: state,
            {"model": "SiT-Ti/2", "origin": "sit"},
            "--origin sit: .* holds what only sra has",
        ),
        (
            lambda state: state,
            {"model": "SiT-Ti/2", "ema_decay": 0.9},
            "--ema-decay is for runs of this repository",
        ),
        (lambda state: without(state, "pos_embed"), {}, "holds no SiT: there is no pos_embed"),
        (
            lambda state: without(state, "blocks.5.mlp.fc1.bias"),
            {"model": "SiT-Ti/2"},
            "cannot be loaded .*fc1.bias",
        ),
        (
            lambda state: {**state, "blocks.6.x": torch.ones(1)},
            {},
            "has 7 blocks of width 128 and patches of 2",
        ),
        (
            lambda state: {**state, "blocks.0.attn.q_norm.weight": torch.ones(32)},
            {},
            "was trained with --qk-norm",
        ),
        (lambda state: {"note": "x"}, {}, "holds no state dict"),
        (lambda state: [1, 2], {}, "holds no state dict"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(save, change, flags, expected):
    with pytest.raises((CheckpointError, UserError), match=expected) as caught:
        load(save(change(official("sra", network())["ema"])), **flags)
    assert "\n" not in str(caught.value)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_in_a_file_is_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"ema": network().state_dict(), "args": Harmful()},
        "x.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(CheckpointError, match=r"x.pt holds code \(posix.mkdir\)"):
        load(tmp_path / "x.pt", model="SiT-Ti/2")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "x.pt").write_bytes(b"\x00garbage")
    with pytest.raises(CheckpointError, match=r"cannot be read as a \.pt file"):
        load(tmp_path / "x.pt", model="SiT-Ti/2")


@pytest.fixture
def run(tmp_path, trained):
    """A run of two averages, the second of them doubled."""
    run = shutil.copytree(trained, tmp_path / "run")
    folder = run / "checkpoints/0000002"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ema_decay": [0.9, 0.5]}))
    save_file(
        {key: 2 * value for key, value in load_file(folder / "ema.safetensors").items()},
        folder / "ema-0.5.safetensors",
    )
    return run


def test_a_run_its_checkpoint_and_its_averages_are_one_thing(run, vae_folder):
    folder = run / "checkpoints/0000002"
    assert resolve_checkpoint(run) == resolve_checkpoint(folder) == folder
    for decay, file, average in (
        (0.9, "ema.safetensors", ""),
        (0.5, "ema-0.5.safetensors", "-ema0.5"),
    ):
        expected = load_file(folder / file)
        for got in (
            load(run, decay),
            load(folder, decay),
            load(folder / file),
            load(folder / file, decay),
        ):
            assert all(
                torch.equal(value, expected[key]) for key, value in got.model.state_dict().items()
            )
            assert got.name == f"run-0000002{average}" and got.identity["checkpoint"] == str(folder)
            assert (
                got.identity["ema_decay"],
                got.identity["step"],
                got.identity["images_seen"],
            ) == (decay, 2, 16)
    assert (got.path_type, got.vae, len(got.class_names)) == ("linear", str(vae_folder), 3)
    assert load(run).identity["ema_decay"] == 0.9


def test_what_the_network_predicts_reaches_samples_their_record_and_the_export(run, call, tmp_path):
    """Of a checkpoint that does not say, the velocity."""
    config_file, images = run / "checkpoints/0000002/config.json", {}
    config = without(json.loads(config_file.read_text()), "prediction")
    for prediction, said in (("v", {}), ("eps", {"prediction": "eps", "path_type": "vp"})):
        config_file.write_text(json.dumps({**config, **said}))
        assert load(run).prediction == prediction
        flags = f"--num-fid-samples 3 --num-steps 3 --mode ode --name {prediction} --sample-dir {tmp_path}".split()
        code, out = call(sample_ddp, "--ckpt", run, *flags)
        assert code == 0, out
        assert json.loads((tmp_path / f"{prediction}.json").read_text())["prediction"] == prediction
        with np.load(tmp_path / f"{prediction}.npz") as content:
            images[prediction] = content["arr_0"].astype(int)
    assert (images["v"] != images["eps"]).mean() > 0.5
    code, out = call(export, run, "--to", tmp_path / "to")
    assert (
        code == 0
        and "no form for diffusers, whose scheduler takes velocities: this network predicts eps"
        in out
    )
    assert (
        not (tmp_path / "to/diffusers").exists()
        and "noise on the vp path" in (tmp_path / "to/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("path", "flags", "expected"),
    [
        (
            "",
            {"model": "SiT-Ti/2"},
            "--model is for official .pt files; .* says itself that it is SiT-Ti/2",
        ),
        ("", {"origin": "sit"}, "--origin is for official .pt files"),
        ("", {"path_type": "cosine"}, "--path-type is for official .pt files"),
        ("", {"ema_decay": 0.7}, "has no EMA of --ema-decay 0.7; choose one of 0.9 0.5"),
        (
            "checkpoints/0000002/ema-0.5.safetensors",
            {"ema_decay": 0.9},
            "--ema-decay 0.9: .* is the average of 0.5",
        ),
        (
            "checkpoints/0000002/model.safetensors",
            {},
            "model.safetensors is not an average: beside it there is ema",
        ),
        ("alone.safetensors", {}, "config.json cannot be read"),
        ("nowhere", {}, "nowhere does not exist"),
    ],
)
def test_mistakes_about_ours_are_said_in_one_line(run, path, flags, expected):
    (run / "alone.safetensors").touch()
    with pytest.raises((CheckpointError, UserError), match=expected) as caught:
        load(run / path, **flags)
    assert "\n" not in str(caught.value)


def test_config_of_something_else_beside_an_average_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (tmp_path / "ema.safetensors").touch()
    with pytest.raises(CheckpointError, match="is not of a checkpoint of this repository"):
        load(tmp_path)
