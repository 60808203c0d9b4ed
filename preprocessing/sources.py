"""Image sources: lists of image names and labels, with access to the stored bytes of each image.

Sources are folder trees, EDM's zip files, tar files (one file, a folder of files, WebDataset, or
ImageNet's tar of tars), and Hugging Face's parquet files. A source can be read in forked processes
and can be pickled.

The messages of errors that `open` raises are stored in skipped.jsonl and are compared with those of
existing caches, so they must not be reworded.
"""

import copy
import glob
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from common import cli
from common.cli import UserError
from preprocessing.labels import (
    IMAGE_EXTENSIONS,
    LabelTable,
    assign_labels,
    assign_labels_from_folders,
    index_classes,
    is_image_name,
    parse_dataset_json,
    read_label_file,
    summarize_names,
)

if TYPE_CHECKING:
    import pyarrow

MAX_OPEN_FILES = 64  # open tar files per process
COMPRESSION_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
COMPRESSED_TARS = {".tgz", *(f".tar{suffix}" for suffix in COMPRESSION_SUFFIXES)}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")


@dataclass(eq=False, repr=False)
class ImageSource:
    """Images in a fixed order, read from the files of a folder.

    Attributes:
        root: The folder that contains the images. In subclasses, also an archive file or a glob
            pattern.
        names: The name of each image: its path relative to `root`.
        labels: The class index of each image, (n,) int64.
        class_names: The names of all classes.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, image_index: int) -> BinaryIO:
        """Return the stored bytes of an image as a file object. Raises OSError."""
        path = self.root / self.names[image_index]
        if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe could block forever
            raise OSError("not a file")
        return path.open("rb")

    def digest(self, count: int) -> str:
        """Return the sha256 of the first `count` names and labels and of all class names."""
        digest = hashlib.sha256(json.dumps([self.class_names, count]).encode())
        for name in self.names[:count]:
            digest.update(os.fsencode(name) + b"\0")
        digest.update(self.labels[:count].astype(np.int64).tobytes())
        return digest.hexdigest()


@dataclass(eq=False, repr=False)
class ZipSource(ImageSource):
    """Images in a zip file."""

    _archive: zipfile.ZipFile | None = None
    _process_id: int = 0

    def open(self, image_index: int) -> BinaryIO:
        """Return the stored bytes of an image (see ImageSource.open)."""
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.root)
        elif self._process_id != os.getpid():
            # A forked process inherits the list of members, but it must open the file again,
            # because forked processes share the file offset.
            self._archive = copy.copy(self._archive)
            self._archive.fp = self.root.open("rb")
        self._process_id = os.getpid()
        return io.BytesIO(self._archive.read(self.names[image_index]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}


@dataclass(eq=False, repr=False)
class TarSource(ImageSource):
    """Images in tar files.

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


@dataclass(eq=False, repr=False)
class ParquetSource(ImageSource):
    """Images in the rows of parquet files.

    Attributes:
        files: The parquet files.
        locations: The index into `files`, the row group and the row in the group of each image,
            (n, 3) int64.
        column: The name of the column that contains the images.
    """

    files: list[Path]
    locations: np.ndarray
    column: str
    _loaded_group: tuple[int, int] | None = None
    _cells: Any = None  # the image column of the loaded row group

    def open(self, image_index: int) -> BinaryIO:
        """Return the stored bytes of an image (see ImageSource.open)."""
        file_index, group, row = self.locations[image_index].tolist()
        if self._loaded_group != (file_index, group):
            self._cells = self._read_group(file_index, group)
            self._loaded_group = (file_index, group)
        cell = self._cells[row].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise OSError("the row holds no bytes")
        return io.BytesIO(data)

    def _read_group(self, file_index: int, group: int) -> Any:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.files[file_index]) as parquet:
            return parquet.read_row_group(group, [self.column], use_threads=False).column(0)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_loaded_group": None, "_cells": None}


def open_source(path: Path, flag: str = "--source", labels: Path | None = None) -> ImageSource:
    """Open the images of a folder, a file, or a glob pattern of files.

    Args:
        path: The folder, file or pattern.
        flag: The command-line flag that specifies the path, for error messages.
        labels: A CSV or dataset.json with the class of each image. By default, the source
            determines the classes.

    Raises:
        UserError: The source or the labels are missing, unreadable, ambiguous or empty.
    """
    origin = f"{flag} {path}"
    files = _find_files(path, flag)
    types = {_get_file_type(file) for file in files}
    if len(types) > 1:
        raise UserError(
            f"{origin} contains files of several types ({', '.join(sorted(types))}); "
            "choose files of one type"
        )
    table = read_label_file(labels) if labels else None

    source: ImageSource
    if not files:
        source = _open_folder(path, flag, table)
    elif types == {".tar"}:
        source = _open_tars(path, files, flag, table)
    elif types == {".parquet"}:
        source = _open_parquet(path, files, flag, table)
    elif len(files) > 1:
        raise UserError(
            f"{origin} matches several files that are neither tar nor parquet; "
            "pass a folder or one zip file"
        )
    elif types & COMPRESSED_TARS:
        raise UserError(
            f"{origin}: a compressed tar file does not allow random access; decompress it first"
        )
    else:
        source = _open_zip(files[0], flag, table)
    if not len(source):
        extensions = " ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError(f"{origin} contains no images; supported extensions are {extensions}")
    return source


def _find_files(path: Path, flag: str) -> list[Path]:
    """Return the files to read images from. For a folder of image files, the list is empty."""
    if path.is_dir():
        return _find_archives(path, flag)
    if path.exists():
        return [path]
    files = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 (the pattern may be absolute)
    if not files:
        is_pattern = any(character in str(path) for character in "*?[")
        problem = "matches no file" if is_pattern else "does not exist"
        raise UserError(f"{flag} {path} {problem}")
    return files


def _find_archives(root: Path, flag: str) -> list[Path]:
    """Return the tar or parquet files in a folder or in its subfolder data (Hugging Face)."""
    for folder in (root, root / "data"):
        if not folder.is_dir():
            continue
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        archives = sorted(
            entry for entry in entries if entry.suffix in (".parquet", ".tar") and entry.is_file()
        )
        if not archives:
            continue
        suffix = archives[0].suffix
        if any(entry.suffix == ".zip" for entry in entries):
            raise UserError(
                f"{flag} {folder} contains {suffix} and .zip files; choose files of one type"
            )
        if any(entry.is_dir() for entry in entries):
            raise UserError(
                f"{flag} {folder} contains {suffix} files and folders; "
                f"pass one of the folders, or the files as '{folder}/*{suffix}'"
            )
        return archives
    return []


def _get_file_type(file: Path) -> str:
    """Return the suffix of a file, including the one before a compression suffix (.tar.gz)."""
    if file.suffix in COMPRESSION_SUFFIXES:
        return "".join(file.suffixes[-2:])
    return file.suffix


def _open_folder(path: Path, flag: str, table: LabelTable | None) -> ImageSource:
    names, top_folders = list_files(path, flag, is_image_name)
    label_file = path / "dataset.json"
    if table is None and label_file.exists():
        table = parse_dataset_json(label_file.read_bytes(), f"{flag} {label_file}")
    if table is not None:
        return ImageSource(path, names, *assign_labels(names, table))

    labels, class_names = assign_labels_from_folders(names, f"{flag} {path}")
    empty_classes = sorted(set(top_folders) - set(class_names))
    if names and empty_classes:
        raise UserError(
            f"{flag} {path}: some classes have no images ({', '.join(empty_classes[:5])}); "
            "add images or remove these folders"
        )
    return ImageSource(path, names, labels, class_names)


def list_files(
    root: Path, flag: str, is_wanted: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """List the files under a folder, except those in hidden folders. Symlinks are followed.

    Args:
        root: The folder.
        flag: The command-line flag that specifies the folder, for error messages.
        is_wanted: Function that returns whether to list a file, given its name.

    Returns:
        The sorted paths of the files relative to the folder, and the names of its subfolders.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{flag} {error.filename} cannot be listed ({error.strerror})") from None

    names: list[str] = []
    top_folders: list[str] = []
    # Device and inode of each folder and its ancestors, to detect symlinks that form a cycle.
    ancestor_ids: dict[Path, frozenset] = {}
    for folder_name, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        folder = Path(folder_name)
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        ancestors = ancestor_ids.get(folder.parent, frozenset())
        if identity in ancestors:
            subfolders.clear()
            continue
        ancestor_ids[folder] = ancestors | {identity}
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if folder == root:
            top_folders = subfolders.copy()
            prefix = ""
        else:
            prefix = f"{folder.relative_to(root).as_posix()}/"
        names += [prefix + name for name in files if is_wanted(name)]
    return sorted(names), top_folders


def _open_zip(file: Path, flag: str, table: LabelTable | None) -> ImageSource:
    origin = f"{flag} {file}"
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            names = sorted({name for name in members if is_image_name(name)})
            if table is None and "dataset.json" in members:
                table = parse_dataset_json(archive.read("dataset.json"), f"{origin}: dataset.json")
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{origin} is not a folder, tar, parquet or readable zip file ({error})"
        ) from None
    labels, class_names = (
        assign_labels_from_folders(names, origin) if table is None else assign_labels(names, table)
    )
    return ZipSource(file, names, labels, class_names)


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
    """Yield the images and label files of a tar file; a nested tar file acts as a folder.

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


def _open_tars(path: Path, files: list[Path], flag: str, table: LabelTable | None) -> ImageSource:
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

    # Determine the labels.
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
    """Take the class of each image from the .cls file with the same WebDataset key.

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
    """Return an image name without extensions, which start at the first dot of the file name."""
    file_name = member.rpartition("/")[2]
    _, dot, extensions = file_name.partition(".")
    return name.removesuffix(dot + extensions)


def _open_parquet(
    path: Path, files: list[Path], flag: str, table: LabelTable | None
) -> ImageSource:
    origin = f"{flag} {path}"
    cli.require_package("pyarrow", f"{origin}, which contains parquet files,")
    splits = sorted({file.name.split("-", 1)[0] for file in files if "-of-" in file.name})
    if len(splits) > 1:
        pattern = files[-1].parent / f"{splits[-1]}-*.parquet"
        raise UserError(
            f"{origin} contains several splits ({', '.join(splits)}); "
            f"choose one, for example {flag} '{pattern}'"
        )
    if table is not None:
        raise UserError(
            f"--labels requires images with file names, but the images of {path} are parquet rows, "
            "whose labels are in a column; remove --labels"
        )

    # Locate the images and read the label columns.
    names: list[str] = []
    locations: list[tuple[int, int, int]] = []
    classes: list = []
    class_names: list[str] | None = None
    image_column = ""
    for file_index, file in enumerate(files):
        with _open_parquet_file(file, flag) as parquet:
            schema = parquet.schema_arrow
            image_column = _find_image_column(schema, f"{flag} {file}")
            metadata = parquet.metadata
            names += [f"{file.name}:{row}" for row in range(metadata.num_rows)]
            for group in range(metadata.num_row_groups):
                rows = range(metadata.row_group(group).num_rows)
                locations += [(file_index, group, row) for row in rows]
            label_column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
            if label_column is not None:
                label_array = parquet.read([label_column], use_threads=False).column(0)
                classes += label_array.to_pylist()
                class_names = class_names or _find_class_names(schema, label_column)

    # Convert classes to labels. Without a label column, all images belong to one class.
    if classes and (len(classes) != len(names) or None in classes):
        raise UserError(f"{origin}: some rows have a label and others have none")
    labels, class_names = index_classes(classes or [0] * len(names), class_names, origin)
    array = np.array(locations, np.int64).reshape(-1, 3)
    return ParquetSource(
        path, names, labels, class_names, files=files, locations=array, column=image_column
    )


def _open_parquet_file(file: Path, flag: str) -> "pyarrow.parquet.ParquetFile":
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {file} is not a readable parquet file ({reason})") from None


def _find_image_column(schema: "pyarrow.Schema", origin: str) -> str:
    """Return the column of image bytes.

    It is a struct {"bytes", "path"}, as written by the library `datasets`, or else a binary column.
    Columns whose names are in IMAGE_COLUMNS take precedence.

    Raises:
        UserError: There is no such column.
    """
    from pyarrow import types

    structs = []
    binaries = []
    for column in schema:
        if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            structs.append(column.name)
        elif types.is_binary(column.type) or types.is_large_binary(column.type):
            binaries.append(column.name)
    candidates = structs + binaries
    preferred = [name for name in candidates if name in IMAGE_COLUMNS]
    if not candidates:
        raise UserError(
            f"{origin} has no column of image bytes; its columns are {', '.join(schema.names)}"
        )
    return (preferred or candidates)[0]


def _find_class_names(schema: "pyarrow.Schema", label_column: str) -> list[str] | None:
    """Return the class names that Hugging Face's `datasets` stores in the file, if any."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return features[label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
