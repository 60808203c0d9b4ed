"""Arrays in memory that several processes of a machine share, however they were started."""

import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Literal

import numpy as np


class SharedArray:
    """An array in shared memory.

    Pickling it transfers only its location, and the receiving process maps the same memory when it
    first reads the array. This works for processes that are started with fork, spawn or forkserver.
    The memory is freed when the last process that uses it exits, even if it is killed.

    Args:
        shape: Shape of the array, which the creating process must fill.
        dtype: Data type of the array.

    Attributes:
        shape: Shape of the array.
        dtype: Data type of the array.
        location: Path or name under which other processes can map the memory. The process that
            created the array must still exist then.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape = shape
        self.dtype = dtype
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._owner_pid: int | None = os.getpid()
        self._descriptor: int | None = None
        self._block: SharedMemory | None = None
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("latents")
            os.ftruncate(self._descriptor, num_bytes)
            self.location = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            self._array: np.ndarray | None = self._map_file("r+")
        else:
            # On macOS, Python's resource tracker frees the memory if this process is killed.
            self._block = SharedMemory(create=True, size=num_bytes)
            self.location = self._block.name
            self._array = self._map_block(self._block)

    @property
    def array(self) -> np.ndarray:
        """Return the array. Only the process that created it may write to it."""
        if self._array is None:
            if self.location.startswith("/proc/"):
                self._array = self._map_file("r")
            else:
                self._block = SharedMemory(self.location)
                self._array = self._map_block(self._block)
                self._array.flags.writeable = False
        return self._array

    def _map_file(self, mode: Literal["r", "r+"]) -> np.ndarray:
        return np.memmap(self.location, self.dtype, mode).reshape(self.shape)

    def _map_block(self, block: SharedMemory) -> np.ndarray:
        # The block may be larger than the array, because its size is a multiple of the page size.
        return np.ndarray(self.shape, self.dtype, block.buf)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_owner_pid": None,
            "_descriptor": None,
            "_block": None,
            "_array": None,
        }

    def __del__(self) -> None:
        is_owner = os.getpid() == self._owner_pid  # a forked process has a copy of this object
        if self._descriptor is not None and is_owner:
            os.close(self._descriptor)
        self._array = None  # a block cannot be closed while an array uses it
        if self._block is not None:
            self._block.close()
            if is_owner:
                self._block.unlink()
