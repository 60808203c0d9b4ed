"""Files that appear whole or not at all, and files that grow by whole lines."""

import errno
import fcntl
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np


def write_file(path: Path, *data: bytes | memoryview) -> None:
    """Writes beside the place, fsyncs, renames, fsyncs the folder. On a full disk raises OSError and leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            for part in data:
                file.write(part)
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
    """Writes a .npy file, without a second copy of it in memory; returns its sha256."""
    header, array = io.BytesIO(), np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = header.getvalue(), memoryview(array).cast("B") if array.size else b""
    write_file(path, *data)
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    return digest.hexdigest()


class NpyWriter:
    """A .npy file that is written a few rows at a time, so that memory need not hold it. `finish` gives it its name."""

    def __init__(self, path: Path, dtype: np.dtype | type, row: tuple[int, ...]):
        """row: the shape of one. On a full disk raises OSError, here and below; `discard` then leaves nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype, self.row, self.num_rows = path, np.dtype(dtype), row, 0
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.file = open(self.partial, "w+b")  # noqa: SIM115
        self.begin = self._header()

    def _header(self) -> int:
        """numpy leaves room in a header for more rows, so it has one length."""
        self.file.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self.row),
        }
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()

    def append(self, rows: np.ndarray) -> None:
        """rows (n, *row)."""
        assert (rows.shape[1:], rows.dtype) == (self.row, self.dtype), (rows.shape, rows.dtype)
        if rows.size:
            with self._named():
                self.file.write(memoryview(np.ascontiguousarray(rows)).cast("B"))
        self.num_rows += len(rows)

    def finish(self) -> str:
        """Gives it its name; returns its sha256."""
        with self._named():
            length = self._header()
            assert length == self.begin, (length, self.begin)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.seek(0)
            digest = hashlib.sha256()
            while chunk := self.file.read(1 << 20):
                digest.update(chunk)
            self.file.close()
            os.replace(self.partial, self.path)
            fsync(self.path.parent)
        return digest.hexdigest()

    def discard(self) -> None:
        """Leaves nothing, unless it is finished."""
        self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # what it could not write before, it cannot now
            self.file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise


@contextmanager
def discard_on_error(array: NpyWriter | None) -> Iterator[None]:
    """Discards it if what is done here fails."""
    try:
        yield
    except BaseException:
        if array:
            array.discard()
        raise


def write_npz(
    path: Path, blocks: Iterable[np.ndarray] | None, shape: tuple[int, ...], **arrays: np.ndarray
) -> None:
    """ADM's file: arr_0 uint8 of `shape`, whose rows come in blocks, so that it is never in memory (None: without it); and
    other arrays. Appears whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            if blocks is not None:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    rows = 0
                    for block in blocks:
                        file.write(np.ascontiguousarray(block))
                        rows += len(block)
                    assert rows == shape[0], (rows, shape)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.save(file, array)
        fsync(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync(path.parent)


class LineWriter:
    """A text file that grows by whole lines. On a full disk they wait in memory for the next call."""

    def __init__(self, path: Path):
        self.path, self.pending = path, ""
        self.whole: int | None = (
            None  # bytes of the file before a write that failed, and may have left part of a line
        )

    def append(self, text: str = "", sync: bool = False) -> bool:
        """Adds lines, and those that waited, and fsyncs them if asked. Returns whether all are written."""
        self.pending += text
        rest = self.pending.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                if self.whole is not None:
                    file.truncate(self.whole)
                self.whole = file.seek(0, os.SEEK_END)
                while rest:
                    rest = rest[file.write(rest) :]
                if sync:
                    os.fsync(file.fileno())
        except OSError:
            return False
        self.pending, self.whole = "", None
        return True


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the lock on a file; not where the disk knows no locks. Raises BlockingIOError if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(errno.EAGAIN, "another process has it", str(path)) from None
        yield


def sha256(path: Path) -> str:
    """Of a file's bytes, or, for a folder, of its files' names and bytes, through links to other folders."""
    digest = hashlib.sha256()
    for file in sorted(_files(path)) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path, above: frozenset = frozenset()) -> Iterator[Path]:
    """All files under a folder, but not through a link to a folder that it lies in."""
    above |= {folder.resolve()}
    for entry in folder.iterdir():
        if not entry.is_dir():
            yield from [entry] if entry.is_file() else []
        elif entry.resolve() not in above:
            yield from _files(entry, above)


def fsync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
