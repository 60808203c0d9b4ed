"""Caches and training use the scale, shift and shape that the config of a VAE specifies."""

import json

import numpy as np
import pytest
import torch

import sample_ddp
import train
from latents.cache import LatentCache
from latents.manifest import read_manifest
from models.autoencoder import Autoencoder, LatentScale, read_latent_scale
from models.errors import FieldError
from preprocessing import encode_latents
from tests.helpers import make_tree, make_vae, train_flags

MEAN = [0.1, -0.2, 0.3, 0.0]
STD = [0.5, 1.5, 2.0, 1.0]
SD3 = {
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
F16D32 = {"scaling_factor": 1.0, "shift_factor": None}
PER_CHANNEL = {
    "scaling_factor": 0.5,
    "shift_factor": None,
    "latents_mean": MEAN,
    "latents_std": STD,
}


def encode(call, tmp_path, vae, images, side):
    source = make_tree(tmp_path / "tree", images=images, side=side)
    flags = ["--source", source, "--dest", tmp_path / "data", "--resolution", side, "--vae", vae]
    return call(encode_latents, *flags, "--num-workers", 0)


@pytest.mark.parametrize(
    ("factor", "channels", "config"),
    [
        (8, 16, SD3),
        pytest.param(16, 32, F16D32, marks=pytest.mark.long),
        (8, 4, PER_CHANNEL),
    ],
)
def test_latents_are_scaled_as_the_config_specifies(call, tmp_path, factor, channels, config):
    vae = make_vae(tmp_path / "vae", latent_channels=channels, blocks=factor.bit_length(), **config)
    code, out = encode(call, tmp_path, vae, images=6, side=4 * factor)
    assert code == 0 and f"latents {channels}x4x4" in out
    cache = LatentCache(tmp_path / "data")
    moments = cache.gather(np.arange(6))[0].float()
    latent = LatentScale(cache.manifest.scale, cache.manifest.shift).mean(moments)
    expected = moments[:, :channels].double().numpy()
    if "latents_mean" in config:
        mean, std = np.reshape(MEAN, (4, 1, 1)), np.reshape(STD, (4, 1, 1))
        expected = (expected - mean) / std * 0.5
    else:
        expected = (expected - (config["shift_factor"] or 0)) * config["scaling_factor"]
    np.testing.assert_allclose(latent.numpy(), expected, rtol=1e-5, atol=1e-6)

    flags = train_flags(tmp_path / "data", tmp_path, "run", "--max-train-steps", 2)
    code, out = call(train, *flags)
    assert code == 0, out
    config_json = json.loads((tmp_path / "run/checkpoints/0000002/config.json").read_text())
    assert f'"out": {4 * channels}' in json.dumps(config_json)
    assert config_json["data"]["scale"] == cache.manifest.scale


def test_images_of_512_pixels_are_encoded_trained_on_and_sampled(call, tmp_path):
    """Latents of 64 x 64 correspond to 1,024 tokens."""
    vae = make_vae(tmp_path / "vae", blocks=4, mid_block_add_attention=False)
    code, out = encode(call, tmp_path, vae, images=2, side=512)
    assert code == 0, out
    options = ("--max-train-steps", 1, "--batch-size", 1)
    code, out = call(train, *train_flags(tmp_path / "data", tmp_path, "run", *options))
    assert code == 0, out
    flags = ["--ckpt", tmp_path / "run", "--sample-dir", tmp_path / "samples", "--mode", "ode"]
    flags += ["--num-fid-samples", 1, "--num-steps", 1, "--per-proc-batch-size", 1]
    code, out = call(sample_ddp, *flags)
    assert code == 0, out
    (path,) = (tmp_path / "samples").rglob("*.npz")
    assert np.load(path)["arr_0"].shape == (1, 512, 512, 3)


def test_scale_per_channel_equals_that_of_diffusers_pipelines():
    """The pipelines compute (z - mean) * factor / std. A scale for all channels is exact."""
    config = {"scaling_factor": 0.5, "latent_channels": 4, "latents_mean": MEAN, "latents_std": STD}
    scale = read_latent_scale(config, "vae")
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(1, 4, 1, 1) for value in (MEAN, STD))
    torch.testing.assert_close(scale.normalize(z), (z - mean) * 0.5 / std)
    torch.testing.assert_close(scale.denormalize(z), z * std / 0.5 + mean)
    # diffusers uses mean and std only if the config contains both.
    assert read_latent_scale(config | {"latents_std": None}, "vae") == LatentScale(0.5)
    assert torch.equal(LatentScale(0.7, 0.25).normalize(z), (z - 0.25) * 0.7)
    assert torch.equal(LatentScale([0.7] * 4, [0.25] * 4).normalize(z), (z - 0.25) * 0.7)


MEAN_AND_STD = {"latents_mean": MEAN, "latents_std": STD}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MEAN_AND_STD, "both shift_factor and latents_mean"),
        (MEAN_AND_STD | {"latents_mean": MEAN[:3], "shift_factor": None}, "4 numbers"),
    ],
)
def test_ambiguous_scale_is_refused(tmp_path, config, message):
    with pytest.raises(FieldError, match=message):
        Autoencoder(str(make_vae(tmp_path / "vae", **config)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKLFlux2"}, "AutoencoderKLFlux2.* AutoencoderKL"),
        ({"layers_per_block": 2}, "decoder"),
    ],
)
def test_vae_of_another_architecture_is_refused(tmp_path, changes, message):
    folder = make_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FieldError, match=message):
        Autoencoder(str(folder))


def test_fingerprint_depends_on_the_scale_per_channel(tmp_path):
    single = Autoencoder(str(make_vae(tmp_path / "single", shift=None)))
    per_channel = Autoencoder(str(make_vae(tmp_path / "per-channel", shift=None, **MEAN_AND_STD)))
    assert single.fingerprint() != per_channel.fingerprint()


def test_relative_path_of_the_vae_is_valid_in_other_directories(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(vae_folder.parent)
    flags = ["--source", tree, "--dest", tmp_path / "data", "--resolution", 32, "--limit", 2]
    assert call(encode_latents, *flags, "--vae", vae_folder.name)[0] == 0
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data/manifest.json"
    assert json.loads(path.read_text())["vae"] == str(vae_folder)
    # Older manifests contain the relative path.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": vae_folder.name}))
    assert read_manifest(tmp_path / "data").vae == str(vae_folder)
    monkeypatch.chdir(vae_folder.parent)
    assert read_manifest(tmp_path / "data").vae == vae_folder.name
