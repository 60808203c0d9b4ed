"""Test encoding, decoding, normalization and errors of the autoencoder."""

import shutil

import pytest
import torch

from models.autoencoder import VAE_ALIASES, Autoencoder, LatentScale
from models.errors import FieldError
from tests.helpers import LFS_POINTER, make_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae(vae_folder):
    return Autoencoder(str(vae_folder))


def make_images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_moments_equal_the_posterior_of_diffusers_for_pixels_from_minus_one_to_one(vae):
    from diffusers import AutoencoderKL

    reference = AutoencoderKL.from_pretrained(vae.name).eval()
    with torch.no_grad():
        posterior = reference.encode(make_images().float() / 255 * 2 - 1).latent_dist
    mean, std = vae.encode(make_images()).chunk(2, 1)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std, rtol=1e-4, atol=1e-5)


def test_decode_inverts_scale_and_shift_and_rounds_to_nearest(vae):
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = vae.vae.decode(latent / 0.7 + 0.25).sample
    expected = ((pixels.double() + 1) * 127.5).clamp(0, 255)
    decoded = vae.decode(latent)
    assert decoded.dtype == torch.uint8 and decoded.shape == (2, 3, 32, 32)
    # Truncation would cause errors of up to 1.
    assert (decoded.double() - expected).abs().max() <= 0.5 + 1e-3


def test_latents_are_normalized_moments():
    scale = LatentScale(0.7, 0.25)
    moments = torch.randn(2, 8, 4, 4).half()
    noise = torch.randn(2, 4, 4, 4)
    mean, std = moments.float().chunk(2, 1)
    torch.testing.assert_close(scale.mean(moments), (mean - 0.25) * 0.7)
    torch.testing.assert_close(scale.sample(moments, noise), (mean + std * noise - 0.25) * 0.7)
    torch.testing.assert_close(scale.denormalize(scale.normalize(mean)), mean)


def test_fingerprint_depends_on_weights_and_scale(vae, tmp_path):
    assert vae.fingerprint() == Autoencoder(vae.name).fingerprint()
    other_weights = Autoencoder(str(make_vae(tmp_path / "weights", seed=1)))
    other_shift = Autoencoder(str(make_vae(tmp_path / "shift", shift=0.5)))
    fingerprints = {other.fingerprint() for other in (vae, other_weights, other_shift)}
    assert len(fingerprints) == 3


@pytest.mark.parametrize("name", ["nobody/no-such-vae", "stabilityai/sd-vae-ft-mse"])
def test_error_of_a_missing_vae_contains_the_download_command(name):
    command = rf"hf download {name} --local-dir FOLDER', then pass FOLDER"
    message = rf"{name} cannot be loaded.*contains no such folder.*{command}"
    with pytest.raises(FieldError, match=message) as error:
        Autoencoder(name)
    assert error.value.field == "vae" and "\n" not in error.value.reason


def test_folder_without_a_vae_is_rejected(tmp_path):
    with pytest.raises(FieldError, match=r"not a diffusers folder: config\.json is missing"):
        Autoencoder(str(tmp_path))


def move_to_subfolder(folder):
    shutil.copytree(folder, folder / "vae")
    (folder / "config.json").unlink()


def rename_to_fp16(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            move_to_subfolder,
            "FOLDER is a diffusers pipeline; choose its VAE, FOLDER/vae",
        ),
        (
            rename_to_fp16,
            "FOLDER contains config.json, diffusion_pytorch_model.fp16.safetensors but not "
            f"{WEIGHTS}, the float32 weights; add this file",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "FOLDER contains config.json but not"),
        (
            lambda folder: (folder / WEIGHTS).write_text(LFS_POINTER),
            f"FOLDER/{WEIGHTS} is a Git LFS pointer instead of the file itself: run 'git lfs pull'",
        ),
        (
            lambda folder: (folder / "config.json").write_text(LFS_POINTER),
            "FOLDER/config.json is a Git LFS pointer",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(bytes(1000)),
            "FOLDER cannot be loaded (Unable to load weights from checkpoint file",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "FOLDER cannot be loaded (It looks like the config file",
        ),
    ],
)
def test_error_of_an_unusable_folder_describes_its_contents(vae_folder, tmp_path, change, expected):
    folder = shutil.copytree(vae_folder, tmp_path / "copy")
    change(folder)
    with pytest.raises(FieldError) as error:
        Autoencoder(str(folder))
    assert error.value.reason.startswith(expected.replace("FOLDER", str(folder)))
    assert "hf download" not in error.value.reason and "\n" not in error.value.reason


def test_file_of_weights_is_rejected_as_a_vae(vae_folder):
    with pytest.raises(FieldError, match=rf"{WEIGHTS} is a file; choose a diffusers folder"):
        Autoencoder(str(vae_folder / WEIGHTS))


def test_short_names_of_vaes_are_those_of_repa(vae_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(VAE_ALIASES, "ema", str(vae_folder))
    assert Autoencoder("ema").name == str(vae_folder)
    (tmp_path / "ema").symlink_to(vae_folder)
    assert Autoencoder("ema").name == "ema"  # an existing folder takes precedence
