"""Read tensors, or some of their rows, from .safetensors files without memory maps.

Rows are indices of the first dimension. A process needs host memory only for the rows that it
reads, and reading a truncated file raises an error.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from common.files import read_at

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FIRST_ROWS = "first_rows"  # key of the metadata; value: JSON object, name of a tensor -> row


class TensorFile:
    """A .safetensors file.

    Args:
        path: The file.

    Attributes:
        first_rows: Name of each tensor -> index of its first row in the whole tensor, if the file
            holds some of the rows.

    Raises:
        OSError: The file cannot be read.
        ValueError, KeyError: The header is damaged.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if 8 + header_size > file_size:
                raise ValueError("the file is truncated")
            header = json.loads(file.read(header_size))
            self._descriptor = os.dup(file.fileno())
        metadata = header.pop("__metadata__", {})
        self.first_rows: dict[str, int] = json.loads(metadata.get(FIRST_ROWS, "{}"))
        self.entries: dict[str, dict] = header
        self._data_offset = 8 + header_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.entries[name]["shape"])

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor, or `count` rows starting with the row `first`.

        Raises:
            OSError: The file cannot be read, or was truncated after it was opened.
        """
        entry = self.entries[name]
        shape = list(entry["shape"])
        dtype = DTYPES[entry["dtype"]]
        offset = self._data_offset + entry["data_offsets"][0]
        if count is not None:
            offset += first * math.prod(shape[1:]) * dtype.itemsize
            shape[0] = count
        tensor = torch.empty(shape, dtype=dtype)
        read_at(self._descriptor, offset, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor


class StoredTensors:
    """The tensors of one or several .safetensors files, each of which may hold some of the rows.

    Args:
        paths: The files.

    Raises:
        OSError, ValueError, KeyError: A file cannot be read.
    """

    def __init__(self, paths: list[Path]):
        # Name of each tensor -> its files with their first rows, in the order of the rows.
        self.parts: dict[str, list[tuple[int, TensorFile]]] = {}
        for path in paths:
            file = TensorFile(path)
            for name in file.entries:
                first = file.first_rows.get(name, 0)
                self.parts.setdefault(name, []).append((first, file))
        for parts in self.parts.values():
            parts.sort(key=lambda part: part[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        first, file = self.parts[name][-1]
        shape = file.shape(name)
        return (first + shape[0], *shape[1:]) if shape else shape

    def copy_rows(self, name: str, first: int, out: Tensor) -> None:
        """Copy the rows of a tensor from the row `first` to `out`, on any device.

        Raises:
            OSError: A file cannot be read, or was truncated after it was opened.
        """
        if not out.dim():
            out.copy_(self.parts[name][0][1].read(name))
            return
        stop = first + len(out)
        for part_first, file in self.parts[name]:
            part_stop = part_first + file.shape(name)[0]
            begin = max(first, part_first)
            count = min(stop, part_stop) - begin
            if count > 0:
                rows = file.read(name, begin - part_first, count)
                out[begin - first : begin - first + count].copy_(rows)


def part_name(name: str, index: int, count: int) -> str:
    """Return the name of the file that holds a part of the rows of `name`, a .safetensors file."""
    stem = name.removesuffix(".safetensors")
    return f"{stem}-{index:05d}-of-{count:05d}.safetensors"


def find_parts(folder: Path, name: str) -> list[Path]:
    """Return the file `name` in a folder, or the files that hold its parts if it does not exist."""
    path = folder / name
    if not path.exists():
        parts = list(folder.glob(f"{path.stem}-*-of-*.safetensors"))
        if parts:
            return parts
    return [path]
