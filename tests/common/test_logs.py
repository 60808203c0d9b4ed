"""Test which messages a process shows, and which ones it writes to its file."""

import logging
import re
import warnings

import pytest

from common.cli import UserError, print_warning
from common.log_file import logging_to
from common.logs import get_logger, showing_messages

logger = get_logger("test")


def write_messages() -> None:
    logger.debug("detail")
    logger.info("saved")
    logger.warning("slow")
    print_warning("a flag is ignored")
    warnings.warn("old function", stacklevel=1)
    logging.getLogger("library").info("hello")
    logging.getLogger("library").error("broken")


@pytest.fixture
def set_rank(monkeypatch):
    def set_environment(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return set_environment


def read_messages(path) -> list[str]:
    """Return the lines of a file without their times."""
    time = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
    return [time.sub("", line) for line in path.read_text().splitlines()]


def test_a_single_process_shows_plain_text(capsys):
    with showing_messages():
        write_messages()
    printed = capsys.readouterr()
    assert printed.out == "saved\n"
    slow, flag, old, *_, broken = printed.err.splitlines()
    assert (slow, flag, broken) == ("slow", "warning: a flag is ignored", "broken")
    assert "UserWarning: old function" in old


def test_other_processes_show_only_their_own_warnings_and_errors(capsys, set_rank, tmp_path):
    path = tmp_path / "rank-1.log"
    set_rank(1)
    with showing_messages(), logging_to(path):
        write_messages()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "[rank 1] slow\n[rank 1] broken\n")
    detail, saved, slow, flag, old, *_, broken = read_messages(path)
    expected = ("detail", "saved", "slow", "warning: a flag is ignored", "broken")
    assert (detail, saved, slow, flag, broken) == expected
    assert "UserWarning: old function" in old


def test_error_that_ends_the_process_is_written_to_its_file(tmp_path, capsys):
    path = tmp_path / "rank-1.log"
    for error in (UserError("--size 3 is odd"), ZeroDivisionError("no luck")):
        with pytest.raises(type(error)), showing_messages(), logging_to(path):
            raise error
    lines = read_messages(path)
    assert lines[:3] == [
        "error: --size 3 is odd",
        "an error ended the process:",
        "Traceback (most recent call last):",
    ]
    assert lines[-1] == "ZeroDivisionError: no luck"
    assert capsys.readouterr().err == ""


def test_messages_wait_until_the_file_can_be_written(tmp_path, capsys):
    path = tmp_path / "run/rank-1.log"
    with logging_to(path):
        logger.info("started")
        path.parent.mkdir()
        logger.info("saved")
        assert read_messages(path) == ["started", "saved"]
        path.unlink()
        path.parent.rmdir()
        logger.info("lost")
    with showing_messages(), logging_to(path):
        logger.debug("lost")
    assert capsys.readouterr().err == f"{path}: the last lines could not be written\n"
