"""The loss on images held out: what the formula says, of all of them, however they are dealt out."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from common.cli import UserError
from common.keyed_random import Purpose, normal
from latents.cache import LatentCache
from models.sit import PRESETS, SiT, SiTConfig
from training.held_out import SEED, TIMES, HeldOut


@pytest.fixture(scope="module")
def model() -> SiT:
    """Not at its initialisation, where it gives zero."""
    torch.manual_seed(0)
    network = SiT(SiTConfig(**PRESETS["SiT-Ti/2"] | {"depth": 1}, latent_size=8, num_classes=3))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return network


def measure(
    held_out: HeldOut, model: SiT, size: int = 24, rank: int = 0, processes: int = 1, **more
) -> dict[str, float]:
    given = {"gather_all": lambda x: x, "look": lambda: None} | more
    return held_out.measure(model, "linear", "v", torch.float32, size, rank, processes, **given)


@torch.no_grad()
def test_it_is_the_mean_over_images_and_times(cache, model):
    found = measure(HeldOut(cache, 100), model)
    read, at = LatentCache(cache), dict.fromkeys(TIMES, 0.0)
    scale, shift = read.manifest.scale, read.manifest.shift
    for i in range(24):
        moments, labels = (value[0] for value in read.gather(torch.tensor([i]).numpy()))
        index, shape = torch.tensor([i]), tuple(read.manifest.latent_shape)
        mean, std = moments.double().chunk(2)
        x = (mean + std * normal(SEED, Purpose.POSTERIOR, index, shape)[0] - shift) * scale
        for k, t in enumerate(TIMES):
            eps = normal(SEED, Purpose.NOISE, index, shape, draw=k)[0]
            v = model(((1 - t) * x + t * eps)[None].float(), torch.tensor([t]), labels[None])[0]
            at[t] += (v - (eps - x)).square().mean().item() / 24
    assert {key: value for key, value in found.items() if key != "held_out"} == pytest.approx(
        {f"held_out_{t}": value for t, value in at.items()}, rel=1e-5
    )
    assert found["held_out"] == pytest.approx(sum(at.values()) / len(TIMES), rel=1e-5)


def test_it_depends_neither_on_the_batch_size_nor_on_the_processes(cache, model):
    held_out = HeldOut(cache, 100)
    whole = measure(held_out, model)
    assert measure(held_out, model, size=5) == pytest.approx(whole, rel=1e-6)
    looks, shares = [], []
    for rank in range(
        3
    ):  # 24 images are four batches of five and four over: the last process's last one is empty
        measure(
            held_out,
            model,
            5,
            rank,
            3,
            gather_all=lambda x: shares.append(x) or x,
            look=partial(looks.append, rank),
        )
    assert looks.count(0) == looks.count(1) == looks.count(2) == 2, (
        "processes that do not look together wait for ever"
    )
    assert measure(held_out, model, gather_all=lambda x: torch.cat(shares)) == pytest.approx(
        whole, rel=1e-6
    )


def test_fewer_images_are_spread_evenly(cache):
    assert HeldOut(cache, 5).index.tolist() == [0, 4, 9, 14, 19]
    assert HeldOut(cache, 24).index.tolist() == HeldOut(cache, 1000).index.tolist() == [*range(24)]


def test_what_does_not_fit_is_said(cache, tmp_path):
    manifest = LatentCache(cache).manifest
    HeldOut(cache, 5).check(manifest)
    other = replace(manifest, class_names=manifest.class_names[::-1], shift=manifest.shift + 1)
    with pytest.raises(
        UserError, match=r"^--eval-latents .* class_names, shift differ; encode it in the same way$"
    ):
        HeldOut(cache, 5).check(other)
    with pytest.raises(UserError, match=r"^--eval-latents: .*manifest\.json"):
        HeldOut(tmp_path, 5)
