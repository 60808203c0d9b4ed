"""Test the report on the first step."""

from types import SimpleNamespace

import torch

from training import first_step as first_step_module
from training.first_step import FirstStep


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
