"""Test the report on the first step, and which compiled graphs a run loads."""

from types import SimpleNamespace

import torch

from common.compile_cache import CompileCache
from tests.training.steps import make_settings
from training import first_step as first_step_module
from training.first_step import FirstStep, load_compile_cache


def test_first_step_is_reported_once_and_later_graphs_are_saved(monkeypatch):
    times = iter([10.0, 32.5])
    monkeypatch.setattr(
        first_step_module, "time", SimpleNamespace(perf_counter=lambda: next(times))
    )
    problems = iter(["", "the disk is full"])
    cache = SimpleNamespace(
        save=lambda: next(problems), num_graphs=5, num_loaded_graphs=4, path="exps/x"
    )
    messages = []
    first_step = FirstStep(cache, torch.device("cpu"), messages.append)
    first_step.start()
    for _ in range(3):
        first_step.advance()
    expected = "the first step took 22.5 s with 5 compiled graphs, 4 of them from exps/x"
    assert messages == [expected]
    first_step.save()
    assert messages[1:] == ["the disk is full"]


def test_run_loads_the_graphs_of_runs_with_the_same_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    loaded = []
    monkeypatch.setattr(CompileCache, "load", lambda cache: loaded.append(cache.path))

    def load(*flags, num_processes=2, width=128):
        settings = make_settings(tmp_path, "--output-dir", tmp_path, *flags)
        accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=num_processes,
            process_index=1,
            local_process_index=1,
        )
        config = {"model": {"width": width}, "align": []}
        path = load_compile_cache(settings, accelerator, config).path
        assert loaded[-1] == path
        return path

    path = load("--compile")
    assert path.parent == tmp_path / ".compile-cache" and path.name.endswith("-1")
    # Flags that do not affect the step do not change the path.
    assert load("--compile", "--log-every", 7) == path
    others = [
        load("--compile", "--batch-size", 16),
        load("--compile", "--gradient-accumulation-steps", 2),
        load("--compile", "--prediction", "x"),
        load("--compile", num_processes=4),
        load("--compile", width=256),
    ]
    assert len({path, *others}) == 6
    assert load() is None
