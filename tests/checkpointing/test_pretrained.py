"""Test loading of official files, runs, checkpoints and EMA files."""

import argparse
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sample_ddp
from checkpointing import export
from checkpointing.official import reverse_time
from checkpointing.pretrained import load, resolve_checkpoint
from checkpointing.storage import CheckpointError
from common.cli import UserError
from interpolant import INTERPOLANTS
from models.errors import FieldError
from models.sit import PRESETS, SiT, SiTConfig
from sampling.recipe import Recipe
from tests.helpers import LFS_POINTER


def make_sit(seed=0, **options) -> SiT:
    """Build a SiT-Ti/2 with random weights for five classes and latents of 4x8x8."""
    torch.manual_seed(seed)
    config = SiTConfig(**PRESETS["SiT-Ti/2"], **{"latent_size": 8, "num_classes": 5, **options})
    model = SiT(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.1)
    return model


def add_learned_sigma(model: SiT) -> SiT:
    """Double the output channels and return only the first half, as the SiT repository does."""
    model.final_layer.linear = nn.Linear(128, 2 * 2 * 8).requires_grad_(False)

    def unpatchify(tokens):
        patches = tokens.reshape(-1, 4, 4, 2, 2, 8)
        image = torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, 8, 8, 8)
        return image.chunk(2, 1)[0]

    model.unpatchify = unpatchify
    return model


def make_official_content(kind: str, model: SiT) -> dict:
    """Return the content of an official .pt file.

    SiT-XL-2-256x256.pt contains only a state dict. The train.py of all three repositories saves a
    dict that contains state dicts.
    """
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
        "model": make_sit(seed=9).state_dict(),
        "ema": state,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": settings,
    }
    if kind != "sit":
        content["steps"] = 40
    return content


@pytest.fixture
def write_pt_file(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "0000040.pt")
        return tmp_path / "0000040.pt"

    return write


def make_inputs():
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0, 1, 6), torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("kind", ["sit", "sit, bare", "repa", "sra"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_official_networks_compute_the_same_function_after_conversion(write_pt_file, kind, qk_norm):
    origin = kind.split(",")[0]
    network = make_sit(qk_norm=qk_norm)
    official = add_learned_sigma(network) if origin == "sit" else network
    x, t, y = make_inputs()
    loaded = load(write_pt_file(make_official_content(kind, official)), model="SiT-Ti/2")
    converted = loaded.model
    if origin == "sit":
        torch.testing.assert_close(converted(x, t, y), -official(x, 1 - t, y), rtol=1e-5, atol=1e-5)
        # The output depends on time.
        assert (converted(x, t, y) + official(x, t, y)).abs().max() > 0.1
    else:
        assert torch.equal(converted(x, t, y), official(x, t, y))
    assert converted.config.qk_norm == qk_norm
    assert (loaded.path_type, loaded.name) == ("linear", "0000040")
    assert loaded.class_names == list("01234")
    assert loaded.identity["origin"] == origin
    assert loaded.identity["step"] == (None if origin == "sit" else 40)
    assert loaded.vae == "stabilityai/sd-vae-ft-ema" and loaded.vae_fingerprint is None
    assert not converted.training
    assert not any(parameter.requires_grad for parameter in converted.parameters())


@pytest.mark.parametrize("recorded", ["SiT-Ti/2", "SiT-B/2", None])
def test_recorded_name_of_the_network_replaces_the_flag(write_pt_file, recorded):
    content = make_official_content("repa", make_sit())
    settings = vars(content["args"]) if "args" in content else {}
    path = write_pt_file(content | {"args": argparse.Namespace(**settings | {"model": recorded})})
    if recorded == "SiT-Ti/2":
        assert load(path).identity["origin"] == "repa"
    else:
        with pytest.raises(UserError, match="add --model SiT-Ti/2"):
            load(path)


def test_config_is_inferred_from_shapes(write_pt_file):
    options = {"num_classes": 3, "latent_size": 4, "channels": 2}
    loaded = load(
        write_pt_file(make_official_content("repa", make_sit(**options))), model="SiT-Ti/2"
    )
    assert loaded.model.config == SiTConfig(**PRESETS["SiT-Ti/2"], **options)


@pytest.mark.parametrize(
    ("num_rows", "recorded", "num_classes", "has_null_class"),
    [
        (6, None, 5, True),
        (6, 5, 5, True),
        (6, 6, 6, False),
        (1000, None, 1000, False),
        (1000, 999, 999, True),
        (1001, None, 1000, True),
    ],
)
def test_missing_row_of_the_null_class_is_recognized(
    write_pt_file, num_rows, recorded, num_classes, has_null_class
):
    official = make_sit(num_classes=num_rows - 1)
    content = make_official_content("repa", official)
    if recorded is not None:
        content["args"].num_classes = recorded
    source = load(write_pt_file(content), model="SiT-Ti/2")
    assert source.model.config.num_classes == len(source.class_names) == num_classes
    assert source.trained_labels.has_null_class == has_null_class
    x, t, y = make_inputs()
    y = y % num_rows  # the last row is a class if there is no null class
    assert torch.equal(source.model(x, t, y), official(x, t, y))
    guided = Recipe(cfg_scale=2.0)
    if has_null_class:
        assert guided.for_trained_labels(source.trained_labels) is guided
    else:
        with pytest.raises(FieldError, match="2 requires the null class"):
            guided.for_trained_labels(source.trained_labels)


def test_reversing_time_twice_restores_the_weights():
    state = make_sit().state_dict()
    reversed_once = reverse_time(state)
    reversed_twice = reverse_time(reversed_once)
    for key in state:
        torch.testing.assert_close(reversed_twice[key], state[key], rtol=0, atol=1e-7)
    assert not torch.equal(
        reversed_once["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.weight"]
    )


def test_origin_is_required_only_for_ambiguous_files(write_pt_file):
    x, t, y = make_inputs()
    path = write_pt_file(make_sit().state_dict())
    with pytest.raises(UserError, match="add --origin"):
        load(path, model="SiT-Ti/2")
    from_sit = load(path, model="SiT-Ti/2", origin="sit").model(x, t, y)
    from_sra = load(path, model="SiT-Ti/2", origin="sra").model(x, t, y)
    torch.testing.assert_close(from_sit, -make_sit()(x, 1 - t, y), rtol=1e-5, atol=1e-5)
    assert torch.equal(from_sra, make_sit()(x, t, y))


@pytest.mark.parametrize(
    ("settings", "flag", "expected"),
    [
        ({}, None, "linear"),
        ({}, "cosine", "cosine"),
        ({"path_type": "GVP"}, None, "cosine"),
        ({"path_type": "cosine"}, "cosine", "cosine"),
        ({"path_type": "VP"}, None, "vp"),
        ({"path_type": "EDM"}, None, "trained on the EDM path"),
        (
            {"path_type": "GVP"},
            "linear",
            "--path-type linear: .* records that it was trained on the cosine path",
        ),
        ({"prediction": "noise"}, None, "predicts noise, not velocity"),
    ],
)
def test_path_type_of_the_file_takes_precedence_over_the_flag(
    write_pt_file, settings, flag, expected
):
    path = write_pt_file(
        {**make_official_content("repa", make_sit()), "args": argparse.Namespace(**settings)}
    )
    if expected in INTERPOLANTS:
        loaded = load(path, model="SiT-Ti/2", path_type=flag)
        assert (loaded.path_type, loaded.prediction) == (expected, "v")
    else:
        with pytest.raises(UserError, match=expected):
            load(path, model="SiT-Ti/2", path_type=flag)


def drop_key(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("change", "flags", "expected"),
    [
        (lambda state: state, {}, "tensor shapes match SiT-Ti/2: add --model SiT-Ti/2"),
        (
            lambda state: state,
            {"model": "SiT-B/2"},
            "--model SiT-B/2 does not match .* shapes match SiT-Ti/2",
        ),
        (
            lambda state: state,
            {"model": "SiT-Ti/2", "origin": "sit"},
            "--origin sit: .* contains weights that exist only in sra",
        ),
        (
            lambda state: state,
            {"model": "SiT-Ti/2", "ema_decay": 0.9},
            "--ema-decay is for runs of this repository",
        ),
        (
            lambda state: drop_key(state, "pos_embed"),
            {},
            "does not contain a SiT: pos_embed is missing",
        ),
        (
            lambda state: drop_key(state, "blocks.5.mlp.fc1.bias"),
            {"model": "SiT-Ti/2"},
            "cannot be loaded .*fc1.bias",
        ),
        (
            lambda state: {**state, "blocks.6.x": torch.ones(1)},
            {},
            "has 7 blocks of width 128 and patch size 2",
        ),
        (
            lambda state: {**state, "blocks.0.attn.q_norm.weight": torch.ones(32)},
            {"model": "SiT-Ti/2"},
            "cannot be loaded .*q_norm",
        ),
        (lambda state: {"note": "x"}, {}, "does not contain a state dict"),
        (lambda state: [1, 2], {}, "does not contain a state dict"),
    ],
)
def test_unsuitable_official_files_are_rejected_in_one_line(write_pt_file, change, flags, expected):
    with pytest.raises(UserError, match=expected) as error:
        load(write_pt_file(change(make_official_content("sra", make_sit())["ema"])), **flags)
    assert "\n" not in str(error.value)


def wrap_names(state: dict, wrappers: str) -> dict:
    """Insert wrapper names at the start and after the index of each block."""
    names = (key.replace("blocks.1.", f"blocks.1.{wrappers}") for key in state)
    return dict(zip((wrappers + name for name in names), state.values()))


def split_blocks(state: dict) -> dict:
    """Number the blocks from the third one on as `decoder_blocks`, as REPA's --legacy files do."""
    return {
        re.sub(r"^blocks\.([2-9])", lambda m: f"decoder_blocks.{int(m[1]) - 2}", key): value
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("change", "container"),
    [
        (lambda state: wrap_names(state, "module._orig_mod."), "ema"),
        (lambda state: wrap_names(state, "_orig_mod.module."), "model"),
        (lambda state: wrap_names(state, "_fsdp_wrapped_module._orig_mod.module."), "state_dict"),
        (lambda state: wrap_names(state, "_checkpoint_wrapped_module."), None),
        (lambda state: wrap_names(state, "_fsdp_wrapped_module._fpw_module."), None),
        (lambda state: {"n_averaged": torch.tensor(7), **wrap_names(state, "module.")}, None),
        (split_blocks, "ema"),
        (lambda state: wrap_names(split_blocks(state), "module."), None),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_of_wrappers_legacy_names_and_containers_are_read(
    tmp_path, change, container, suffix
):
    network = make_sit()
    state = change(network.state_dict())
    path = tmp_path / f"network{suffix}"
    if suffix == ".pt":
        torch.save({container: state} if container else state, path)
    else:
        save_file(state, path)
    loaded = load(path, model="SiT-Ti/2", origin="repa")
    inputs = make_inputs()
    assert torch.equal(loaded.model(*inputs), network(*inputs))


def test_ema_weights_take_precedence_over_other_weights(write_pt_file):
    networks = {name: make_sit(seed) for seed, name in enumerate(("state_dict", "model", "ema"))}
    content = {name: network.state_dict() for name, network in networks.items()}
    loaded = load(write_pt_file(content), model="SiT-Ti/2", origin="repa")
    assert torch.equal(loaded.model(*make_inputs()), networks["ema"](*make_inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_converted_as_if_upcast_first(write_pt_file, dtype):
    half = {key: value.to(dtype) for key, value in make_sit().state_dict().items()}
    upcast = {key: value.float() for key, value in half.items()}
    outputs = [
        load(write_pt_file(state), model="SiT-Ti/2", origin="sit").model(*make_inputs())
        for state in (half, upcast)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"net": {}, "optimizer": {}},
            "at the top level or under ema or model or state_dict; it contains net, optimizer",
        ),
        ([], "does not contain a state dict .*; it contains a list"),
        ({"ema": {}}, "does not contain a state dict .*; it contains ema"),
        (
            {"model": {"encoder.weight": torch.ones(1)}},
            "x_embedder.proj.weight is missing; it contains encoder.weight",
        ),
        (
            {f"layers.{k}": torch.ones(1) for k in range(9)},
            "it contains layers.0, .*, layers.4 and 4 more",
        ),
        (
            {"module.x": torch.ones(1), "x": torch.ones(1)},
            r"several networks in one state dict \(module.x, x\)",
        ),
    ],
)
def test_errors_about_foreign_files_contain_the_keys(write_pt_file, content, expected):
    with pytest.raises(CheckpointError, match=expected) as error:
        load(write_pt_file(content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_lfs_pointer_is_reported_instead_of_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*'git lfs pull'"):
        load(tmp_path / name, model="SiT-Ti/2")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"ema": make_sit().state_dict(), "args": Harmful()},
        "x.pt",
        _use_new_zipfile_serialization=is_zip,
    )
    with pytest.raises(CheckpointError, match=r"x.pt contains code \(posix.mkdir\)"):
        load(tmp_path / "x.pt", model="SiT-Ti/2")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "x.pt").write_bytes(b"\x00garbage")
    with pytest.raises(CheckpointError, match=r"cannot be read as a \.pt file"):
        load(tmp_path / "x.pt", model="SiT-Ti/2")


@pytest.fixture
def run(tmp_path, trained):
    """Return a run with two EMAs, the second of which has doubled weights."""
    run = shutil.copytree(trained, tmp_path / "run")
    folder = run / "checkpoints/0000002"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ema_decay": [0.9, 0.5]}))
    save_file(
        {key: 2 * value for key, value in load_file(folder / "ema.safetensors").items()},
        folder / "ema-0.5.safetensors",
    )
    return run


def test_runs_checkpoints_and_ema_files_load_the_same_weights(run, vae_folder):
    folder = run / "checkpoints/0000002"
    assert resolve_checkpoint(run) == resolve_checkpoint(folder) == folder
    for decay, file, suffix in (
        (0.9, "ema.safetensors", ""),
        (0.5, "ema-0.5.safetensors", "-ema0.5"),
    ):
        expected = load_file(folder / file)
        for loaded in (
            load(run, decay),
            load(folder, decay),
            load(folder / file),
            load(folder / file, decay),
        ):
            state = loaded.model.state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in state.items())
            assert loaded.name == f"run-0000002{suffix}"
            identity = loaded.identity
            assert identity["checkpoint"] == str(folder)
            assert (identity["ema_decay"], identity["step"]) == (decay, 2)
            assert identity["images_seen"] == 16
            assert (loaded.path_type, loaded.vae) == ("linear", str(vae_folder))
            assert len(loaded.class_names) == 3
    assert load(run).identity["ema_decay"] == 0.9


def test_prediction_affects_samples_their_record_and_the_export(run, call, tmp_path):
    """A checkpoint without a recorded prediction predicts the velocity."""
    config_file = run / "checkpoints/0000002/config.json"
    images = {}
    config = drop_key(json.loads(config_file.read_text()), "prediction")
    for prediction, recorded in (("v", {}), ("eps", {"prediction": "eps", "path_type": "vp"})):
        config_file.write_text(json.dumps({**config, **recorded}))
        assert load(run).prediction == prediction
        flags = ["--num-fid-samples", "3", "--num-steps", "3", "--mode", "ode"]
        destination = ("--name", prediction, "--sample-dir", tmp_path)
        code, out = call(sample_ddp, "--ckpt", run, *flags, *destination)
        assert code == 0, out
        record = json.loads((tmp_path / f"{prediction}.json").read_text())
        assert record["prediction"] == prediction
        with np.load(tmp_path / f"{prediction}.npz") as content:
            images[prediction] = content["arr_0"].astype(int)
    assert (images["v"] != images["eps"]).mean() > 0.5
    code, out = call(export, run, "--to", tmp_path / "to")
    assert code == 0
    assert (
        "no diffusers version: its scheduler needs velocities, but this network predicts eps" in out
    )
    assert not (tmp_path / "to/diffusers").exists()
    assert "noise on the vp path" in (tmp_path / "to/README.md").read_text()


@pytest.mark.parametrize(
    ("path", "flags", "expected"),
    [
        (
            "",
            {"model": "SiT-S/2"},
            "--model SiT-S/2 is for official .pt files, but .* records that it is SiT-Ti/2",
        ),
        ("", {"origin": "sit"}, "--origin sit is for official .pt files"),
        ("", {"path_type": "cosine"}, "--path-type cosine is for official .pt files"),
        ("", {"ema_decay": 0.7}, "has no EMA of --ema-decay 0.7; choose one of 0.9 0.5"),
        (
            "checkpoints/0000002/ema-0.5.safetensors",
            {"ema_decay": 0.9},
            "--ema-decay 0.9: .* is the EMA with decay 0.5",
        ),
        (
            "checkpoints/0000002/model.safetensors",
            {},
            "model.safetensors is not an EMA; choose one of ema.safetensors ema-0.5",
        ),
        (
            "alone.safetensors",
            {},
            "alone.safetensors needs the config.json of its run or export in the same folder: copy "
            "it there, or pass --model and --origin",
        ),
        ("nowhere", {}, "nowhere does not exist"),
    ],
)
def test_unsuitable_paths_and_flags_of_runs_are_rejected_in_one_line(run, path, flags, expected):
    (run / "alone.safetensors").touch()
    with pytest.raises(UserError, match=expected) as error:
        load(run / path, **flags)
    assert "\n" not in str(error.value)


def test_ema_without_a_config_is_read_as_an_official_file(run):
    """A config.json of another library in the folder is ignored."""
    ema = run / "checkpoints/0000002/ema.safetensors"
    expected = load(ema).model.state_dict()
    copy = shutil.copy(ema, run / "network.safetensors")
    (run / "config.json").write_text('{"architectures": []}')
    with pytest.raises(CheckpointError, match=r"needs the config\.json of its run"):
        load(copy)
    state = load(copy, model="SiT-Ti/2", origin="repa").model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_error_of_an_ema_that_does_not_fit_its_config_contains_the_remedy(run):
    folder = run / "checkpoints/0000002"
    config = json.loads((folder / "config.json").read_text())
    wider = {**config, "model_name": "SiT-S/2", "model": config["model"] | {"width": 384}}
    (folder / "config.json").write_text(json.dumps(wider))
    message = r"config\.json next to it describes SiT-S/2: copy both from one run"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_config_of_another_library_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (tmp_path / "ema.safetensors").touch()
    with pytest.raises(CheckpointError, match="does not belong to a checkpoint of this repository"):
        load(tmp_path)


def test_settings_of_another_run_next_to_an_ema_are_reported(run, tmp_path, caplog):
    """Paths may differ, and files of older versions do not record their settings."""
    folder = run / "checkpoints/0000002"
    config = json.loads((folder / "config.json").read_text())
    moved = config | {"data": config["data"] | {"vae": "other/folder"}}
    renamed = config | {"data": config["data"] | {"class_names": ["c", "a", "b"]}}
    old_ema = tmp_path / "ema.safetensors"
    save_file(load_file(folder / "ema.safetensors"), old_ema)
    (folder / "progress.json").unlink()
    warnings = []
    for ema, stored in (
        (folder / "ema.safetensors", moved),
        (folder / "ema.safetensors", renamed),
        (old_ema, renamed),
    ):
        (ema.parent / "config.json").write_text(json.dumps(stored))
        load(ema)
        warnings.append(caplog.messages[:])
        caplog.clear()
    assert [len(messages) for messages in warnings] == [0, 1, 0]
    assert f"{folder / 'ema.safetensors'} was saved with another config.json" in warnings[1][0]
    assert "\n" not in warnings[1][0]


def test_ema_of_another_run_in_a_checkpoint_is_rejected(run):
    folder = run / "checkpoints/0000002"
    shutil.copy(folder / "ema-0.5.safetensors", folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has changed since it was saved"):
        load(run)
