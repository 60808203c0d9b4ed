"""Read rows of a shard through a memory map, with prefetching while the disk is slow."""

import errno
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import NPY_READ_ERRORS
from common.lfs import describe_lfs_pointer
from latents.manifest import CacheError

PREFETCH_BATCHES = 8  # number of batches to prefetch after a batch that stalled on the disk
MIN_MEMORY_BANDWIDTH = 2e9  # bytes per second; a slower copy must have stalled on the disk
ROW_OVERHEAD = 2e-6  # seconds per row that the loop takes in addition to the copy itself


class ShardReader:
    """A shard file, validated and memory-mapped.

    Args:
        path: The .npy file.
        num_rows: Number of rows according to the manifest.
        row_format: Shape and data type of a row, as a subarray dtype such as "(8, 32, 32)f2".
        remedy: Instruction for the error message if the file is missing, damaged or different.

    Attributes:
        path: The .npy file.
        remedy: Instruction for error messages about the file.
        rows: The array in the file, (num_rows, ...), read-only.

    Raises:
        CacheError: The file cannot be read, or it does not match the manifest.
    """

    def __init__(self, path: Path, num_rows: int, row_format: np.dtype, remedy: str):
        self.path = path
        self.remedy = remedy
        try:
            array = np.load(path, mmap_mode="r")
        except NPY_READ_ERRORS as error:
            if problem := describe_lfs_pointer(path):
                raise CacheError(problem) from None
            message = f"{path} cannot be read ({error})"
            # Do not suggest the remedy for errors of the disk or machine: the file may be intact.
            if getattr(error, "errno", None) in (None, errno.ENOENT):
                message += f"; {remedy}"
            raise CacheError(message) from None
        expected = (num_rows, *row_format.shape)
        if (array.shape, array.dtype) != (expected, row_format.base):
            hint = ""
            if array.ndim == 4 and 2 * array.shape[1] == expected[1]:
                hint = (
                    f" ({array.shape[1]} channels indicate latents, "
                    f"but a cache contains moments, which have {expected[1]} channels)"
                )
            raise CacheError(
                f"{path} has shape {array.shape} and dtype {array.dtype}, but the manifest "
                f"specifies {expected} and {row_format.base}{hint}; {remedy}"
            )
        assert array.flags.c_contiguous, path
        self.rows = array.view(np.ndarray)
        self._file_map: mmap.mmap = array.base
        self._data_offset = array.offset

    def disable_read_ahead(self) -> None:
        """Disable the kernel's read-ahead, which would read megabytes around each row."""
        self._file_map.madvise(mmap.MADV_RANDOM)

    def prefetch(self, row: int) -> None:
        """Advise the kernel to read a row in the background."""
        row_bytes = self.rows.strides[0]
        begin = self._data_offset + row * row_bytes
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._file_map.madvise(mmap.MADV_WILLNEED, page, begin + row_bytes - page)

    def drop_pages(self) -> None:
        """Unmap the pages that have been read, so that the kernel can evict them."""
        self._file_map.madvise(mmap.MADV_DONTNEED)


@dataclass
class PrefetchPolicy:
    """Decides whether the rows of a batch are prefetched before they are copied.

    A copy slower than the memory bandwidth has waited for the disk. The next PREFETCH_BATCHES
    batches are then prefetched, so that the disk receives the requests for all rows of a batch at
    once. If all rows are in the page cache, prefetching only costs time.
    """

    remaining_batches: int = 0  # number of batches that are still to be prefetched

    def update(self, num_rows: int, row_bytes: int, seconds: float) -> None:
        """Record how long the rows of a batch took to copy."""
        expected_seconds = num_rows * (row_bytes / MIN_MEMORY_BANDWIDTH + ROW_OVERHEAD)
        if seconds > expected_seconds:
            self.remaining_batches = PREFETCH_BATCHES
        else:
            self.remaining_batches = max(0, self.remaining_batches - 1)
