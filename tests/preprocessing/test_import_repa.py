"""A tree as REPA's dataset_tools.py writes it becomes a cache of the same moments."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latents.cache import LatentCache, read_manifest
from models.autoencoder import Autoencoder
from preprocessing import import_repa, verify
from tests.helpers import make_vae

SEVENTH = "00001/img-mean-std-00000007.npy"


def make_repa_folder(root, vae, images=12):
    """images/00000/img00000000.png and vae-sd/00000/img-mean-std-00000000.npy, and in dataset.json the classes, out of order.
    Returns the moments."""
    rng, labels = np.random.default_rng(0), []
    pixels = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    moments = Autoencoder(str(vae)).encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    for i in range(images):
        for room, name in (("images", f"img{i:08d}.png"), ("vae-sd", f"img-mean-std-{i:08d}.npy")):
            (root / room / f"{i // 5:05d}").mkdir(parents=True, exist_ok=True)
            path = root / room / f"{i // 5:05d}" / name
            np.save(path, moments[i]) if room == "vae-sd" else Image.fromarray(pixels[i]).save(path)
        labels.append([f"{i // 5:05d}/img-mean-std-{i:08d}.npy", i % 4])
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return moments


@pytest.fixture
def repa(tmp_path, vae_folder):
    return tmp_path / "repa", make_repa_folder(tmp_path / "repa", vae_folder)


def test_a_tree_becomes_a_cache(call, repa, vae_folder, tmp_path):
    root, moments = repa
    given = [root, tmp_path / "data", "--vae", vae_folder, "--shard-size", 5]
    code, out = call(import_repa, *given)
    assert code == 0 and "12 images, 4 classes, latents 4x8x8" in out and "PSNR" in out
    data = LatentCache(tmp_path / "data")
    stored, labels = data.gather(np.arange(12))
    np.testing.assert_array_equal(stored.numpy(), moments.astype(np.float16))
    assert labels.tolist() == [i % 4 for i in range(12)]
    manifest = data.manifest
    assert (manifest.resolution, manifest.scale, manifest.shift, len(manifest.shards)) == (
        32,
        0.7,
        0.25,
        3,
    )
    assert manifest.vae_fingerprint == Autoencoder(str(vae_folder)).fingerprint()
    assert "complete: 12 images" in call(import_repa, *given)[1]
    assert (tmp_path / "data/preview.png").exists() and call(verify, tmp_path / "data")[0] == 0
    (tmp_path / "data/moments/00001.npy").unlink()
    assert (
        call(verify, tmp_path / "data", "--repair")[0] == 0
        and call(verify, tmp_path / "data")[0] == 0
    )


def test_the_folder_itself_and_float32(call, repa, vae_folder, tmp_path):
    root, moments = repa
    code, _ = call(
        import_repa, root / "vae-sd", tmp_path / "data", "--vae", vae_folder, "--dtype", "float32"
    )
    assert code == 0
    np.testing.assert_array_equal(
        LatentCache(tmp_path / "data").gather(np.arange(12))[0].numpy(), moments
    )


def test_four_channels_are_refused_with_the_reason(call, repa, vae_folder, tmp_path):
    for i in range(12):
        np.save(
            repa[0] / f"vae-sd/{i // 5:05d}/img-mean-std-{i:08d}.npy",
            np.zeros((4, 8, 8), np.float32),
        )
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder)
    assert (
        code == 2
        and "has 4 channels: a latent, drawn and perhaps scaled" in out
        and "encode the images" in out
    )
    assert len(out.strip().splitlines()) == 1 and not (tmp_path / "data").exists()


def test_an_odd_first_file_is_the_odd_one(call, repa, vae_folder, tmp_path):
    np.save(repa[0] / "vae-sd/00000/img-mean-std-00000000.npy", np.zeros((4, 8, 8), np.float32))
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder)
    assert (
        code == 2
        and "00000000.npy cannot be used (its shape is (4, 8, 8), others have (8, 8, 8))" in out
    )
    assert call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder, "--skip-bad")[0] == 0
    assert read_manifest(tmp_path / "data").count == 11


def test_another_vae_is_seen(call, repa, tmp_path):
    code, out = call(
        import_repa, repa[0], tmp_path / "data", "--vae", make_vae(tmp_path / "vae", seed=3)
    )
    assert code == 0 and "poor" in out
    code, out = call(
        import_repa,
        repa[0],
        tmp_path / "b",
        "--vae",
        make_vae(tmp_path / "wide", latent_channels=8),
    )
    assert code == 2 and "has 8 channels" in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: (p / "00001/img-mean-std-00000007.npy").write_bytes(b"\x93NUMPY"),
            "00000007.npy cannot be used (ValueError",
        ),
        (
            lambda p: np.save(p / "00001/img-mean-std-00000007.npy", np.zeros((8, 4, 4))),
            "its shape is (8, 4, 4), others have",
        ),
        (
            lambda p: np.save(p / "00001/img-mean-std-00000007.npy", np.full((8, 8, 8), -3.0)),
            "are these log-variances?",
        ),
        (
            lambda p: np.save(p / "00001/img-mean-std-00000099.npy", np.zeros((8, 8, 8))),
            "has no label for 00001/img-mean-std-0000",
        ),
        (lambda p: (p / "dataset.json").unlink(), "dataset.json is missing"),
        (
            lambda p: (p / SEVENTH).unlink(),
            "names what is not there: 00001/img-mean-std-00000007.npy; is the tree whole?",
        ),
        (
            lambda p: np.save(p / SEVENTH, np.array(["a"])),
            "00000007.npy cannot be used (it is no array of floating-point",
        ),
        (
            lambda p: np.save(p / SEVENTH, np.full((8, 8, 8), 1e6)),
            "cannot be used (it has values that float16 cannot hold)",
        ),
        (lambda p: (p / "dataset.json").write_text("{"), "is not {"),
        (lambda p: p.rename(p.parent / "x"), "holds no .npy files"),
    ],
)
def test_faults_of_the_tree_are_named(call, repa, vae_folder, tmp_path, spoil, message):
    spoil(repa[0] / "vae-sd")
    if "holds no" in message:
        (repa[0] / "x").rename(tmp_path / "x")
    code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder)
    assert code == 2 and message in out and "Traceback" not in out, out
    if "cannot be used" in message or "its shape" in message:
        code, out = call(import_repa, repa[0], tmp_path / "data", "--vae", vae_folder, "--skip-bad")
        assert code == 0 and read_manifest(tmp_path / "data").count == 11 and "1 skipped" in out
