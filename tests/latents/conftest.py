"""Provide a copy of the cache that tests may change, and a cache with flipped images."""

import shutil
from pathlib import Path

import pytest

from preprocessing import encode_latents
from tests.helpers import call_main


@pytest.fixture
def cache_copy(cache, tmp_path) -> Path:
    return shutil.copytree(cache, tmp_path / "data")


@pytest.fixture(scope="session")
def flipped_cache(tmp_path_factory, tree, vae_folder) -> Path:
    """A cache of the same images that also contains moments of the flipped images."""
    folder = tmp_path_factory.mktemp("flipped") / "data"
    source = ["--source", tree, "--dest", folder, "--vae", vae_folder]
    call_main(encode_latents, *source, "--resolution", 32, "--shard-size", 10, "--flip")
    return folder
