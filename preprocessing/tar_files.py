"""Read images from tar files: one file, a folder of files, WebDataset, or ImageNet's nested tar.

The messages of errors that `open` raises must not be reworded (see preprocessing/image_source.py).
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from common.cli import UserError
from preprocessing.image_source import ImageSource
from preprocessing.listing import Listing

MAX_OPEN_FILES = 64  # open tar files per process


@dataclass(eq=False, repr=False)
class TarSource(ImageSource):
    """A source that reads images from tar files.

    Attributes:
        files: The tar files.
        locations: The index into `files`, the offset in bytes and the size in bytes of each image,
            (n, 3) int64.
    """

    files: list[Path]
    locations: np.ndarray
    _descriptors: dict[int, int] = field(default_factory=dict)

    def open(self, image_index: int) -> BinaryIO:
        """Return the stored bytes of an image (see ImageSource.open)."""
        file_index, offset, size = self.locations[image_index].tolist()
        # pread does not move the file offset, so forked processes can share a descriptor.
        data = os.pread(self._open_descriptor(file_index), size, offset)
        if len(data) < size:
            raise OSError(f"{self.files[file_index].name} ends early")
        return io.BytesIO(data)

    def _open_descriptor(self, file_index: int) -> int:
        if file_index not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_FILES:
                oldest = next(iter(self._descriptors))
                os.close(self._descriptors.pop(oldest))
            self._descriptors[file_index] = os.open(self.files[file_index], os.O_RDONLY)
        return self._descriptors[file_index]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": {}}


def _iter_members(
    file: BinaryIO, ignored: Counter[str], prefix: str = ""
) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of each file in a tar file, and count links in `ignored`.

    A nested tar file is treated as a folder.

    Raises:
        tarfile.TarError: The file is damaged or truncated. tarfile itself treats an unreadable
            header as the end of the file.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in archive:
            # Without this, tarfile would keep about 1 KB per entry in memory.
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it
            name = str(PurePosixPath(prefix + entry.name.lstrip("/")))
            if entry.islnk() or entry.issym():
                ignored["links"] += 1
            if not entry.isreg() or entry.issparse():
                continue
            if name.endswith(".tar"):
                file.seek(entry.offset_data)
                folder = name.removesuffix(".tar") + "/"
                nested_members = list(_iter_members(file, ignored, folder))
                if not nested_members:
                    raise tarfile.ReadError(f"the nested tar file {name} is empty")
                yield from nested_members
            else:
                yield name, entry.offset_data, entry.size

        # A complete tar file ends with blocks of zeros.
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
            subject = "the file"
            if prefix:
                subject = f"the nested tar file {prefix.rstrip('/')}.tar"
            raise tarfile.ReadError(f"{subject} is damaged or truncated at byte {archive.offset:,}")


def list_tars(path: Path, files: list[Path], flag: str) -> Listing:
    """List the files in one or more tar files.

    Args:
        path: The file, folder or pattern that the user specified.
        files: The tar files.
        flag: The command-line flag that specifies the path, for error messages.

    Raises:
        UserError: A file is damaged.
    """

    def read(location: tuple[int, int, int]) -> bytes:
        file_index, offset, size = location
        with files[file_index].open("rb") as stream:
            return os.pread(stream.fileno(), size, offset)

    listing = Listing(read)
    # ImageNet has one tar file per class.
    is_class_per_tar = len(files) > 1 and all(re.fullmatch(r"n\d{8}", file.stem) for file in files)
    for file_index, file in enumerate(files):
        scope = ""
        if len(files) > 1:
            scope = f"{file.relative_to(path) if path.is_dir() else file.name}:"
        folder = f"{file.stem}/" if is_class_per_tar else ""
        try:
            with file.open("rb") as stream:
                for name, offset, size in _iter_members(stream, listing.ignored):
                    listing.add(scope + name, (file_index, offset, size), scope, folder + name)
        except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {file} is not a readable tar file ({error})") from None
    return listing
