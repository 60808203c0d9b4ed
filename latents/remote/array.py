"""Read rows of a .npy file under a URL with ranged requests."""

import io
from collections import deque
from collections.abc import Iterator

import numpy as np

from common.npy_file import NpyLayout, NpyRows, read_npy_layout
from latents.remote.files import NUM_CONNECTIONS, PendingRead, RemoteFiles

HEADER_BYTES = 4096  # bytes that are requested for the header, which usually has 128
BLOCK_BYTES = 8 << 20  # larger reads are split into concurrent requests


def read_remote_layout(files: RemoteFiles, name: str) -> NpyLayout:
    """Read the header of a .npy file.

    Raises:
        FileNotFoundError: The file does not exist.
        EOFError: The file is empty.
        ValueError: It is not a .npy file, is truncated, or is in Fortran order.
        CacheError: The file cannot be read.
    """
    header, file_size = files.read(name, 0, HEADER_BYTES)
    return read_npy_layout(io.BytesIO(header), file_size)


class RemoteArray(NpyRows):
    """An array in a .npy file under a URL.

    Args:
        files: The files under the URL.
        name: The file.
        layout: Result of `read_remote_layout`.
    """

    def __init__(self, files: RemoteFiles, name: str, layout: NpyLayout):
        super().__init__(layout)
        self._files = files
        self._name = name
        self._prefetched: dict[int, PendingRead] = {}

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read consecutive rows into a contiguous array.

        Raises:
            FileNotFoundError: The file does not exist any more.
            CacheError: The file cannot be read, or has changed.
        """
        if not out.nbytes:
            return
        buffer = out.data.cast("B")
        prefetched = self._prefetched.pop(start, None)
        if prefetched and len(out) == 1:
            buffer[:] = prefetched.wait()
            return
        position = self._offset + start * self._row_bytes
        num_read = 0
        for block in self._read_blocks(position, position + out.nbytes):
            buffer[num_read : num_read + len(block)] = block
            num_read += len(block)

    def _read_blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Read a range of the file in blocks, several of which are requested at a time."""
        pending: deque[PendingRead] = deque()
        for begin in range(start, stop, BLOCK_BYTES):
            if len(pending) == NUM_CONNECTIONS:
                yield pending.popleft().wait()
            end = min(begin + BLOCK_BYTES, stop)
            pending.append(self._files.request(self._name, begin, end))
        while pending:
            yield pending.popleft().wait()

    def prefetch(self, row: int) -> None:
        """Request a row in the background."""
        if row not in self._prefetched:
            start = self._offset + row * self._row_bytes
            self._prefetched[row] = self._files.request(self._name, start, start + self._row_bytes)

    def disable_read_ahead(self) -> None:
        """Do nothing, because only the requested bytes are read."""

    def is_truncated(self) -> bool:
        """Return False; a file that changes is reported when it is read."""
        return False
