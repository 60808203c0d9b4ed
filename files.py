"""Files that appear whole or not at all."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np


def write_file(path: Path, data: bytes) -> None:
    """Writes beside the place, fsyncs, renames, fsyncs the folder. On a full disk raises OSError and leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not say which file it was
        raise
    fsync(path.parent)


def write_array(path: Path, array: np.ndarray) -> str:
    """Writes a .npy file; returns its sha256."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_file(path, buffer.getvalue())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's bytes, or, for a folder, of its files' names and bytes."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
