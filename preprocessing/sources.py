"""Open the images of a folder tree, EDM's zip files, tar files, or Hugging Face's parquet files."""

import copy
import glob
import io
import os
import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.cli import UserError, describe_read_error
from common.files import ZIP_READ_ERRORS
from common.lfs import describe_lfs_pointer
from preprocessing.classes import determine_classes, read_tables
from preprocessing.image_source import ImageSource
from preprocessing.labels import LabelTable, read_label_file
from preprocessing.listing import IMAGE_EXTENSIONS, Listing, find_ignored_name, find_split
from preprocessing.parquet_files import open_parquet
from preprocessing.tar_files import TarSource, list_tars

COMPRESSION_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
COMPRESSED_TARS = {".tgz", *(f".tar{suffix}" for suffix in COMPRESSION_SUFFIXES)}
ARCHIVE_TYPES = (".tar", ".parquet", ".zip", *COMPRESSED_TARS)


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


def open_source(
    path: Path,
    flag: str = "--source",
    labels: Path | None = None,
    label_column: str | None = None,
    is_unlabeled: bool = False,
) -> ImageSource:
    """Open the images of a folder, a file, or a glob pattern of files.

    Args:
        path: The folder, file or pattern.
        flag: The command-line flag that specifies the path, for error messages.
        labels: A CSV or dataset.json with the class of each image. By default, the source
            determines the classes (see preprocessing/classes.py).
        label_column: The column of parquet files that contains the class.
        is_unlabeled: Whether to put all images in one class.

    Raises:
        UserError: The source or the labels are missing, unreadable, ambiguous or empty.
    """
    origin = f"{flag} {path}"
    if is_unlabeled and (labels or label_column):
        raise UserError("--unlabeled cannot be combined with --labels or --label-column")
    table = read_label_file(labels) if labels else None
    listing = None
    if path.is_dir():
        listing, archives = _list_folder(path, flag)
        files = _select_archives(path, listing, archives, flag)
    else:
        files = _find_files(path, flag)
    file_type = _check_files(path, files, flag)
    if file_type == ".parquet":
        if table is not None:
            raise UserError(
                f"--labels requires images with file names, but the images of {path} are parquet "
                "rows, whose labels are in a column; remove --labels"
            )
        return open_parquet(path, files, flag, label_column, is_unlabeled)
    if label_column is not None:
        raise UserError(f"--label-column requires parquet files, but {origin} contains none")

    folder_listing = listing
    if file_type == ".tar":
        listing = list_tars(path, files, flag)
    elif len(files) > 1:
        raise UserError(
            f"{origin} matches several files that are neither tar nor parquet; "
            "pass a folder or one zip file"
        )
    elif files:
        listing = _list_zip(files[0], flag)
    assert listing is not None
    # Label files may also be next to the archives of a folder.
    if files and folder_listing is not None and not is_unlabeled:
        table = table or read_tables(folder_listing, origin)
        listing.other_tables += folder_listing.other_tables
    return _make_source(path, files, listing.sort(), table, origin, is_unlabeled)


def _make_source(
    path: Path,
    files: list[Path],
    listing: Listing,
    table: LabelTable | None,
    origin: str,
    is_unlabeled: bool,
) -> ImageSource:
    """Determine the classes of the listed images, and return the source that reads them."""
    if not listing.images:
        extensions = " ".join(sorted(IMAGE_EXTENSIONS))
        ignored = listing.describe_ignored()
        ignored = f" ({ignored})" if ignored else ""
        raise UserError(
            f"{origin} contains no images{ignored}; supported extensions are {extensions}"
        )
    classes = determine_classes(listing, table, origin, is_unlabeled)
    names = [image.name for image in listing.images]
    content = (names, classes.labels, classes.names)
    source: ImageSource
    if not files:
        source = ImageSource(path, *content)
    elif files[0].suffix == ".tar":
        locations = np.array([image.location for image in listing.images], np.int64)
        source = TarSource(path, *content, files=files, locations=locations)
    else:
        source = ZipSource(files[0], *content)
    source.label_origin = classes.origin
    source.ignored = listing.describe_ignored()
    return source


def _find_files(path: Path, flag: str) -> list[Path]:
    """Return the files that a path or a glob pattern specifies."""
    if path.exists():
        return [path]
    files = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 (the pattern may be absolute)
    if not files:
        is_pattern = any(character in str(path) for character in "*?[")
        problem = "matches no file" if is_pattern else "does not exist"
        raise UserError(f"{flag} {path} {problem}")
    return files


def _select_archives(root: Path, listing: Listing, archives: list[str], flag: str) -> list[Path]:
    """Return the archives in a folder to read images from, or [] to read its image files.

    Args:
        root: The folder.
        listing: The files of the folder.
        archives: The paths of the archives relative to the folder.
        flag: The command-line flag that specifies the folder, for error messages.

    Raises:
        UserError: The folder contains tar or parquet files and other sources of images.
    """
    large = [path for path in archives if _get_file_type(path) in (".tar", ".parquet")]
    zips = [path for path in archives if path.endswith(".zip")]
    if listing.images:
        # Archives in deeper subfolders of a tree of images are ignored.
        top = [path for path in large if path.count("/") == 0 or path.startswith("data/")]
        if top:
            suffix = _get_file_type(top[0])
            raise UserError(
                f"{flag} {root} contains {suffix} files and folders; pass one of the folders, or "
                f"the files as '{root / posixpath.dirname(top[0])}/*{suffix}'"
            )
        return []
    if large and zips:
        raise UserError(
            f"{flag} {root} contains {_get_file_type(large[0])} and .zip files; choose files of "
            "one type"
        )
    selected = large or zips or archives
    return [root / path for path in selected]


def _check_files(path: Path, files: list[Path], flag: str) -> str:
    """Return the type of the files that a source consists of, such as .tar; "" without files.

    Raises:
        UserError: The files have different types, cannot be read, or belong to several splits.
    """
    for file in files:
        if problem := describe_lfs_pointer(file):
            raise UserError(f"{flag}: {problem}")
    types = {_get_file_type(file.name) for file in files}
    if len(types) > 1:
        raise UserError(
            f"{flag} {path} contains files of several types ({', '.join(sorted(types))}); "
            "choose files of one type"
        )
    if types & COMPRESSED_TARS:
        raise UserError(
            f"{flag} {path}: a compressed tar file does not allow random access; decompress it "
            "first"
        )
    _check_one_split(path, files, flag)
    return types.pop() if types else ""


def _check_one_split(path: Path, files: list[Path], flag: str) -> None:
    """Raise UserError if the files belong to several splits of a data set."""
    if len(files) < 2:
        return
    root = path if path.is_dir() else path.parent
    file_by_split: dict[str, Path] = {}
    for file in files:
        split = find_split(file.relative_to(root).as_posix() if path.is_dir() else file.name)
        if "-of-" in file.name:  # Hugging Face: SPLIT-00000-of-00004.parquet
            split = file.name.split("-", 1)[0]
        if split is not None:
            file_by_split[split] = file
    if len(file_by_split) > 1:
        splits = sorted(file_by_split)
        example = file_by_split[splits[-1]]
        pattern = example.parent / f"{splits[-1]}-*{example.suffix}"
        if not any(pattern.parent.glob(pattern.name)):
            pattern = example
        raise UserError(
            f"{flag} {path} contains several splits ({', '.join(splits)}); "
            f"choose one, for example {flag} '{pattern}'"
        )


def _get_file_type(name: str) -> str:
    """Return the suffix of a file, including the one before a compression suffix (.tar.gz)."""
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        return "".join(suffixes[-2:])
    return suffixes[-1] if suffixes else ""


def _list_folder(root: Path, flag: str) -> tuple[Listing, list[str]]:
    """List the files under a folder, and return the listing and the relative paths of archives."""
    listing = Listing(read=lambda name: (root / name).read_bytes())
    archives = []
    for prefix, subfolders, files, ignored in walk_folder(root, flag):
        listing.ignored.update(ignored)
        listing.folders += [prefix + name for name in subfolders]
        for name in files:
            if _get_file_type(name) in ARCHIVE_TYPES and find_ignored_name(name) is None:
                archives.append(prefix + name)
            else:
                listing.add(prefix + name, prefix + name)
    return listing, sorted(archives)


def walk_folder(root: Path, flag: str) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """Walk through a folder and its subfolders. Symlinks are followed; ignored folders are not.

    Args:
        root: The folder.
        flag: The command-line flag that specifies the folder, for error messages.

    Yields:
        For each folder: its path relative to `root` with a final slash ("" for `root`), and the
        names of its subfolders, of its files, and of its ignored subfolders.

    Raises:
        UserError: A folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{flag} {error.filename} cannot be listed ({error.strerror})") from None

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
        ignored = [name for name in subfolders if find_ignored_name(name) is not None]
        subfolders[:] = sorted(set(subfolders) - set(ignored))
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        yield prefix, subfolders.copy(), files, ignored


def _list_zip(file: Path, flag: str) -> Listing:
    try:
        archive = zipfile.ZipFile(file)
        listing = Listing(read=archive.read)
        for info in archive.infolist():
            if not info.filename.endswith("/"):
                listing.add(info.filename, info.filename)
    except ZIP_READ_ERRORS as error:
        reason = describe_read_error(error)
        raise UserError(
            f"{flag} {file} is not a folder, tar, parquet or readable zip file ({reason})"
        ) from None
    return listing
