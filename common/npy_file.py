"""Read rows of .npy files without memory maps.

If a file is truncated or its disk fails while it is mapped, the kernel kills the process with
"Bus error". A read raises OSError instead, and does not block other threads.
"""

import math
import os
import threading
import tokenize
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from common.files import read_at

# NumPy parses headers with `ast`, which may raise a SystemError in Python 3.11 if several threads
# use it at the same time (https://github.com/python/cpython/issues/106905).
_parser_lock = threading.Lock()


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype. Raises ValueError if the header is damaged."""
    try:
        # This fills the buffer of the file. Unless the header is longer than the buffer, the disk
        # is not read while the lock is held.
        version = np.lib.format.read_magic(file)
        with _parser_lock:
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(file)
            return np.lib.format.read_array_header_2_0(file)
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"the header is damaged ({error})") from None


def read_npy(path: Path) -> np.ndarray:
    """Read an array like np.load, which must not be called in several threads (see above).

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a .npy file, is truncated, or contains objects.
    """
    with path.open("rb") as file:
        shape, is_fortran_order, dtype = read_npy_header(file)
        if dtype.hasobject:
            raise ValueError("the array contains objects")
        num_values = math.prod(shape)
        if os.fstat(file.fileno()).st_size < file.tell() + num_values * dtype.itemsize:
            raise ValueError("the file is truncated")
        values = np.fromfile(file, dtype, num_values)
    return values.reshape(shape, order="F" if is_fortran_order else "C")


@dataclass(frozen=True)
class NpyLayout:
    """The position and the format of the array in a .npy file.

    Attributes:
        shape: Shape of the array.
        dtype: Data type of the array.
        offset: Position of the first row in bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def row_bytes(self) -> int:
        """Return the size of a row in bytes."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Return the size of the array in bytes."""
        return self.shape[0] * self.row_bytes


def read_npy_layout(file: IO[bytes], file_size: int) -> NpyLayout:
    """Read the header at the current position of a file.

    Raises:
        EOFError: The file is empty.
        ValueError: It is not a .npy file, is truncated, or is in Fortran order.
    """
    if not file_size:
        raise EOFError("No data left in file")
    shape, is_fortran_order, dtype = read_npy_header(file)
    if not shape or is_fortran_order or dtype.hasobject:
        raise ValueError("the array has no rows, is in Fortran order or contains objects")
    layout = NpyLayout(shape, dtype, file.tell())
    if file_size < layout.offset + layout.nbytes:
        raise ValueError("the file is truncated")
    return layout


class NpyRows(ABC):
    """An array in a .npy file, of which ranges of rows are read on demand.

    Args:
        layout: The position and the format of the array.

    Attributes:
        shape: Shape of the array.
        dtype: Data type of the array.
        nbytes: Size of the array in bytes.
    """

    def __init__(self, layout: NpyLayout):
        self.shape = layout.shape
        self.dtype = layout.dtype
        self.nbytes = layout.nbytes
        self._offset = layout.offset
        self._row_bytes = layout.row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        array = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        self.read_into(start, array)
        return array

    @abstractmethod
    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read consecutive rows into a contiguous array."""

    @abstractmethod
    def prefetch(self, row: int) -> None:
        """Start to read a row in the background."""

    @abstractmethod
    def disable_read_ahead(self) -> None:
        """Prepare for reading single rows in random order."""

    @abstractmethod
    def is_truncated(self) -> bool:
        """Return whether the file is now shorter than the array."""


class NpyFile(NpyRows):
    """An array in a local .npy file.

    Args:
        path: The file.
        start: Position of the array in bytes, for a .npy file inside another file.

    Raises:
        OSError: The file cannot be opened.
        EOFError: The file is empty.
        ValueError: It is not a .npy file, is truncated, or is in Fortran order.
    """

    def __init__(self, path: Path, start: int = 0):
        self.path = path
        with path.open("rb") as file:
            file.seek(start)
            layout = read_npy_layout(file, os.fstat(file.fileno()).st_size)
            self._descriptor = os.dup(file.fileno())
        super().__init__(layout)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read consecutive rows into a contiguous array.

        Raises:
            OSError: The disk failed, or the file was truncated after it was opened.
        """
        position = self._offset + start * self._row_bytes
        num_read = os.preadv(self._descriptor, [out.data], position) if out.nbytes else 0
        if num_read < out.nbytes:
            buffer = out.data.cast("B")[num_read:]
            read_at(self._descriptor, position + num_read, buffer)

    def is_truncated(self) -> bool:
        """Return whether the file is now shorter than the array."""
        return os.fstat(self._descriptor).st_size < self._offset + self.nbytes

    def disable_read_ahead(self) -> None:
        """Disable the kernel's read-ahead, which would read megabytes around each row."""
        self._advise("POSIX_FADV_RANDOM", 0, 0)

    def prefetch(self, row: int) -> None:
        """Advise the kernel to read a row in the background."""
        position = self._offset + row * self._row_bytes
        self._advise("POSIX_FADV_WILLNEED", position, self._row_bytes)

    def _advise(self, advice: str, position: int, num_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, position, num_bytes, getattr(os, advice))
