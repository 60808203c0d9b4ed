"""Fixtures: a copy of the cache that a test may damage, and a cache with flipped images."""

import shutil
from pathlib import Path

import pytest

from preprocessing import encode_latents
from tests.helpers import call_main


@pytest.fixture
def copied(cache, tmp_path) -> Path:
    return shutil.copytree(cache, tmp_path / "data")


@pytest.fixture(scope="session")
def flipped(tmp_path_factory, tree, vae_folder) -> Path:
    """The cache of the same images with moments of the flipped images."""
    folder = tmp_path_factory.mktemp("flipped") / "data"
    source = ["--source", tree, "--dest", folder, "--vae", vae_folder]
    call_main(encode_latents, *source, "--resolution", 32, "--shard-size", 10, "--flip")
    return folder
