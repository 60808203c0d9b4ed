"""Wait for files that another process has written to a network file system."""

import socket
import time
from contextlib import suppress
from pathlib import Path

from common.cli import UserError
from common.watchdog import waiting_for

VISIBILITY_SECONDS = 60.0  # by default, NFS caches for this long that a file is missing
POLL_SECONDS = 0.5


def measure_files(folder: Path) -> dict[str, int]:
    """Return the size of each file in a folder and in its subfolders, by relative path."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_for_files(
    folder: Path, sizes: dict[str, int], seconds: float = VISIBILITY_SECONDS
) -> None:
    """Wait until this process sees the files of a checkpoint.

    Args:
        folder: The checkpoint.
        sizes: Sizes of its files according to the processes that see them, by relative path.
        seconds: Time limit.

    Raises:
        UserError: A file is missing or has another size after the time limit.
    """
    deadline = time.monotonic() + seconds
    with waiting_for(f"{folder} to become visible on {socket.gethostname()}"):
        while True:
            incomplete = _find_incomplete_file(folder, sizes)
            if incomplete is None:
                return
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{folder / incomplete} is not complete on {socket.gethostname()} after "
                    f"{seconds:.0f} s, but another process sees it: --output-dir must be on a file "
                    "system that all nodes share"
                )
            time.sleep(POLL_SECONDS)


def _find_incomplete_file(folder: Path, sizes: dict[str, int]) -> str | None:
    """Return the first file that is missing or has another size, or None."""
    with suppress(OSError):
        # Reading the folders makes NFS look again for files that it has cached as missing.
        list(folder.parent.iterdir())
        list(folder.iterdir())
    for name, size in sizes.items():
        try:
            is_complete = (folder / name).stat().st_size == size
        except OSError:
            is_complete = False
        if not is_complete:
            return name
    return None
