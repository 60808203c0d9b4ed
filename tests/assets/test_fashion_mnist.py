"""The bundled data has the properties that assets/fashion-mnist/README.md states."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from assets.build_fashion_mnist import CLASS_NAMES, compute_psnr
from evaluations.fashion import load_classifier
from models.autoencoder import Autoencoder
from preprocessing.images import load_square
from preprocessing.sources import open_source
from tests.helpers import ROOT

FOLDER = ROOT / "assets" / "fashion-mnist"
MEASUREMENTS = json.loads((FOLDER / "figures.json").read_text())


@pytest.fixture(scope="module")
def subset():
    """Return every 20th image, (500, 3, 32, 32) uint8, and the labels."""
    source = open_source(FOLDER / "images.zip")
    image_indices = range(0, 10_000, 20)
    images = np.stack([load_square(source, image_index, 32) for image_index in image_indices])
    return torch.from_numpy(images), torch.from_numpy(source.labels[::20])


def test_zip_contains_rgb_pngs_in_the_layout_of_edm():
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        content = json.loads(archive.read("dataset.json"))
        name, label = content["labels"][1234]
        image = Image.open(io.BytesIO(archive.read(name)))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    assert name.split("/")[0] == str(label)
    assert content["class_names"] == CLASS_NAMES
    counts = np.bincount([label for _, label in content["labels"]])
    assert counts.tolist() == [1000] * 10


def test_files_are_smaller_than_ten_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 10_000_000


def test_autoencoder_reaches_the_stated_psnr(subset):
    vae = Autoencoder(str(FOLDER / "vae"))
    images, _ = subset
    moments = vae.encode(images)
    assert moments.shape[1:] == (8, 8, 8)
    decoded = vae.decode(vae.scale.mean(moments))
    mse = ((decoded.float() - images.float()) / 127.5).square().mean().item()
    stated = MEASUREMENTS["vae_psnr_db_of_mean_error"]
    assert stated >= 26 and compute_psnr(mse) == pytest.approx(stated, abs=0.5)


def test_scaled_latents_have_unit_standard_deviation(subset):
    vae = Autoencoder(str(FOLDER / "vae"))
    moments = vae.encode(subset[0])
    noise = torch.randn((500, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert vae.scale.sample(moments, noise).std().item() == pytest.approx(1, abs=0.03)


def test_classifier_reaches_the_stated_accuracy(subset):
    images, labels = subset
    features = load_classifier()(images)
    assert features.pool.shape == (500, 128)
    accuracy = (features.scores.argmax(1) == labels).float().mean().item()
    stated = MEASUREMENTS["classifier_accuracy"]
    assert stated >= 0.91 and accuracy == pytest.approx(stated, abs=0.03)


def test_readme_states_the_measurements():
    readme = (FOLDER / "README.md").read_text()
    assert f"{MEASUREMENTS['vae_psnr_db_of_mean_error']:.2f} dB" in readme
    assert f"{MEASUREMENTS['classifier_accuracy']:.1%}" in readme


def test_license_is_included():
    assert "Permission is hereby granted" in (FOLDER / "LICENSE").read_text()


def test_classifier_rejects_other_image_sizes():
    with pytest.raises(ValueError, match="needs 3x32x32 images, got 3x64x64"):
        load_classifier()(torch.zeros(1, 3, 64, 64))
