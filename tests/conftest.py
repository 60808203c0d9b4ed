"""Fixtures: a VAE, a folder of images, a latent cache, a training run, and a command runner."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.utils.data import _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from common.watchdog import Watchdog
from tests.helpers import call_main, make_tree, make_vae, train_flags

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_MININTERVAL", "10")
# Use a separate cache of reference features in each test session.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sra2-tests-")
# The tensors are small, so additional threads would cost more time than they save.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def constant_matmul_rate():
    """Replace the measurement of the matrix product rate, which takes 0.2 s per run."""
    from training import setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "measure_matmul_rate", lambda device, dtype: 1e11)
        yield


@pytest.fixture
def call(capsys):
    """Return a function that runs a command in this process.

    call(module, *flags) returns the exit code and the output of the command.
    """
    from common import cli
    from training.preemption import STOP_SIGNALS

    def run(module, *flags) -> tuple[int, str]:
        code = 0
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            cli.run(lambda: call_main(module, *flags))
        except SystemExit as stop:
            code = stop.code or 0
        for number, handler in handlers.items():  # a command that fails ignores the signals
            signal.signal(number, handler)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory, tree, vae_folder) -> Path:
    """A cache of 24 images of three classes in three shards, with latents of 4x8x8."""
    from preprocessing import encode_latents

    folder = tmp_path_factory.mktemp("cache") / "data"
    source = ["--source", tree, "--dest", folder, "--vae", vae_folder]
    call_main(encode_latents, *source, "--resolution", 32, "--shard-size", 10)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache) -> Path:
    """The folder of a run of two steps."""
    import train

    exps = tmp_path_factory.mktemp("exps")
    call_main(train, *train_flags(cache, exps, "trained", "--max-train-steps", 2))
    return exps / "trained"


@pytest.fixture
def graph_counter(monkeypatch):
    """Replace the backend of torch.compile with one that counts graphs and refuses graph breaks."""
    counter = CompileCounter()
    compile_function = torch.compile
    options = {"backend": counter, "fullgraph": True}
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile_function(f, **kwargs | options)
    )
    torch._dynamo.reset()
    return counter


@pytest.fixture
def frequent_worker_checks(monkeypatch):
    """Let DataLoaders check every 0.1 s, instead of every 5 s, whether their workers are alive."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    # The default value of a method's argument is a copy of the interval.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


@pytest.fixture
def process_group():
    """Remove the process group of a single process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def watchdog(monkeypatch) -> Watchdog:
    """A watchdog that prints nothing."""
    watchdog = Watchdog()
    previous_pipe = signal.set_wakeup_fd(-1)
    monkeypatch.setattr("common.watchdog._print", lambda message: None)
    yield watchdog
    watchdog.reset()
    signal.set_wakeup_fd(previous_pipe)
