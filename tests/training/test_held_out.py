"""The loss on held-out images: by definition, and on any number of processes."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.keyed_random import Purpose, normal
from latents.cache import LatentCache
from models.sit import PRESETS, SiT, SiTConfig
from sampling.recipe import Recipe
from training.held_out import SEED, TIMESTEPS, HeldOutLoss


@pytest.fixture(scope="module")
def model() -> SiT:
    """A network away from its initialization, where it predicts zero."""
    torch.manual_seed(0)
    network = SiT(SiTConfig(**PRESETS["SiT-Ti/2"] | {"depth": 1}, latent_size=8, num_classes=3))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


def measure(held_out: HeldOutLoss, model: SiT, **options) -> dict[str, float]:
    return held_out.measure(model, Recipe(), **{"batch_size": 24, **options})


@torch.no_grad()
def test_loss_is_the_mean_over_images_and_timesteps(cache, model):
    measured = measure(HeldOutLoss(cache, 100), model)
    data = LatentCache(cache)
    expected = dict.fromkeys(TIMESTEPS, 0.0)
    scale, shift = data.manifest.scale, data.manifest.shift
    shape = tuple(data.manifest.latent_shape)
    for i in range(24):
        index = torch.tensor([i])
        moments, labels = (value[0] for value in data.gather(index.numpy()))
        mean, std = moments.double().chunk(2)
        x = (mean + std * normal(SEED, Purpose.POSTERIOR, index, shape)[0] - shift) * scale
        for draw, t in enumerate(TIMESTEPS):
            eps = normal(SEED, Purpose.NOISE, index, shape, draw=draw)[0]
            x_t = ((1 - t) * x + t * eps)[None].float()
            velocity = model(x_t, torch.tensor([t]), labels[None])[0]
            expected[t] += (velocity - (eps - x)).square().mean().item() / 24
    mean = sum(expected.values()) / len(TIMESTEPS)
    per_timestep = {f"held_out_{t}": value for t, value in expected.items()}
    assert measured == pytest.approx({"held_out": mean, **per_timestep}, rel=1e-5)


def test_loss_depends_neither_on_batch_size_nor_on_number_of_processes(cache, model):
    held_out = HeldOutLoss(cache, 100)
    expected = pytest.approx(measure(held_out, model), rel=1e-6)
    assert measure(held_out, model, batch_size=5) == expected
    checks, shares = [], []
    for rank in range(3):
        # 24 images are four batches of five and one of four: the last process has an empty batch.
        measure(
            held_out,
            model,
            batch_size=5,
            share=(rank, 3),
            gather=lambda tensor: shares.append(tensor) or tensor,
            check_stop=partial(checks.append, rank),
        )
    # Processes that do not check together would wait for each other forever.
    assert checks.count(0) == checks.count(1) == checks.count(2) == 2
    assert measure(held_out, model, gather=lambda tensor: torch.cat(shares)) == expected


def test_fewer_images_are_evenly_spaced(cache):
    assert HeldOutLoss(cache, 5).image_index.tolist() == [0, 4, 9, 14, 19]
    for num_images in (24, 1000):
        assert HeldOutLoss(cache, num_images).image_index.tolist() == [*range(24)]


def test_image_with_non_finite_moments_is_reported(cache, tmp_path):
    folder = shutil.copytree(cache, tmp_path / "data")
    moments = np.load(folder / "moments/00001.npy")
    moments[7] = np.nan
    np.save(folder / "moments/00001.npy", moments)
    message = r"^--eval-latents: the moments of image 17 .*moments/00001\.npy.*verify"
    with pytest.raises(UserError, match=message):
        HeldOutLoss(folder, 24)
    HeldOutLoss(folder, 5)  # image 17 is not used


def test_incompatible_cache_is_refused(cache, tmp_path):
    manifest = LatentCache(cache).manifest
    HeldOutLoss(cache, 5).check_compatible(manifest)
    other = replace(manifest, class_names=manifest.class_names[::-1], shift=manifest.shift + 1)
    expected = r"^--eval-latents .* differs from --data-dir in class_names, shift: encode"
    with pytest.raises(UserError, match=expected):
        HeldOutLoss(cache, 5).check_compatible(other)
    with pytest.raises(UserError, match=r"^--eval-latents: .*manifest\.json"):
        HeldOutLoss(tmp_path, 5)
