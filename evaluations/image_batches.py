"""Images to evaluate, read a batch at a time: samples or references, from an .npz, a folder, a zip.

n images, B of a batch, H W pixels. Nothing holds more than the batch it was asked for: 50,000 samples are 10 GB.
"""

import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common.cli import UserError
from preprocessing.images import load_square_or_user_error
from preprocessing.sources import ImageSource, open_source


class Images:
    """n images of H x W pixels."""

    count: int
    size: tuple[int, int]

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        """Images start..stop-1: (B, 3, H, W) uint8. Fastest in ascending order."""
        raise NotImplementedError


class NpzFile:
    """An .npz file as ADM writes it, of which only what is asked for is read. Raises UserError if it is none."""

    def __init__(self, path: Path, flag: str):
        self.path, self.flag = path, flag
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {
                    name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist()
                }
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self._broken(error) from None

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read_array(self, name: str) -> np.ndarray | None:
        """A whole array, or None if there is none of this name. Raises UserError."""
        if name not in self.members:
            return None
        try:
            with np.load(self.path) as content:
                return content[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise self._broken(error) from None

    def open_images(self) -> Images:
        """arr_0. Raises UserError if it is not there, or not (n, H, W, 3) uint8."""
        if "arr_0" not in self:
            names = ", ".join(self.members) or "nothing"
            raise UserError(
                f"{self.flag} {self.path} holds no images under arr_0; it holds {names}"
            )
        try:
            return NpzImages(self)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise error if isinstance(error, UserError) else self._broken(error) from None

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.flag} {self.path} cannot be read as .npz ({error})")


class NpzImages(Images):
    """arr_0 of an .npz: mapped where it is stored plainly, as np.savez does; else unpacked as it is read."""

    def __init__(self, npz: NpzFile):
        self.path, self.member = npz.path, npz.members["arr_0"]
        self.flag, self.stream, self.lock = npz.flag, None, threading.Lock()
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, fortran, dtype = read(file)
            self.header = file.tell()
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or fortran:
            found = f"{dtype} {self.shape}{' in Fortran order' if fortran else ''}"
            raise UserError(
                f"{npz.flag} {self.path}: arr_0 must be uint8 of shape (n, H, W, 3), it is {found}"
            )
        self.count, self.size = self.shape[0], self.shape[1:3]
        self.map = None
        if self.member.compress_type == zipfile.ZIP_STORED and self.count:
            with open(
                self.path, "rb"
            ) as file:  # the local header's name and extra field may differ from the directory's
                file.seek(self.member.header_offset + 26)
                begin = (
                    self.member.header_offset
                    + 30
                    + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
                )
            self.map = np.memmap(self.path, np.uint8, "r", begin + self.header, self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """(B, H, W, 3), as they lie in the file. Raises UserError where it is damaged."""
        if self.map is not None:
            return self.map[start:stop]
        try:
            with self.lock:
                return self._unpacked(start, stop)
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.flag} {self.path} is damaged ({error})") from None

    def _unpacked(self, start: int, stop: int) -> np.ndarray:
        if self.stream is None:
            self.stream = zipfile.ZipFile(self.path).open(self.member)  # noqa: SIM115  kept open for the batches to come
        each = int(np.prod(self.shape[1:]))
        self.stream.seek(
            self.header + start * each
        )  # back to an earlier one means to unpack from the beginning
        stop = min(stop, self.count)
        return np.frombuffer(self.stream.read((stop - start) * each), np.uint8).reshape(
            stop - start, *self.shape[1:]
        )

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self.read_rows(start, stop).transpose(0, 3, 1, 2))


class SourceImages(Images):
    """Images of a folder, zip, tar or parquet (preprocessing/sources.py), centre-cropped to `side` as ADM does."""

    def __init__(self, source: ImageSource, side: int, flag: str):
        self.source, self.flag, self.count, self.size = source, flag, len(source), (side, side)

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        return np.stack(
            [
                load_square_or_user_error(self.source, i, self.size[0], self.flag)
                for i in range(start, min(stop, self.count))
            ]
        )


class ImageSubset(Images):
    """Some of the images, by their numbers (n,)."""

    def __init__(self, images: Images, numbers: np.ndarray):
        self.images, self.numbers, self.count, self.size = (
            images,
            numbers,
            len(numbers),
            images.size,
        )

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.images.read_batch(i, i + 1) for i in self.numbers[start:stop]])


def open_images(path: Path, side: int, flag: str) -> Images:
    """Whatever holds images. Raises UserError naming `flag`."""
    if path.suffix == ".npz":
        return NpzFile(path, flag).open_images()
    return SourceImages(open_source(path, flag), side, flag)
