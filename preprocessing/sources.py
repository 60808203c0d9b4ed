"""Open the images of a folder tree, EDM's zip files, tar files, or Hugging Face's parquet files."""

import copy
import glob
import io
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.cli import UserError
from common.lfs import describe_lfs_pointer
from preprocessing.image_source import ImageSource
from preprocessing.labels import (
    IMAGE_EXTENSIONS,
    LabelTable,
    assign_labels,
    assign_labels_from_folders,
    is_image_name,
    parse_dataset_json,
    read_label_file,
)
from preprocessing.parquet_files import open_parquet
from preprocessing.tar_files import open_tars

COMPRESSION_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
COMPRESSED_TARS = {".tgz", *(f".tar{suffix}" for suffix in COMPRESSION_SUFFIXES)}


@dataclass(eq=False, repr=False)
class ZipSource(ImageSource):
    """A source that reads images from a zip file."""

    _archive: zipfile.ZipFile | None = None
    _process_id: int = 0

    def open(self, image_index: int) -> BinaryIO:
        """Return the stored bytes of an image (see ImageSource.open)."""
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.root)
        elif self._process_id != os.getpid():
            # A forked process can use the inherited list of members. It must open the file again,
            # because the inherited file object shares its offset with the parent process.
            self._archive = copy.copy(self._archive)
            self._archive.fp = self.root.open("rb")
        self._process_id = os.getpid()
        return io.BytesIO(self._archive.read(self.names[image_index]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}


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
    for file in files:
        if problem := describe_lfs_pointer(file):
            raise UserError(f"{flag}: {problem}")
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
        source = open_tars(path, files, flag, table)
    elif types == {".parquet"}:
        source = open_parquet(path, files, flag, table)
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
        is_wanted: Function that takes the name of a file and returns whether to list the file.

    Returns:
        The sorted paths of the files, relative to `root`, and the names of the folders directly
        under `root`.
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
