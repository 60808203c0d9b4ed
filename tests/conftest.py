"""Fixtures: a VAE folder, a tree of images, a cache, a trained run, and commands called in-process."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers import make_tree, make_vae, train_flags

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(
    1
)  # what is tested is small: a second thread costs more than it gives, on a busy machine very much more
os.environ.setdefault("TQDM_MININTERVAL", "10")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(
    prefix="sra2-tests-"
)  # where features of references are kept


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *flags) -> exit code and everything printed, as from a shell."""
    from accelerate.state import AcceleratorState

    from common import cli

    def run(module, *flags) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # it outlives an Accelerator, as a process would not
        code = 0
        try:
            cli.run(module.main)
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory, tree, vae_folder) -> Path:
    """24 images, three classes, latents 4x8x8, in three shards."""
    from preprocessing import encode_latents

    folder = tmp_path_factory.mktemp("cache") / "data"
    before = sys.argv
    sys.argv = [
        "encode",
        *f"--source {tree} --dest {folder} --resolution 32 --vae {vae_folder} --shard-size 10".split(),
    ]
    try:
        encode_latents.main()
    finally:
        sys.argv = before
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache) -> Path:
    """A run of two steps."""
    import train

    exps = tmp_path_factory.mktemp("exps")
    before = sys.argv
    sys.argv = ["train.py", *train_flags(cache, exps, "trained", "--max-train-steps", 2)]
    try:
        train.main()
    finally:
        sys.argv = before
    return exps / "trained"
