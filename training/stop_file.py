"""Stop a run if the file STOP appears in its folder, for users who cannot send it a signal.

The exit code is then 0, so that a launcher does not restart the run.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.logs import get_logger
from training.coordination import broadcast_object
from training.preemption import StopRequest

logger = get_logger(__name__)

POLL_SECONDS = 1.0


def stop_file(folder: Path) -> Path:
    """Return the path of the file that stops a run."""
    return folder / "STOP"


@contextmanager
def watching_stop_file(folder: Path, request: StopRequest, is_main_process: bool) -> Iterator[None]:
    """Stop the run in the block if the file FOLDER/STOP exists.

    A thread checks for the file, because a query of a network file system may take long. When the
    block ends without an exception, the file is removed, so that the run can be resumed. After an
    exception, the file remains, and stops the next start of the run.

    Args:
        folder: The run folder.
        request: Receives the path of the file as its name if the file exists.
        is_main_process: Whether this is the first process. Only this process checks for the file.
    """
    if not is_main_process:
        yield
        return
    path = stop_file(folder)
    is_over = threading.Event()

    def watch() -> None:
        # Unlike Path.exists, this returns False after errors of a network file system.
        while not os.path.exists(path):  # noqa: PTH110
            if is_over.wait(POLL_SECONDS):
                return
        request.name = str(path)

    threading.Thread(target=watch, name="stop file", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed (%s); remove it to resume", path, error.strerror)


def agree_on_stop_file(folder: Path, request: StopRequest) -> None:
    """Set `request.is_final` on all processes to whether the file stopped the run.

    All processes must call this.
    """
    is_stopped_by_file = request.name == str(stop_file(folder))
    request.is_final = broadcast_object(
        is_stopped_by_file, "the first process to report why the run stops"
    )
