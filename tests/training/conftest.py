"""Fixtures: a cache with images and an encoder, and steps on the meta device."""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from dataset import CachedBatch
from latents.cache import LatentCache
from tests.helpers import call_main
from tests.training.steps import make_settings, make_step
from training.alignment import required_cache_inputs


@pytest.fixture(scope="session")
def with_images(tmp_path_factory, tree, vae_folder) -> Path:
    """A folder with a cache that keeps its images, and weights of two encoders in timm's format."""
    from preprocessing import encode_latents

    folder = tmp_path_factory.mktemp("with-images")
    flags = ["--source", tree, "--dest", folder / "data", "--vae", vae_folder]
    call_main(encode_latents, *flags, "--resolution", 32, "--shard-size", 10, "--keep-images")
    torch.manual_seed(0)
    network = timm.create_model("test_vit", pretrained=False)
    torch.nn.init.normal_(network.pos_embed)
    save_file(network.state_dict(), folder / "weights.safetensors")
    second = timm.create_model("test_vit2", pretrained=False)
    save_file(second.state_dict(), folder / "second.safetensors")
    return folder


@pytest.fixture
def make_meta_step(cache, monkeypatch):
    """Return a function that builds, from flags, a Step on the meta device and a batch on the host.

    The tensors of the meta device hold no data, so any host-device synchronization raises an error.
    The attribute `is_reduced` lists, for each backward pass, whether gradients are all-reduced.
    """
    optimizers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr("models.encoder.weights_fingerprint", lambda network: "")
    inside_no_sync, is_reduced = [], []

    @contextmanager
    def no_sync(model):
        inside_no_sync.append(model)
        yield
        inside_no_sync.pop()

    def backward(loss):
        is_reduced.append(not inside_no_sync)
        loss.backward()

    def make(*flags, data=cache):
        step = make_step(make_settings(data, *flags), torch.device("meta"), no_sync, backward)
        moments = torch.zeros(8, 8, 8, 8, dtype=torch.float16)
        stored_inputs = LatentCache(data).read_input
        inputs = {
            name: stored_inputs(name, np.arange(8), None)
            for name in required_cache_inputs(step.alignments)
        }
        labels = torch.zeros(8, dtype=torch.int64)
        return step, CachedBatch(torch.arange(8), moments, labels, inputs)

    make.is_reduced = is_reduced
    return make
