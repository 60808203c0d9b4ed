"""Previews of each EMA: drawn once per step, and errors of the disk do not end the run."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from training.monitors import Monitors


@pytest.fixture
def make_monitors(tmp_path):
    """Return a function of the preview's `draw` that builds Monitors of two EMAs.

    Its attributes `images` and `messages` list what is sent to the log.
    """

    def make(draw) -> Monitors:
        log = SimpleNamespace(
            folder=tmp_path,
            throughput=SimpleNamespace(pause=nullcontext),
            record_image=lambda name, path, step: make.images.append((name, path.name, step)),
            info=make.messages.append,
        )
        preview = SimpleNamespace(draw=draw)
        return Monitors(log, (0.9, 0.5), 10, preview, None, preview_every=4, eval_every=0)

    make.images = []
    make.messages = []
    return make


def run(monitors, step) -> None:
    state = SimpleNamespace(step=step, emas=["first", "second"])
    assert monitors.run_due(state, gather=lambda tensor: tensor, is_stopped=lambda: False)


def test_previews_are_drawn_once_per_due_step(make_monitors):
    drawn = []

    def draw(ema, path, title):
        drawn.append(ema)
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monitors = make_monitors(draw)
    for step in (3, 4, 4, 10):  # step 4 is repeated, as when a run is resumed there
        run(monitors, step)
    assert drawn == ["first", "second"] * 2
    assert make_monitors.images == [
        ("samples", "0000004.png", 4),
        ("samples-ema0.5", "0000004-ema0.5.png", 4),
        ("samples", "0000010.png", 10),
        ("samples-ema0.5", "0000010-ema0.5.png", 10),
    ]


def test_preview_that_cannot_be_saved_is_reported(make_monitors):
    def draw(ema, path, title):
        raise OSError(28, "No space left on device", str(path))

    run(make_monitors(draw), 4)
    assert not make_monitors.images and len(make_monitors.messages) == 2
    assert "0000004.png: No space left on device" in make_monitors.messages[0]
    assert make_monitors.messages[0].endswith("; training continues")
