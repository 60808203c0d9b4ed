"""Read images from tar files: one file, a folder of files, WebDataset, or ImageNet's nested tar.

The messages of errors that `open` raises must not be reworded (see preprocessing/image_source.py).
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from common.cli import UserError
from preprocessing.image_source import ImageSource
from preprocessing.labels import (
    LabelTable,
    assign_labels,
    assign_labels_from_folders,
    index_classes,
    is_image_name,
    parse_dataset_json,
    summarize_names,
)

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


class TarMember(NamedTuple):
    """An image or a label file inside a tar file.

    Attributes:
        file_index: The index of the tar file.
        name: The path inside the tar file.
        offset: The position of the content in bytes.
        size: The size of the content in bytes.
        label_file: The content of a .cls file or dataset.json, or None for an image.
    """

    file_index: int
    name: str
    offset: int
    size: int
    label_file: bytes | None = None


def _iter_members(file: BinaryIO, file_index: int, prefix: str = "") -> Iterator[TarMember]:
    """Yield the images and label files of a tar file. A nested tar file is treated as a folder.

    Raises:
        tarfile.TarError: The file is damaged or truncated. tarfile itself treats an unreadable
            header as the end of the file.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in archive:
            # Without this, tarfile would keep about 1 KB per entry in memory.
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it
            name = str(PurePosixPath(prefix + entry.name.lstrip("/")))
            if not entry.isreg() or entry.issparse():
                continue
            file.seek(entry.offset_data)
            member = TarMember(file_index, name, entry.offset_data, entry.size)
            if name.endswith(".tar"):
                nested_members = list(
                    _iter_members(file, file_index, name.removesuffix(".tar") + "/")
                )
                if not nested_members:
                    raise tarfile.ReadError(f"the nested tar file {name} contains no images")
                yield from nested_members
            elif name.endswith(".cls") or PurePosixPath(name).name == "dataset.json":
                yield member._replace(label_file=file.read(entry.size))
            elif is_image_name(name):
                yield member

        # A complete tar file ends with blocks of zeros.
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
            subject = "the file"
            if prefix:
                subject = f"the nested tar file {prefix.rstrip('/')}.tar"
            raise tarfile.ReadError(f"{subject} is damaged or truncated at byte {archive.offset:,}")


def open_tars(path: Path, files: list[Path], flag: str, table: LabelTable | None) -> ImageSource:
    """List the images of tar files and determine their labels.

    Args:
        path: The file, folder or pattern that the user specified.
        files: The tar files.
        flag: The command-line flag that specifies the path, for error messages.
        table: The classes from --labels, or None.

    Raises:
        UserError: A file is damaged, or the labels are missing or inconsistent.
    """
    # List the images and read the label files of all tar files.
    origin = f"{flag} {path}"
    images: dict[str, TarMember] = {}
    classes: dict[str, str] = {}  # content of WebDataset's .cls files by path without the suffix
    for file_index, file in enumerate(files):
        prefix = ""
        if len(files) > 1:
            file_name = file.relative_to(path) if path.is_dir() else file.name
            prefix = f"{file_name}:"
        try:
            with file.open("rb") as stream:
                for member in _iter_members(stream, file_index):
                    if member.label_file is None:
                        # As in tar, the last of several entries with the same name is used.
                        images[prefix + member.name] = member
                    elif member.name.endswith(".cls"):
                        key = prefix + member.name.removesuffix(".cls")
                        classes[key] = member.label_file.decode().strip()
                    elif table is None and len(files) == 1:
                        table = parse_dataset_json(
                            member.label_file, f"{flag} {file}: {member.name}"
                        )
                        folder = member.name.removesuffix("dataset.json")
                        classes_by_path = {folder + k: v for k, v in table.classes.items()}
                        table = table._replace(classes=classes_by_path)
        except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {file} is not a readable tar file ({error})") from None

    # Assign a class to each image.
    names = sorted(images)
    sorted_images = [images[name] for name in names]
    members = [image.name for image in sorted_images]
    if table is not None:
        labels, class_names = assign_labels(members, table)
    elif classes:
        labels, class_names = _read_webdataset_labels(names, members, classes, origin)
    elif len(files) > 1 and all(re.fullmatch(r"n\d{8}", file.stem) for file in files):
        # ImageNet has one tar file per class.
        paths = [f"{files[image.file_index].stem}/{image.name}" for image in sorted_images]
        labels, class_names = assign_labels_from_folders(paths, origin)
    else:
        labels, class_names = assign_labels_from_folders(members, origin)

    rows = [(image.file_index, image.offset, image.size) for image in sorted_images]
    locations = np.array(rows, np.int64).reshape(-1, 3)
    return TarSource(path, names, labels, class_names, files=files, locations=locations)


def _read_webdataset_labels(
    names: list[str], members: list[str], classes: dict[str, str], origin: str
) -> tuple[np.ndarray, list[str]]:
    """Read the class of each image from the .cls file with the same WebDataset key.

    Args:
        names: The sorted names of the images.
        members: The same names without the prefix that identifies the tar file.
        classes: The content of the .cls files by key.
        origin: The flag and path of the source, for error messages.

    Returns:
        The labels, (n,) int64, and the names of all classes.
    """
    keys = [_make_webdataset_key(name, member) for name, member in zip(names, members)]
    missing_names = [name for name, key in zip(names, keys) if key not in classes]
    if missing_names:
        raise UserError(f"{origin} has no .cls file for {summarize_names(missing_names)}")
    for key, next_key in zip(keys, keys[1:]):
        if key == next_key:
            raise UserError(f"{origin} has two images for {key}.cls; remove one of them")
    return index_classes([classes[key] for key in keys], None, origin)


def _make_webdataset_key(name: str, member: str) -> str:
    """Return the name of an image without its extensions.

    The extensions start at the first dot of the file name.
    """
    file_name = member.rpartition("/")[2]
    _, dot, extensions = file_name.partition(".")
    return name.removesuffix(dot + extensions)
