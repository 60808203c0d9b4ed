"""Recognize pointers of Git LFS, which a clone contains instead of files that it did not fetch."""

from pathlib import Path

POINTER_START = b"version https://git-lfs.github.com/spec/"


def describe_lfs_pointer(path: Path) -> str:
    """Return a problem and its remedy, for an error message, if a file is a Git LFS pointer.

    Return an empty string for other files and for files that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER_START))
    except OSError:
        return ""
    return format_pointer_problem(str(path)) if start == POINTER_START else ""


def format_pointer_problem(name: str) -> str:
    """Return the problem and its remedy for a file that is a Git LFS pointer."""
    return (
        f"{name} is a Git LFS pointer instead of the file itself: run 'git lfs pull' in its "
        "folder, or download the file again"
    )
