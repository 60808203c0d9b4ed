"""Test that progress is a bar on a terminal and lines of text otherwise."""

import io
import sys

import pytest

from common.logs import get_logger, showing_messages
from common.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_loop(**options) -> None:
    """Count four images in two steps, with a refresh after each step."""
    options = {"total": 4, "unit": "img", "desc": "sampling", "mininterval": 0} | options
    with ProgressBar(**options) as bar:
        for _ in range(2):
            bar.update(2)


def test_lines_have_count_rate_and_remaining_time(capsys):
    run_loop(line_seconds=0)
    text = capsys.readouterr().err
    first, second, last = text.splitlines()
    assert first.startswith("sampling: 2 of 4 img, ") and first.endswith("img/s, 00:00 remaining")
    assert second.startswith("sampling: 4 of 4 img, ") and "\r" not in text and "\x1b" not in text
    assert last.startswith("sampling: 4 of 4 img in 00:00, ") and last.endswith("img/s")


@pytest.mark.parametrize(
    ("options", "num_lines"),
    [
        ({}, 1),
        ({"leave": False}, 0),
        ({"leave": False, "line_seconds": 0}, 3),
        ({"disable": True, "line_seconds": 0}, 0),
    ],
)
def test_short_loops_write_at_most_the_last_line(capsys, options, num_lines):
    run_loop(**options)
    assert capsys.readouterr().err.count("\n") == num_lines


def test_iterating_writes_the_last_line(capsys):
    assert list(ProgressBar("abc", unit="letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("3 of 3 letter in ")


def test_bar_on_a_terminal_is_redrawn_and_messages_are_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with showing_messages(), ProgressBar(total=4, desc="sampling", mininterval=0) as bar:
        bar.update(2)
        get_logger("test").info("saved")
        bar.update(2)
    text = terminal.getvalue()
    assert text.count("\rsampling: ") >= 3 and text.count("\n") == 2
    assert "\rsaved\n" in text
