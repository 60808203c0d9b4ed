"""Read images of samples or references, one batch at a time.

Only one batch is in memory at a time, because 50,000 images of 256x256 pixels take 10 GB.
Shapes: n images in total, B images per batch, H x W pixels per image.
"""

import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from common.cli import UserError, describe_read_error
from common.files import NPY_READ_ERRORS, ZIP_READ_ERRORS
from common.lfs import describe_lfs_pointer
from common.logs import get_logger
from common.npy_file import NpyFile, read_npy_header
from evaluations.metrics import MANIFOLD_NEIGHBOURS
from preprocessing.image_source import ImageSource
from preprocessing.images import load_square_or_user_error
from preprocessing.sources import open_source

logger = get_logger(__name__)

CHUNK_SIZE = 1 << 20  # number of bytes to read at a time for the CRC
READ_ERRORS = (*NPY_READ_ERRORS, *ZIP_READ_ERRORS)
LOCAL_HEADER_SIZE = 30  # bytes of a zip member's local header, without the name and the extra field
LENGTHS_OFFSET = 26  # position in the local header of the 16-bit lengths of these two fields


class Images(ABC):
    """Base class of readers of images of one size.

    Attributes:
        count: Number of images.
        size: Height and width of the images.
    """

    count: int
    size: tuple[int, int]

    @abstractmethod
    def read_batch(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop - 1, (B, 3, H, W) uint8.

        Batches are read fastest in ascending order.
        """

    def verify(self) -> None:  # noqa: B027 (most sources store no checksum)
        """Compare the stored bytes with their checksum, if there is one.

        Raises:
            UserError: If the file is damaged.
        """


class NpzFile:
    """Reads individual arrays of an .npz file in ADM's format.

    Args:
        path: The file.
        flag: Flag that selected the file, for error messages.

    Raises:
        UserError: If the file cannot be read as .npz.
    """

    def __init__(self, path: Path, flag: str):
        self.path = path
        self.flag = flag
        with self._report_read_errors(), zipfile.ZipFile(path) as archive:
            self.members = {
                member.filename.removesuffix(".npy"): member for member in archive.infolist()
            }

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read_array(self, name: str) -> np.ndarray | None:
        """Return a whole array, or None if the file does not contain it.

        Raises:
            UserError: If the file is damaged.
        """
        if name not in self:
            return None
        with self._report_read_errors(), np.load(self.path) as content:
            return content[name]

    @contextmanager
    def _report_read_errors(self) -> Iterator[None]:
        """Convert exceptions that an unreadable file causes in this context to UserError."""
        try:
            yield
        except UserError:
            raise
        except READ_ERRORS as error:
            if problem := describe_lfs_pointer(self.path):
                raise UserError(f"{self.flag}: {problem}") from None
            reason = describe_read_error(error)
            raise UserError(
                f"{self.flag} {self.path} is damaged or is not an .npz ({reason}): use another file"
            ) from None


class NpzImages(NpzFile, Images):
    """The images in arr_0 of an .npz file.

    The rows of an uncompressed array, as written by np.savez and sample_ddp.py, are read directly.
    A compressed array is decompressed while it is read. Several threads may read at the same time.

    Args:
        path: The file.
        flag: Flag that selected the file, for error messages.

    Raises:
        UserError: If arr_0 is missing, cannot be read or is not uint8 of shape (n, H, W, 3).
    """

    def __init__(self, path: Path, flag: str):
        super().__init__(path, flag)
        if "arr_0" not in self:
            names = ", ".join(self.members) or "no arrays"
            raise UserError(f"{flag} {path} contains no array arr_0; it contains {names}")
        self.member = self.members["arr_0"]
        self.stream: IO[bytes] | None = None
        self.lock = threading.Lock()
        self.file: NpyFile | None = None
        with (
            self._report_read_errors(),
            zipfile.ZipFile(path) as archive,
            archive.open(self.member) as file,
        ):
            self.shape, fortran_order, dtype = read_npy_header(file)
            self.header_size = file.tell()
            if dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or fortran_order:
                order = " in Fortran order" if fortran_order else ""
                raise UserError(
                    f"{flag} {path}: arr_0 must be uint8 of shape (n, H, W, 3), "
                    f"but it is {dtype} {self.shape}{order}"
                )
            self.count = self.shape[0]
            self.size = self.shape[1:3]
            if self.member.compress_type == zipfile.ZIP_STORED:
                self.file = NpyFile(path, _find_member_offset(path, self.member))

    def verify(self) -> None:
        """Read arr_0 once to compare it with its CRC, which reads of single rows do not check."""
        with (
            self._report_read_errors(),
            zipfile.ZipFile(self.path) as archive,
            archive.open(self.member) as file,
        ):
            while file.read(CHUNK_SIZE):
                pass

    def read_labels(self) -> np.ndarray | None:
        """Return the classes in arr_1, (n,) int64, or None if the file contains no arr_1.

        Raises:
            UserError: If arr_1 is damaged or does not contain one integer per image.
        """
        labels = self.read_array("arr_1")
        if labels is None:
            return None
        requirement = f"{self.path}: arr_1 must contain the classes of {self.count} images"
        if labels.shape != (self.count,):
            raise UserError(f"{requirement}, but its shape is {labels.shape}")
        with np.errstate(invalid="ignore"):
            if labels.dtype.kind not in "fiu" or (labels % 1 != 0).any():  # True for NaN
                raise UserError(
                    f"{requirement}, but it contains {labels.dtype} values that are not integers"
                )
        return labels.astype(np.int64)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop - 1 in the stored layout, (B, H, W, 3).

        Raises:
            UserError: If the file is damaged.
        """
        with self._report_read_errors():
            if self.file is not None:
                return self.file[start:stop]
            with self.lock:
                return self._decompress(start, stop)

    def _decompress(self, start: int, stop: int) -> np.ndarray:
        if self.stream is None:
            archive = zipfile.ZipFile(self.path)
            self.stream = archive.open(self.member)
        stop = min(stop, self.count)
        image_size = int(np.prod(self.shape[1:]))
        # To seek backwards, zipfile decompresses the array again from its beginning.
        self.stream.seek(self.header_size + start * image_size)
        data = self.stream.read((stop - start) * image_size)
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop - 1, (B, 3, H, W)."""
        return np.ascontiguousarray(self.read_rows(start, stop).transpose(0, 3, 1, 2))


def _find_member_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Return the position of the first byte of an uncompressed member in a zip file.

    The lengths of name and extra field are read from the local header, because they may differ from
    the lengths in the central directory.
    """
    lengths = np.fromfile(path, "<u2", 2, offset=member.header_offset + LENGTHS_OFFSET)
    return member.header_offset + LOCAL_HEADER_SIZE + int(lengths.sum())


class SourceImages(Images):
    """Images of a folder, zip, tar or parquet file, centre-cropped to `resolution` as in ADM."""

    def __init__(self, source: ImageSource, resolution: int, flag: str):
        self.source = source
        self.flag = flag
        self.count = len(source)
        self.size = (resolution, resolution)

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop - 1, (B, 3, H, W).

        Raises:
            UserError: If an image cannot be used.
        """
        indices = range(start, min(stop, self.count))
        images = [
            load_square_or_user_error(self.source, i, self.size[0], self.flag) for i in indices
        ]
        return np.stack(images)


class ImageSubset(Images):
    """A subset of other images, at the given indices, (n,)."""

    def __init__(self, images: Images, indices: np.ndarray):
        self.images = images
        self.indices = indices
        self.count = len(indices)
        self.size = images.size

    def read_batch(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop - 1 of the subset, (B, 3, H, W)."""
        images = [self.images.read_batch(i, i + 1) for i in self.indices[start:stop]]
        return np.concatenate(images)


def open_images(
    path: Path, resolution: int, flag: str, neighbours: int = MANIFOLD_NEIGHBOURS
) -> Images:
    """Open the images in an .npz file, folder, zip, tar or parquet file.

    Args:
        path: The file, folder or glob pattern.
        resolution: Height and width. Images that are not in an .npz file are cropped to this size.
        flag: Flag that selected the path, for error messages.
        neighbours: Number of nearest neighbours to find for each image. More images than this
            number are required.

    Raises:
        UserError: If the images cannot be read, have another size or are too few.
    """
    images: Images
    if path.suffix == ".npz":
        images = NpzImages(path, flag)
    else:
        source = open_source(path, flag, is_unlabeled=True)
        if source.ignored:
            logger.info("%s %s: %s", flag, path, source.ignored)
        images = SourceImages(source, resolution, flag)
    height, width = images.size
    if images.size != (resolution, resolution) or images.count <= neighbours:
        raise UserError(
            f"{flag} {path} contains {images.count} images of {height}x{width}: "
            f"use more than {neighbours} images of {resolution}x{resolution}"
        )
    return images
