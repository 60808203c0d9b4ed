"""Show the messages of this project on the console.

The modules write messages with Python's logging. A command shows them as plain text: information on
stdout, warnings and errors on stderr. If a launcher has started several processes, only the first
one shows information and the warnings of libraries. The results of a command are printed instead.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.progress import ProgressBar

ROOT_NAME = "sra2"

# Records of the level DEBUG are written only to files.
logging.getLogger(ROOT_NAME).setLevel(logging.DEBUG)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this project, given its `__name__`."""
    return logging.getLogger(f"{ROOT_NAME}.{name}")


def get_rank_prefix() -> str:
    """Return "[rank N] " if a launcher has started several processes, or "" otherwise.

    The variables may be invalid; `read_process_environment` checks them.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or "RANK" not in os.environ:
        return ""
    return f"[rank {os.environ['RANK']}] "


def is_first_process() -> bool:
    """Return whether this process is the first one, according to the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


class ConsoleHandler(logging.Handler):
    """Shows records above the progress bars of this process."""

    def __init__(self) -> None:
        super().__init__(logging.INFO if is_first_process() else logging.WARNING)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a record: every rank would repeat the warnings of libraries."""
        is_ours = record.name.startswith(f"{ROOT_NAME}.")
        return is_ours or is_first_process() or record.levelno >= logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to stdout or stderr."""
        is_warning = record.levelno >= logging.WARNING
        prefix = get_rank_prefix() if is_warning else ""
        stream = sys.stderr if is_warning else sys.stdout
        ProgressBar.write(prefix + self.format(record).rstrip(), file=stream)
        stream.flush()


@contextmanager
def showing_messages() -> Iterator[None]:
    """Show the messages of this project and the warnings of libraries within the block."""
    handler = ConsoleHandler()
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
