"""Recognize pointers of Git LFS, which a clone contains instead of files that it did not fetch."""

from pathlib import Path

POINTER_START = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # limit in the specification of Git LFS


def describe_lfs_pointer(path: Path) -> str:
    """Return a problem and its remedy, for an error message, if a file is a Git LFS pointer.

    Return an empty string for other files and for files that cannot be read.
    """
    try:
        if path.stat().st_size > MAX_POINTER_BYTES:
            return ""
        content = path.read_bytes()
    except OSError:
        return ""
    if not content.startswith(POINTER_START):
        return ""
    return (
        f"{path} is a Git LFS pointer instead of the file itself: run 'git lfs pull' in its "
        "folder, or download the file again"
    )
