import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sample_ddp
from models.sit import SiT
from tests.helpers import make_vae, torchrun


def flags(trained, folder, *more):
    return [
        "--ckpt",
        trained,
        "--sample-dir",
        folder,
        "--num-fid-samples",
        11,
        "--num-steps",
        3,
        "--per-proc-batch-size",
        4,
        *more,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trained):
    """A copy, woken up: two steps leave a model whose output is next to nothing, and noise would pass for a result."""
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(trained, tmp_path_factory.mktemp("awake") / "trained")
    path = run / "checkpoints/0000002/ema.safetensors"
    generator = torch.Generator().manual_seed(0)
    state = load_file(path)
    save_file({k: v + 0.1 * torch.randn(v.shape, generator=generator) if "pos" not in k else v for k, v in state.items()}, path)
    return run


def images(folder, name="s"):
    with np.load(folder / f"{name}.npz") as content:
        return content["arr_0"], content["arr_1"]


def test_adm_npz_grid_and_record(call, trained, tmp_path):
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--labels", "balanced", "--cfg-scale", 2.0))
    assert code == 0, out
    name = "trained-0000002-euler-maruyama3-cfg2-seed0"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.npz", f"{name}.png"]
    pixels, labels = images(tmp_path, name)
    assert pixels.shape == (11, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (record["solver"], record["num_steps"], record["cfg_scale"], record["step"], record["images_seen"]) == (
        "euler-maruyama", 3, 2.0, 2, 16,
    )  # fmt: skip
    assert Image.open(tmp_path / f"{name}.png").width > 4 * 64


@pytest.mark.parametrize("mode", [["--mode", "sde"], ["--mode", "ode"], ["--mode", "ode", "--heun"]])
def test_an_image_depends_on_seed_and_index_alone(call, trained, tmp_path, mode):
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s", *mode))[0] == 0
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "few", *mode), "--num-fid-samples", 6)[0] == 0
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "other", *mode), "--global-seed", 1)[0] == 0
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "batch", *mode), "--per-proc-batch-size", 7)[0] == 0
    whole, few, other, batch = (images(tmp_path, name)[0].astype(int) for name in ("s", "few", "other", "batch"))
    assert np.array_equal(whole[:6], few)
    assert np.abs(whole - batch).max() <= 1  # another batch size makes other kernels
    assert all((a != b).mean() > 0.5 for a, b in zip(whole, other))
    assert len({image.tobytes() for image in whole}) == 11


def test_two_processes_give_the_images_of_one(trained, tmp_path):
    torchrun(1, "sample_ddp.py", *flags(trained, tmp_path, "--name", "one"))
    torchrun(2, "sample_ddp.py", *flags(trained, tmp_path, "--name", "two"))
    for a, b in zip(images(tmp_path, "one"), images(tmp_path, "two")):
        assert np.array_equal(a, b)


def test_interrupted_sampling_goes_on_and_leftovers_are_refused(call, trained, tmp_path, monkeypatch):
    latents, done = sample_ddp.Recipe.latents, []

    def interrupted(*args):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return latents(*args)

    monkeypatch.setattr(sample_ddp.Recipe, "latents", interrupted)
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 130
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "s"), "--num-steps", 4)
    assert code == 2 and "num_steps was 3, is 4" in out
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 0
    assert len(done) == 4  # two before, the interrupted one again
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))
    assert code == 0 and "is complete" in out and len(done) == 4
    (tmp_path / "s.npz").unlink()  # the remedy that the message names works
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"), "--num-steps", 4)[0] == 0
    (tmp_path / "s.npz").unlink()
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 0
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "whole"))[0] == 0
    assert np.array_equal(images(tmp_path)[0], images(tmp_path, "whole")[0])


def test_a_checkpoint_trained_anew_in_the_same_place_is_another(call, trained, tmp_path):

    from safetensors.torch import load_file, save_file

    run = shutil.copytree(trained, tmp_path / "run")
    assert call(sample_ddp, *flags(run, tmp_path, "--name", "s"))[0] == 0
    path = run / "checkpoints/0000002/ema.safetensors"
    save_file({key: value * 1.5 for key, value in load_file(path).items()}, path)
    code, out = call(sample_ddp, *flags(run, tmp_path, "--name", "s"))
    assert code == 2 and "ema_sha256 was" in out


def test_samples_are_those_of_a_plain_loop(call, trained, tmp_path):
    """The shortest way from checkpoint to picture, written out: ODE, two Euler steps."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    from keyed_random import Purpose, normal
    from models.sit import SiTConfig

    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "s", "--mode", "ode", "--labels", "balanced"), "--num-steps", 2)[0]
        == 0
    )
    config = json.loads((trained / "checkpoints/0000002/config.json").read_text())
    model = SiT(SiTConfig(**config["model"]))
    model.load_state_dict(load_file(trained / "checkpoints/0000002/ema.safetensors"))
    vae = AutoencoderKL.from_pretrained(config["data"]["vae"])
    x = normal(0, Purpose.START, torch.arange(3), (4, 8, 8)).float()
    with torch.no_grad():
        for t in (1.0, 0.5):
            x = x - 0.5 * model(x, torch.full((3,), t), torch.arange(3))
        decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = (decoded * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(images(tmp_path)[0][:3] - expected.numpy()).max() <= 0.51


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ckpt", "/nonexistent"], "--ckpt /nonexistent: /nonexistent is neither a run"),
        (["--cfg-scale", 0.5], "--cfg-scale 0.5 is below 1"),
        (["--guidance-low", 0.7, "--guidance-high", 0.3], "--guidance-low 0.7 lies above"),
        (["--cfg-scale", "nan"], "nan is not a number of at least 0"),
        (["--heun"], "add --mode ode"),
        (["--num-steps", 1], "--num-steps 1 is too few"),
        (["--vae", "/nonexistent/vae"], "--vae /nonexistent/vae: there is no such folder"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(call, trained, tmp_path, more, message):
    code, out = call(sample_ddp, *flags(trained, tmp_path / "out"), *more)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_vae_than_the_training_latents_is_refused(call, trained, tmp_path):
    other = make_vae(tmp_path / "vae", seed=1)
    code, out = call(sample_ddp, *flags(trained, tmp_path / "out", "--vae", other))
    assert code == 2 and "not the one that made the training latents" in out
