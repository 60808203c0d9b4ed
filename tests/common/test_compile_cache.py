"""Test that compiled graphs are stored in a file and loaded again."""

import errno
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from common import compile_cache
from common.compile_cache import CompileCache, choose_folder
from tests.helpers import run_command

CPU = torch.device("cpu")


@pytest.fixture
def compiler(monkeypatch):
    """Replace PyTorch's export and import of compiled graphs.

    `graphs` are the keys of the graphs that the process has used, and `loaded` collects the
    contents of files that were loaded.
    """
    state = SimpleNamespace(graphs=["a", "b"], loaded=[])

    def save():
        info = SimpleNamespace(
            artifacts={"inductor": list(state.graphs)}, inductor_artifacts=list(state.graphs)
        )
        return (" ".join(state.graphs).encode(), info) if state.graphs else None

    def load(artifacts):
        state.loaded.append(artifacts)
        return SimpleNamespace(artifacts={"inductor": artifacts.decode().split()})

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", save)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return state


def make_cache(folder, rank=0, local_rank=0, **settings):
    return CompileCache(folder, settings, CPU, rank, local_rank)


def test_graphs_are_stored_once_and_loaded_by_runs_with_the_same_settings(compiler, tmp_path):
    first = make_cache(tmp_path, batch_size=8)
    first.load()
    assert first.save() == "" and (first.num_graphs, first.num_loaded_graphs) == (2, 0)
    inode = first.path.stat().st_ino

    again = make_cache(tmp_path, batch_size=8)
    again.load()
    assert compiler.loaded == [b"a b"]
    assert again.save() == "" and (again.num_graphs, again.num_loaded_graphs) == (2, 2)
    assert again.path.stat().st_ino == inode  # not written again
    compiler.graphs.append("c")  # for example, the losses after a stop step
    again.save()
    assert (again.num_graphs, again.num_loaded_graphs) == (3, 2)
    make_cache(tmp_path, batch_size=8).load()
    assert compiler.loaded[1:] == [b"a b c"]

    make_cache(tmp_path, batch_size=16).load()
    make_cache(tmp_path, rank=1, local_rank=1, batch_size=8).load()
    assert len(compiler.loaded) == 2


def test_only_the_first_machine_writes_and_all_machines_read(compiler, tmp_path):
    for rank, local_rank in ((2, 0), (1, 1)):
        make_cache(tmp_path, rank, local_rank).save()
    assert [path.name[-2:] for path in tmp_path.iterdir()] == ["-1"]
    make_cache(tmp_path, rank=3, local_rank=1).load()
    assert compiler.loaded == [b"a b"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "owner"])
def test_unusable_file_is_ignored_and_replaced(compiler, tmp_path, monkeypatch, damage):
    cache = make_cache(tmp_path)
    cache.save()
    content = cache.path.read_bytes()
    if damage == "owner":
        monkeypatch.setattr(compile_cache.os, "getuid", lambda: os.geteuid() + 1)
    else:
        cache.path.write_bytes(content[:-1] if damage == "truncated" else b"")
    again = make_cache(tmp_path)
    again.load()
    assert compiler.loaded == []
    again.save()
    assert again.path.read_bytes() == content


def test_full_disk_is_reported_and_missing_graphs_are_not_stored(compiler, tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compile_cache, "write_file", fail)
    cache = make_cache(tmp_path)
    cache.load()
    expected = f"{cache.path}: No space left on device; the next start compiles again"
    assert cache.save() == expected
    compiler.graphs.clear()
    assert cache.save() == ""


def test_folder_is_used_unless_the_user_has_chosen_one(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache.tempfile, "gettempdir", lambda: "/tmp")
    for variable, is_compiled, is_used in (
        (None, True, True),
        (None, False, False),
        ("/tmp/torchinductor_name", True, True),  # PyTorch's default
        ("/scratch/graphs", True, False),
    ):
        if variable is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", variable)
        expected = tmp_path / ".compile-cache" if is_used else None
        assert choose_folder(tmp_path, is_compiled) == expected
    cache = make_cache(None)
    cache.load()
    assert cache.save() == "" and cache.path is None


COMPILE_A_FUNCTION = """
import sys
from pathlib import Path
import torch
from common.compile_cache import CompileCache
cache = CompileCache(Path(sys.argv[1]), {}, torch.device("cpu"), 0, 0)
cache.load()
torch.compile(torch.sin)(torch.zeros(2))
assert cache.save() == ""
print(cache.num_graphs, cache.num_loaded_graphs)
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs g++")
def test_another_machine_loads_the_graphs_of_pytorch(tmp_path, monkeypatch):
    for machine, num_loaded in (("a", 0), ("b", 1)):
        (tmp_path / machine).mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / machine))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        output = run_command([sys.executable, "-c", COMPILE_A_FUNCTION, str(tmp_path / "graphs")])
        assert output.split()[:2] == ["1", str(num_loaded)]
