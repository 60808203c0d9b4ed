"""Read rows of a shard, with prefetching while the disk is slow."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import describe_read_error
from common.lfs import describe_lfs_pointer
from common.npy_file import NpyFile, NpyRows
from latents.manifest import CacheError

PREFETCH_BATCHES = 8  # number of batches to prefetch after a batch that stalled on the disk
MIN_MEMORY_BANDWIDTH = 2e9  # bytes per second; a slower copy must have stalled on the disk
ROW_OVERHEAD = 2e-6  # seconds per row that the loop takes in addition to the copy itself


class ShardReader:
    """A shard file that has been validated.

    Args:
        path: The .npy file, or its URL.
        num_rows: Number of rows according to the manifest.
        row_format: Shape and data type of a row, as a subarray dtype such as "(8, 32, 32)f2".
        remedy: Instruction for the error message if the file is missing, damaged or different.
        open_file: Function that opens the file; by default, `path` is opened as a local file.

    Attributes:
        path: The .npy file, or its URL.
        remedy: Instruction for error messages about the file.
        file: The array in the file, (num_rows, ...).

    Raises:
        CacheError: The file cannot be read, or it does not match the manifest.
    """

    def __init__(
        self,
        path: Path | str,
        num_rows: int,
        row_format: np.dtype,
        remedy: str,
        open_file: Callable[[], NpyRows] | None = None,
    ):
        self.path = path
        self.remedy = remedy
        self.file: NpyRows
        with self._convert_errors():
            self.file = open_file() if open_file else NpyFile(Path(path))
        expected = (num_rows, *row_format.shape)
        shape = self.file.shape
        if (shape, self.file.dtype) != (expected, row_format.base):
            hint = ""
            if len(shape) == 4 and 2 * shape[1] == expected[1]:
                hint = (
                    f" ({shape[1]} channels indicate latents, "
                    f"but a cache contains moments, which have {expected[1]} channels)"
                )
            raise CacheError(
                f"{path} has shape {shape} and dtype {self.file.dtype}, but the manifest "
                f"specifies {expected} and {row_format.base}{hint}; {remedy}"
            )

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows start to stop - 1; by default, all rows.

        Raises:
            CacheError: The file cannot be read.
        """
        with self._convert_errors():
            return self.file[start:stop]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read consecutive rows into a contiguous array.

        Raises:
            CacheError: The file cannot be read.
        """
        try:
            self.file.read_into(start, out)
        except OSError as error:
            raise self._make_error(error) from None

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except CacheError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise self._make_error(error) from None

    def _make_error(self, error: Exception) -> CacheError:
        if isinstance(self.path, Path) and (problem := describe_lfs_pointer(self.path)):
            return CacheError(problem)
        message = f"{self.path} cannot be read ({describe_read_error(error)})"
        # Do not suggest the remedy for errors of the disk or machine: the file may be intact.
        if getattr(error, "errno", None) in (None, errno.ENOENT) or self._is_truncated():
            message += f"; {self.remedy}"
        return CacheError(message)

    def _is_truncated(self) -> bool:
        return hasattr(self, "file") and self.file.is_truncated()


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
