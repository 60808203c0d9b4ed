"""The embedded data: what assets/fashion-mnist/README.md says of it is true."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from assets.build_fashion_mnist import CLASS_NAMES, psnr
from evaluations.fashion import load_classifier
from models.autoencoder import Autoencoder
from preprocessing.images import load_square
from preprocessing.sources import open_source
from tests.helpers import ROOT

FOLDER = ROOT / "assets" / "fashion-mnist"


@pytest.fixture(scope="module")
def some():
    """500 images spread over the set, and their classes."""
    source = open_source(FOLDER / "images.zip")
    numbers = range(0, 10_000, 20)
    images = torch.from_numpy(np.stack([load_square(source, i, 32) for i in numbers]))
    return images, torch.from_numpy(source.labels[list(numbers)])


def test_zip_is_edms_with_rgb_pngs():
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        content = json.loads(archive.read("dataset.json"))
        assert len(content["labels"]) == 10_000 and content["class_names"] == CLASS_NAMES
        name, label = content["labels"][1234]
        image = Image.open(io.BytesIO(archive.read(name)))
        assert (image.format, image.mode, image.size, name.split("/")[0]) == (
            "PNG",
            "RGB",
            (32, 32),
            str(label),
        )
    counts = np.bincount([label for _, label in content["labels"]])
    assert counts.tolist() == [1000] * 10


def test_all_of_it_is_under_ten_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 10_000_000


def test_vae_and_latents_are_as_good_as_stated(some):
    vae = Autoencoder(str(FOLDER / "vae"))
    images = some[0]
    moments = vae.encode(images)
    assert moments.shape[1:] == (8, 8, 8)
    mean, std = moments.chunk(2, 1)
    decoded = vae.decode(vae.scale.normalize(mean))
    stated = json.loads((FOLDER / "figures.json").read_text())["vae_psnr_db_of_mean_error"]
    measured = psnr(((decoded.float() - images.float()) / 127.5).square().mean().item())
    assert measured == pytest.approx(stated, abs=0.5) and stated >= 26
    latent = vae.scale.normalize(
        mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    )
    assert latent.std().item() == pytest.approx(1, abs=0.03)


def test_classifier_is_as_good_as_stated(some):
    images, labels = some
    stated = json.loads((FOLDER / "figures.json").read_text())["classifier_accuracy"]
    features = load_classifier()(images)
    assert features.pool.shape == (500, 128)
    assert (features.scores.argmax(1) == labels).float().mean().item() == pytest.approx(
        stated, abs=0.03
    ) and stated >= 0.91


def test_readme_states_the_figures():
    text, figures = (
        (FOLDER / "README.md").read_text(),
        json.loads((FOLDER / "figures.json").read_text()),
    )
    assert (
        f"{figures['vae_psnr_db_of_mean_error']:.2f} dB" in text
        and f"{figures['classifier_accuracy']:.1%}" in text
    )
    assert re.search(r"Permission is hereby granted", (FOLDER / "LICENSE").read_text())


def test_classifier_refuses_other_sizes():
    with pytest.raises(ValueError, match="needs 3x32x32 images, got 3x64x64"):
        load_classifier()(torch.zeros(1, 3, 64, 64))
