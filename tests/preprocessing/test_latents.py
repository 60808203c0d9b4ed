"""Latents of other VAEs: what their configs say reaches training and sampling."""

import json

import numpy as np
import pytest
import torch

import sample_ddp
import train
from latents.cache import LatentCache
from models.autoencoder import Autoencoder, LatentScale, read_latent_scale
from models.errors import FieldError
from preprocessing import encode_latents
from tests.helpers import make_tree, make_vae, train_flags

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.5, 2.0, 1.0]
SHAPES = {  # factor, channels, and what the configs of the real ones say
    "sd3": (
        8,
        16,
        {
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "f16d32": (16, 32, {"scaling_factor": 1.0, "shift_factor": None}),
    "by channel": (
        8,
        4,
        {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": MEAN, "latents_std": STD},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_images_to_training(call, tmp_path, name):
    factor, channels, config = SHAPES[name]
    vae = make_vae(tmp_path / "vae", latent_channels=channels, blocks=factor.bit_length(), **config)
    source = make_tree(tmp_path / "tree", images=6, side=4 * factor)
    given = [
        "--source",
        source,
        "--dest",
        tmp_path / "data",
        "--resolution",
        4 * factor,
        "--vae",
        vae,
        "--num-workers",
        0,
    ]
    code, out = call(encode_latents, *given)
    assert code == 0 and f"latents {channels}x4x4" in out
    cache = LatentCache(tmp_path / "data")
    moments = cache.gather(np.arange(6))[0].float()
    latent = LatentScale(cache.manifest.scale, cache.manifest.shift).mean(moments)
    z = moments[:, :channels].double().numpy()
    if name == "by channel":
        z = (z - np.reshape(MEAN, (4, 1, 1))) / np.reshape(STD, (4, 1, 1)) * 0.5
    else:
        z = (z - (config["shift_factor"] or 0)) * config["scaling_factor"]
    np.testing.assert_allclose(latent.numpy(), z, rtol=1e-5, atol=1e-6)
    code, out = call(
        train, *train_flags(tmp_path / "data", tmp_path, "run", "--max-train-steps", 2)
    )
    assert code == 0, out
    config = json.loads(next(tmp_path.glob("run/checkpoints/0000002/config.json")).read_text())
    assert (
        f'"out": {4 * channels}' in json.dumps(config)
        and config["data"]["scale"] == cache.manifest.scale
    )


def test_512_pixels_from_images_to_samples(call, tmp_path):
    """Latents of 64 x 64: 1,024 tokens."""
    vae, source = (
        make_vae(tmp_path / "vae", blocks=4, mid_block_add_attention=False),
        make_tree(tmp_path / "tree", images=2, side=512),
    )
    given = [
        "--source",
        source,
        "--dest",
        tmp_path / "data",
        "--resolution",
        512,
        "--vae",
        vae,
        "--num-workers",
        0,
    ]
    assert call(encode_latents, *given)[0] == 0
    given = train_flags(
        tmp_path / "data", tmp_path, "run", "--max-train-steps", 1, "--batch-size", 1
    )
    code, out = call(train, *given)
    assert code == 0, out
    given = [
        "--ckpt",
        tmp_path / "run",
        "--num-fid-samples",
        1,
        "--num-steps",
        1,
        "--per-proc-batch-size",
        1,
    ]
    code, out = call(sample_ddp, *given, "--mode", "ode", "--sample-dir", tmp_path / "samples")
    assert code == 0, out
    (path,) = (tmp_path / "samples").rglob("*.npz")
    assert np.load(path)["arr_0"].shape == (1, 512, 512, 3)


def test_by_channel_as_diffusers_pipelines_do_it():
    """(z - mean) * factor / std, and back; a number for all channels is what it was, to the bit."""
    config = {"scaling_factor": 0.5, "latent_channels": 4, "latents_mean": MEAN, "latents_std": STD}
    scale, z = (
        read_latent_scale(config),
        torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)),
    )
    mean, std = (torch.tensor(value).view(1, 4, 1, 1) for value in (MEAN, STD))
    torch.testing.assert_close(scale.normalize(z), (z - mean) * 0.5 / std)
    torch.testing.assert_close(scale.denormalize(z), z * std / 0.5 + mean)
    assert read_latent_scale(config | {"latents_std": None}) == LatentScale(
        0.5
    )  # diffusers heeds them together or not at all
    assert torch.equal(LatentScale(0.7, 0.25).normalize(z), (z - 0.25) * 0.7)
    assert torch.equal(LatentScale([0.7] * 4, [0.25] * 4).normalize(z), (z - 0.25) * 0.7)


def test_a_vae_that_would_be_misread_is_refused(tmp_path):
    both = {"latents_mean": MEAN, "latents_std": STD}
    for name, config, message in (
        ("both", both, "both shift_factor and latents_mean"),
        (
            "short",
            both | {"latents_mean": MEAN[:3], "shift_factor": None},
            "must each have 4 numbers",
        ),
    ):
        with pytest.raises(FieldError, match=message):
            Autoencoder(str(make_vae(tmp_path / name, **config)))
    folder = make_vae(tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        (
            {"_class_name": "AutoencoderKLFlux2"},
            "is of class AutoencoderKLFlux2; choose an AutoencoderKL",
        ),
        ({"layers_per_block": 2}, "lacks weights that its config requires, for example decoder"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(FieldError, match=message):
            Autoencoder(str(folder))
    one = Autoencoder(str(make_vae(tmp_path / "one", shift=None)))
    by_channel = Autoencoder(str(make_vae(tmp_path / "by-channel", shift=None, **both)))
    assert one.fingerprint() != by_channel.fingerprint()
