"""Imported caches contain the moments of a folder that was written by REPA's dataset_tools.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latents.cache import LatentCache
from latents.manifest import read_manifest
from models.autoencoder import Autoencoder
from preprocessing import import_repa, verify
from tests.helpers import make_vae

SEVENTH = "00001/img-mean-std-00000007.npy"


def make_repa_folder(root, vae, num_images=12):
    """Write images, moments, and a dataset.json with unordered rows; return the moments."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)
    moments = Autoencoder(str(vae)).encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    labels = []
    for i in range(num_images):
        subfolder = f"{i // 5:05d}"
        for folder in (root / "images" / subfolder, root / "vae-sd" / subfolder):
            folder.mkdir(parents=True, exist_ok=True)
        name = f"{subfolder}/img-mean-std-{i:08d}.npy"
        Image.fromarray(pixels[i]).save(root / "images" / subfolder / f"img{i:08d}.png")
        np.save(root / "vae-sd" / name, moments[i])
        labels.append([name, i % 4])
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return moments


@pytest.fixture
def repa(tmp_path, vae_folder):
    return tmp_path / "repa", make_repa_folder(tmp_path / "repa", vae_folder)


def test_imported_cache_contains_moments_and_labels(call, repa, vae_folder, tmp_path):
    root, moments = repa
    flags = [root, tmp_path / "data", "--vae", vae_folder, "--shard-size", 5]
    code, out = call(import_repa, *flags)
    assert code == 0 and "12 images, 4 classes, latents 4x8x8" in out and "PSNR" in out
    assert (tmp_path / "data/preview.png").exists()
    cache = LatentCache(tmp_path / "data")
    stored, labels = cache.gather(np.arange(12))
    np.testing.assert_array_equal(stored.numpy(), moments.astype(np.float16))
    assert labels.tolist() == [i % 4 for i in range(12)]
    manifest = cache.manifest
    assert (manifest.resolution, manifest.scale, manifest.shift) == (32, 0.7, 0.25)
    assert len(manifest.shards) == 3
    assert manifest.vae_fingerprint == Autoencoder(str(vae_folder)).fingerprint()
    assert "complete: 12 images" in call(import_repa, *flags)[1]


def test_verify_repairs_an_imported_cache(call, repa, vae_folder, tmp_path):
    dest = tmp_path / "data"
    call(import_repa, repa[0], dest, "--vae", vae_folder, "--shard-size", 5)
    assert call(verify, dest)[0] == 0
    (dest / "moments/00001.npy").unlink()
    assert call(verify, dest, "--repair")[0] == 0
    assert call(verify, dest)[0] == 0


def test_float32_import_of_the_moments_folder_is_exact(call, repa, vae_folder, tmp_path):
    root, moments = repa
    flags = [root / "vae-sd", tmp_path / "data", "--vae", vae_folder, "--dtype", "float32"]
    assert call(import_repa, *flags)[0] == 0
    stored, _ = LatentCache(tmp_path / "data").gather(np.arange(12))
    np.testing.assert_array_equal(stored.numpy(), moments)


def test_sampled_latents_are_rejected(call, repa, vae_folder, tmp_path):
    for i in range(12):
        path = repa[0] / f"vae-sd/{i // 5:05d}/img-mean-std-{i:08d}.npy"
        np.save(path, np.zeros((4, 8, 8), np.float32))
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder)
    assert code == 2 and "has 4 channels; it is a sampled latent" in out
    assert "encode the images" in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_shape_is_not_determined_by_the_first_file(call, repa, vae_folder, tmp_path):
    np.save(repa[0] / "vae-sd/00000/img-mean-std-00000000.npy", np.zeros((4, 8, 8), np.float32))
    flags = [repa[0], tmp_path / "data", "--vae", vae_folder]
    code, out = call(import_repa, *flags)
    reason = "(its shape is (4, 8, 8), others have (8, 8, 8))"
    assert code == 2 and f"00000000.npy cannot be used {reason}" in out
    assert call(import_repa, *flags, "--skip-bad")[0] == 0
    assert read_manifest(tmp_path / "data").count == 11


def test_wrong_vae_has_poor_psnr(call, repa, tmp_path):
    vae = make_vae(tmp_path / "vae", seed=3)
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae)
    assert code == 0 and "poor reconstructions" in out


def test_vae_with_other_channels_is_rejected(call, repa, tmp_path):
    vae = make_vae(tmp_path / "wide", latent_channels=8)
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae)
    assert code == 2 and "has 8 channels" in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / SEVENTH).write_bytes(b"\x93NUMPY"),
            "00000007.npy cannot be used (ValueError",
        ),
        (
            lambda root: np.save(root / SEVENTH, np.zeros((8, 4, 4))),
            "00000007.npy cannot be used (its shape is (8, 4, 4), others have",
        ),
        (
            lambda root: np.save(root / SEVENTH, np.full((8, 8, 8), -3.0)),
            "00000007.npy cannot be used (negative standard deviations: are these log-variances?",
        ),
        (
            lambda root: np.save(root / SEVENTH, np.array(["a"])),
            "00000007.npy cannot be used (it is no array of floating-point",
        ),
        (
            lambda root: np.save(root / SEVENTH, np.full((8, 8, 8), 1e6)),
            "00000007.npy cannot be used (it has values that float16 cannot hold)",
        ),
    ],
)
def test_unusable_file_gives_an_error_or_is_skipped(
    call, repa, vae_folder, tmp_path, damage, message
):
    damage(repa[0] / "vae-sd")
    flags = [repa[0], tmp_path / "data", "--vae", vae_folder]
    code, out = call(import_repa, *flags)
    assert code == 2 and message in out and "Traceback" not in out, out
    code, out = call(import_repa, *flags, "--skip-bad")
    assert code == 0 and "1 skipped" in out and read_manifest(tmp_path / "data").count == 11


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: np.save(root / "00001/img-mean-std-00000099.npy", np.zeros((8, 8, 8))),
            "has no label for 00001/img-mean-std-0000",
        ),
        (lambda root: (root / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda root: (root / SEVENTH).unlink(), f"lists missing files: {SEVENTH}; check that"),
        (lambda root: (root / "dataset.json").write_text("{"), "does not have the format {"),
        (lambda root: root.rename(root.parent.parent / "moved"), "contains no .npy files"),
    ],
)
def test_invalid_folder_gives_an_error(call, repa, vae_folder, tmp_path, damage, message):
    damage(repa[0] / "vae-sd")
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder)
    assert code == 2 and message in out and "Traceback" not in out, out
