"""Set environment variables that libraries require, for containers that do not set them."""

import getpass
import os
import sys
import tempfile
from pathlib import Path


def complete_environment() -> None:
    """Ensure that there are a temporary directory, a user name and a home directory.

    Call this function before importing PyTorch or libraries of Hugging Face. They compute paths
    when they are imported. Without these three, they would raise an exception or create a folder
    with the name `~`.

    Raises:
        SystemExit: With code 2 and a one-line error if no temporary directory is writable.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        print(
            f"error: {error.strerror}: set TMPDIR to a writable folder with free space",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no entry in the passwd database; OSError since Python 3.13
        os.environ["USER"] = f"user-{os.getuid()}"
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (Path.expanduser raises an exception)
        os.environ["HOME"] = _make_home()


def _make_home() -> str:
    """Return a private folder in the temporary directory, the same for all processes of a user."""
    home = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():
        return tempfile.mkdtemp(prefix="home-")
    return str(home)
