import pytest
import torch

from models.autoencoder import Autoencoder, LatentScale
from tests.helpers import make_vae


@pytest.fixture(scope="module")
def vae(vae_folder):
    return Autoencoder(str(vae_folder))


def pictures(n=3):
    return torch.randint(
        0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_moments_are_diffusers_posterior_of_images_in_minus_one_to_one(vae):
    from diffusers import AutoencoderKL

    oracle = AutoencoderKL.from_pretrained(vae.name).eval()
    with torch.no_grad():
        posterior = oracle.encode(pictures().float() / 255 * 2 - 1).latent_dist
    mean, std = vae.encode(pictures()).chunk(2, 1)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std, rtol=1e-4, atol=1e-5)


def test_decoding_undoes_scale_and_shift_and_rounds(vae):
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = vae.vae.decode(latent / 0.7 + 0.25).sample
    expected = ((images.double() + 1) * 127.5).clamp(0, 255)
    ours = vae.decode(latent).double()
    assert (ours - expected).abs().max() <= 0.5 + 1e-3  # truncation would be off by up to 1
    assert vae.decode(latent).dtype == torch.uint8 and vae.decode(latent).shape == (2, 3, 32, 32)


def test_latents_from_moments():
    scale = LatentScale(0.7, 0.25)
    moments, noise = torch.randn(2, 8, 4, 4).half(), torch.randn(2, 4, 4, 4)
    mean, std = moments.float().chunk(2, 1)
    torch.testing.assert_close(scale.mean(moments), (mean - 0.25) * 0.7)
    torch.testing.assert_close(scale.sample(moments, noise), (mean + std * noise - 0.25) * 0.7)
    torch.testing.assert_close(scale.denormalize(scale.normalize(mean)), mean)


def test_fingerprint_sees_weights_and_scale(vae, tmp_path):
    assert vae.fingerprint() == Autoencoder(vae.name).fingerprint()
    others = [make_vae(tmp_path / "weights", seed=1), make_vae(tmp_path / "shift", shift=0.5)]
    assert (
        len({vae.fingerprint(), *(Autoencoder(str(other)).fingerprint() for other in others)}) == 3
    )


@pytest.mark.parametrize("name", ["nobody/no-such-vae", "stabilityai/sd-vae-ft-mse"])
def test_a_missing_download_says_what_to_fetch_and_where_to_put_it(name):
    with pytest.raises(
        FileNotFoundError,
        match=rf"--vae {name} cannot be loaded.*hf download {name} --local-dir FOLDER.*--vae FOLDER",
    ):
        Autoencoder(name)


def test_a_folder_that_is_no_vae_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no diffusers folder: config\.json is missing"):
        Autoencoder(str(tmp_path))
