"""Write the messages of a process to a file."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.cli import UserError
from common.files import LineWriter
from common.logs import get_logger

logger = get_logger(__name__)


class LineHandler(logging.Handler):
    """Appends records to a file. Records that cannot be written are buffered until the next one.

    Args:
        path: The file. Its folder may be created later.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.lines = LineWriter(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record, with the traceback of its exception, if it has one."""
        self.lines.append(f"{self.format(record).rstrip()}\n")

    def emit_error(self, error: Exception) -> None:
        """Append an error that ends the process. The console shows such an error anyway."""
        message = f"error: {error}"
        exc_info = None
        if not isinstance(error, UserError):
            message = "an error ended the process:"
            exc_info = (type(error), error, error.__traceback__)
        self.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, message, (), exc_info))


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append messages, warnings of libraries and the error that ends the block to a file."""
    handler = LineHandler(path)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except Exception as error:
        handler.emit_error(error)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        if not handler.lines.append():
            logger.warning("%s: the last lines could not be written", path)
