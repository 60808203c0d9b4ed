"""Write files atomically, append whole lines to text files, and read, lock and hash files."""

import errno
import fcntl
import hashlib
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

# Exceptions of np.load if a .npy file is damaged. NumPy parses the header as Python code.
NPY_READ_ERRORS = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)
# Exceptions of zipfile if a file is damaged, is encrypted or has an unknown compression.
ZIP_READ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _make_partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Set the file name of an OSError to `path` if it is unset or that of the temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(_make_partial_path(path))):
            error.filename = str(path)
        raise


def _make_folder(folder: Path) -> None:
    """Create a folder. Raise NotADirectoryError if the path or a parent is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename
        ) from None


@contextmanager
def _replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename that file to `path` at the end.

    The file and its folder are flushed to the disk. On error, the temporary file is deleted.
    """
    _make_folder(path.parent)
    partial = _make_partial_path(path)
    try:
        with _name_in_errors(path):
            yield partial
            fsync(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def check_writable(path: Path) -> None:
    """Check that a file can be written. Call this before a long computation of its content.

    Raises:
        OSError: The file cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _make_folder(path.parent)
    partial = _make_partial_path(path)
    with _name_in_errors(path):
        partial.touch()
        partial.unlink()


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically and flush it to the disk. If writing fails, the old file is kept."""
    with _replace_atomically(path) as partial:
        partial.write_bytes(data)


def read_json_if_valid(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_array(path: Path, array: np.ndarray) -> str:
    """Write a .npy file atomically, without copying the array, and return the file's sha256."""
    writer = NpyWriter(path, array.dtype, array.shape[1:])
    with discard_on_error(writer):
        writer.append(array)
        return writer.finish()


class NpyWriter:
    """Writes a .npy file a few rows at a time, so the array does not have to fit into memory.

    The rows are written to a temporary file, which gets its final name when `finish` is called. If
    the disk is full, all methods raise OSError; call `discard` to remove the temporary file.

    Args:
        path: The file to write.
        dtype: Data type of the array.
        row_shape: Shape of one row.
    """

    def __init__(self, path: Path, dtype: np.dtype | type, row_shape: tuple[int, ...]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.num_rows = 0
        self.partial = _make_partial_path(path)
        with _name_in_errors(path):
            self.file = self.partial.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """Write the header for the current number of rows.

        The size of the header does not change, because numpy reserves space for the largest number.
        """
        self.file.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self.row_shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: np.ndarray) -> None:
        """Append rows, (n, *row_shape)."""
        assert (rows.shape[1:], rows.dtype) == (self.row_shape, self.dtype), rows.dtype
        with _name_in_errors(self.path):
            self.file.write(np.ascontiguousarray(rows).data)
        self.num_rows += len(rows)

    def finish(self) -> str:
        """Complete the file, give it its final name and return its sha256."""
        with _replace_atomically(self.path) as partial:
            self._write_header()
            self.file.close()
            return sha256(partial)

    def discard(self) -> None:
        """Delete the temporary file if there is one."""
        self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes buffered bytes, which may fail again
            self.file.close()


@contextmanager
def discard_on_error(writer: NpyWriter | None) -> Iterator[None]:
    """Discard the unfinished file if the body of the `with` statement raises an exception."""
    try:
        yield
    except BaseException:
        if writer:
            writer.discard()
        raise


def write_npz(
    path: Path, blocks: Iterable[np.ndarray] | None, shape: tuple[int, ...], **arrays: np.ndarray
) -> None:
    """Write an .npz file of images in ADM's format atomically.

    Args:
        path: The file to write.
        blocks: Consecutive blocks of rows of arr_0, uint8, so the whole array does not have to fit
            into memory. None omits arr_0.
        shape: Shape of arr_0.
        arrays: Additional arrays, by name.
    """
    with (
        _replace_atomically(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        if blocks is not None:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                num_rows = 0
                for block in blocks:
                    file.write(np.ascontiguousarray(block).data)
                    num_rows += len(block)
                assert num_rows == shape[0], (num_rows, shape)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array)


class LineWriter:
    """Appends whole lines to a text file. If a write fails, lines are buffered until the next call.

    Attributes:
        path: The file.
        pending: Text that has not been written yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self.pending = ""
        # Size of the file before a failed write, which may have written part of a line.
        self._size_before_failure: int | None = None

    def append(self, text: str = "", sync: bool = False) -> bool:
        """Write pending lines and new ones.

        Args:
            text: Lines to append.
            sync: Whether to flush the file to the disk.

        Returns:
            Whether everything has been written.
        """
        self.pending += text
        # A file name that is not valid UTF-8 contains surrogates, which cannot be encoded.
        remaining = self.pending.encode(errors="backslashreplace")
        try:
            with self.path.open("ab", buffering=0) as file:
                if self._size_before_failure is not None:
                    file.truncate(self._size_before_failure)
                self._size_before_failure = file.seek(0, os.SEEK_END)
                while remaining:
                    remaining = remaining[file.write(remaining) :]
                if sync:
                    os.fsync(file.fileno())
        except OSError:
            return False
        self.pending = ""
        self._size_before_failure = None
        return True


@contextmanager
def lock(path: Path, busy: Exception | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file, provided that the file system supports locks.

    Args:
        path: The file, which is created if it does not exist.
        busy: The exception to raise if another process holds the lock.

    Raises:
        BlockingIOError: Another process holds the lock, and `busy` is None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise busy or BlockingIOError(f"another process holds the lock {path}") from None
        yield


def sha256(path: Path) -> str:
    """Return the sha256 of a file, or of the names and contents of all files in a folder.

    Symbolic links to folders are followed.
    """
    digest = hashlib.sha256()
    is_folder = path.is_dir()
    for file_path in sorted(_list_files(path)) if is_folder else [path]:
        if is_folder:
            digest.update(str(file_path.relative_to(path)).encode())
        with file_path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_at(descriptor: int, position: int, buffer: memoryview) -> None:
    """Fill a buffer of bytes from an open file. Several threads may read from the same file.

    Raises:
        OSError: The disk failed, or the file was truncated after it was opened.
    """
    while buffer:  # a single call reads at most 2 GB
        count = os.preadv(descriptor, [buffer], position)
        if not count:
            raise OSError(errno.EIO, "the file was truncated after it was opened")
        buffer = buffer[count:]
        position += count


def _list_files(folder: Path, ancestors: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield all files under a folder. Symbolic links that form a cycle are ignored."""
    ancestors |= {folder.resolve()}
    for entry in folder.iterdir():
        if entry.is_file():
            yield entry
        elif entry.is_dir() and entry.resolve() not in ancestors:
            yield from _list_files(entry, ancestors)


def fsync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
