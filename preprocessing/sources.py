"""Where images come from: a numbered list of names and labels, and the stored bytes of each.

A folder tree, EDM's zip, tar files (one, a folder of them, WebDataset's, or ImageNet's tar of tars), or Hugging Face's parquet.
All can be read by processes forked from the one that opened them, or handed to new ones.
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
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from common.cli import UserError
from preprocessing.labels import (
    IMAGE_EXTENSIONS,
    LabelTable,
    assign_labels,
    index_classes,
    is_image_name,
    labels_from_folders,
    parse_dataset_json,
    read_label_file,
    summarize_names,
)

MOST_OPEN = 64  # tar files at once in a process


class ImageSource:
    """names and labels (n,) int64 of n images, in a fixed order, and the names of the classes. The files of a folder."""

    def __init__(self, root: Path, names: list[str], labels: np.ndarray, class_names: list[str]):
        self.root, self.names, self.labels, self.class_names = root, names, labels, class_names

    def __len__(self) -> int:
        return len(self.names)

    def open(self, i: int) -> BinaryIO:
        """The stored bytes of image i, as a file. Raises OSError."""
        path = self.root / self.names[i]
        if not stat.S_ISREG(path.stat().st_mode):  # of a pipe nobody knows when it ends
            raise OSError("not a file")
        return path.open("rb")

    def digest(self, count: int) -> str:
        """sha256 over the names and labels of the first `count` images and over the classes."""
        digest = hashlib.sha256(json.dumps([self.class_names, count]).encode())
        for name in self.names[:count]:
            digest.update(os.fsencode(name) + b"\0")
        digest.update(np.ascontiguousarray(self.labels[:count], np.int64))
        return digest.hexdigest()


class ZipSource(ImageSource):
    """Members of a zip file."""

    _archive: zipfile.ZipFile | None = None
    _process = 0

    def open(self, i: int) -> BinaryIO:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.root)
        elif (
            self._process != os.getpid()
        ):  # the list of members came with the fork, the place in the file must not be shared
            self._archive = copy.copy(self._archive)
            self._archive.fp = self.root.open("rb")
        self._process = os.getpid()
        return io.BytesIO(self._archive.read(self.names[i]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}


class TarSource(ImageSource):
    """Stretches of tar files: image i lies in files[where[i, 0]], from where[i, 1] on, where[i, 2] bytes."""

    def __init__(self, *args, files: list[Path], where: np.ndarray):
        super().__init__(*args)
        self.files, self.where, self._descriptors = files, where, {}

    def open(self, i: int) -> BinaryIO:
        file, offset, size = self.where[i].tolist()
        if file not in self._descriptors:
            if len(self._descriptors) >= MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[file] = os.open(self.files[file], os.O_RDONLY)
        data = os.pread(
            self._descriptors[file], size, offset
        )  # pread: processes may share a descriptor
        if len(data) < size:
            raise OSError(f"{self.files[file].name} ends early")
        return io.BytesIO(data)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": {}}


class ParquetSource(ImageSource):
    """Rows of parquet files: image i is row where[i, 2] of row group where[i, 1] of files[where[i, 0]]."""

    def __init__(self, *args, files: list[Path], where: np.ndarray, column: str):
        super().__init__(*args)
        self.files, self.where, self.column = files, where, column
        self._group: tuple[tuple[int, int], list[bytes]] | None = None

    def open(self, i: int) -> BinaryIO:
        import pyarrow.parquet

        file, group, row = self.where[i].tolist()
        if self._group is None or self._group[0] != (file, group):
            with pyarrow.parquet.ParquetFile(self.files[file]) as parquet:
                cells = parquet.read_row_group(group, [self.column], use_threads=False).column(0)
            self._group = (file, group), cells
        cell = self._group[1][row].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise OSError("the row holds no bytes")
        return io.BytesIO(data)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_group": None}


def open_source(path: Path, flag: str = "--source", labels: Path | None = None) -> ImageSource:
    """The images at `path`: a folder, a file, or a pattern of files in quotes. `labels`: CSV or dataset.json with the class of
    each by name. Raises UserError, naming `flag`.
    """
    if not path.exists():
        files = sorted(map(Path, glob.glob(str(path))))
        if not files:
            raise UserError(
                f"{flag} {path} {'matches no file' if any(c in str(path) for c in '*?[') else 'does not exist'}"
            )
    else:
        files = _archives(path, flag) if path.is_dir() else [path]
    kinds = {
        "".join(file.suffixes[-2:])
        if file.suffix in (".gz", ".zst", ".xz", ".bz2")
        else file.suffix
        for file in files
    }
    if len(kinds) > 1:
        raise UserError(
            f"{flag} {path} holds files of several kinds ({', '.join(sorted(kinds))}): name those of one"
        )
    given = read_label_file(labels) if labels else None
    if path.is_dir() and not files:
        source = _open_folder(path, flag, given)
    elif kinds == {".tar"}:
        source = _open_tars(path, files, flag, given)
    elif kinds == {".parquet"}:
        source = _open_parquet(path, files, flag, given)
    elif len(files) > 1:
        raise UserError(
            f"{flag} {path} is a pattern of files that are neither tar nor parquet: name a folder, or one zip"
        )
    elif kinds & {".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tgz"}:
        raise UserError(
            f"{flag} {path}: {', '.join(kinds)} files cannot be read from the middle: unpack it first"
        )
    else:
        source = _open_zip(files[0], flag, given)
    if not len(source):
        raise UserError(f"{flag} {path} holds no images ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    return source


def _archives(folder: Path, flag: str) -> list[Path]:
    """The tar or parquet files in a folder, or, as Hugging Face lays them out, in its folder data."""
    for place in (folder, folder / "data"):
        inside = (
            [child for child in place.iterdir() if not child.name.startswith(".")]
            if place.is_dir()
            else []
        )
        files = sorted(
            child for child in inside if child.suffix in (".parquet", ".tar") and child.is_file()
        )
        if files and any(child.suffix == ".zip" for child in inside):
            raise UserError(
                f"{flag} {place} holds {files[0].suffix} and .zip files: name those of one kind"
            )
        if files and any(child.is_dir() for child in inside):
            raise UserError(
                f"{flag} {place} holds {files[0].suffix} files and folders: name one, as in '{place}/*.tar'"
            )
        if files:
            return files
    return []


def _open_folder(path: Path, flag: str, given: LabelTable | None) -> ImageSource:
    names, empty, above = [], [], {}

    def fail(error: OSError) -> None:
        raise UserError(f"{flag} {error.filename} cannot be listed ({error.strerror})") from None

    for folder, folders, files in os.walk(path, onerror=fail, followlinks=True):
        inode = os.stat(folder).st_dev, os.stat(folder).st_ino
        outer = above.get(os.path.dirname(folder), frozenset())
        if inode in outer:  # a link to a folder that it lies in
            folders.clear()
            continue
        above[folder] = outer | {inode}
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = (
            os.path.relpath(folder, path).replace(os.sep, "/") + "/" if folder != str(path) else ""
        )
        names += [prefix + name for name in files if is_image_name(name)]
        if folder == str(path):
            empty = folders.copy()
    names.sort()
    what = f"{flag} {path}"
    record = path / "dataset.json"
    if given is None and record.exists():
        given = parse_dataset_json(record.read_bytes(), f"{flag} {record}")
    if given is not None:
        return ImageSource(path, names, *assign_labels(names, given))
    labels, class_names = labels_from_folders(names, what)
    empty = sorted({*empty} - {*class_names})
    if names and empty:
        raise UserError(
            f"{flag} {path}: classes without images ({', '.join(empty[:5])}): fill or remove those folders"
        )
    return ImageSource(path, names, labels, class_names)


def _open_zip(path: Path, flag: str, given: LabelTable | None) -> ImageSource:
    what = f"{flag} {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            names = sorted({name for name in members if is_image_name(name)})
            if given is None and "dataset.json" in members:
                given = parse_dataset_json(archive.read("dataset.json"), f"{what}: dataset.json")
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        NotImplementedError,
        UnicodeDecodeError,
    ) as error:
        raise UserError(
            f"{flag} {path} is no folder, tar or parquet, nor a zip that can be read ({error})"
        ) from None
    return ZipSource(
        path,
        names,
        *(labels_from_folders(names, what) if given is None else assign_labels(names, given)),
    )


def _members(file: BinaryIO, prefix: str = "") -> Iterator[tuple[str, int, int, bytes | None]]:
    """(name, offset, size, content of a file about labels) of a tar, and of those in it as if they were folders. Raises
    tarfile.TarError, also for one that is cut off, which tarfile takes for its end.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members.clear()  # or it keeps a kilobyte of each
            name = str(PurePosixPath(prefix + member.name.lstrip("/")))
            if not member.isreg() or member.issparse():
                continue
            file.seek(member.offset_data)
            if name.endswith(".tar"):
                inner = list(_members(file, name[: -len(".tar")] + "/"))
                if not inner:
                    raise tarfile.ReadError(f"{name} in it holds no images")
                yield from inner
            elif name.endswith(".cls") or PurePosixPath(name).name == "dataset.json":
                yield name, 0, 0, file.read(member.size)
            elif is_image_name(name):
                yield name, member.offset_data, member.size, None
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
            which = f"{prefix.rstrip('/')}.tar in it" if prefix else "it"
            raise tarfile.ReadError(
                f"{which} ends at byte {archive.offset:,} as if it were cut off"
            )


def _open_tars(path: Path, files: list[Path], flag: str, given: LabelTable | None) -> ImageSource:
    found, classes, what = {}, {}, f"{flag} {path}"
    for k, tar in enumerate(files):
        prefix = (
            "" if len(files) == 1 else f"{tar.relative_to(path) if path.is_dir() else tar.name}:"
        )
        try:
            with tar.open("rb") as file:
                for member, offset, size, content in _members(file):
                    if (
                        content is None
                    ):  # a name that comes twice counts once, as tar takes it: the last
                        found[prefix + member] = (member, k, offset, size)
                    elif member.endswith(".cls"):
                        classes[prefix + member.removesuffix(".cls")] = content.decode().strip()
                    elif given is None and len(files) == 1:
                        inside = (
                            "" if member == "dataset.json" else member.removesuffix("dataset.json")
                        )
                        given = parse_dataset_json(content, f"{flag} {tar}: {member}")
                        given = given._replace(
                            classes={inside + name: k for name, k in given.classes.items()}
                        )
        except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {tar} is not a readable tar ({error})") from None
    names = sorted(found)
    members = [found[name][0] for name in names]
    if given is not None:
        labels = assign_labels(members, given)
    elif (
        classes
    ):  # WebDataset: an image and its class share their name up to the first dot of its last part
        starts = [len(name) - len(member) for name, member in zip(names, members)]
        keys = [
            name[: start + _stem(member)] for name, member, start in zip(names, members, starts)
        ]
        missing = [name for name, key in zip(names, keys) if key not in classes]
        if missing:
            raise UserError(f"{what} has no .cls beside {summarize_names(missing)}")
        twice = next((b for a, b in zip(keys, keys[1:]) if a == b), None)
        if twice:
            raise UserError(
                f"{what} has two images for one class, {twice}.cls: which is meant? Leave the other out"
            )
        labels = index_classes([classes[key] for key in keys], None, what)
    elif len(files) > 1 and all(
        re.fullmatch(r"n\d{8}", tar.stem) for tar in files
    ):  # ImageNet's, a class each
        labels = labels_from_folders(
            [f"{files[found[name][1]].stem}/{member}" for name, member in zip(names, members)], what
        )
    else:
        labels = labels_from_folders(members, what)
    where = np.array([found[name][1:] for name in names], np.int64).reshape(-1, 3)
    return TarSource(path, names, *labels, files=files, where=where)


def _stem(member: str) -> int:
    """How long a WebDataset key is: up to the first dot of the last part."""
    return member.find(".", member.rfind("/") + 1)


def _open_parquet(
    path: Path, files: list[Path], flag: str, given: LabelTable | None
) -> ImageSource:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{flag} {path}: reading parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    splits = sorted({file.name.split("-", 1)[0] for file in files if "-of-" in file.name})
    if len(splits) > 1:
        pattern = files[-1].parent / f"{splits[-1]}-*.parquet"
        raise UserError(
            f"{flag} {path} holds several splits ({', '.join(splits)}): name one, as in {flag} '{pattern}'"
        )
    names, values, where, class_names = [], [], [], None
    for k, file in enumerate(files):
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{flag} {file} is not a readable parquet file ({str(error).splitlines()[0]})"
            ) from None
        with parquet:
            before, schema = len(where), parquet.schema_arrow
            column = _image_column(schema, pyarrow.types)
            if column is None:
                raise UserError(
                    f"{flag} {file} has no column of image bytes, only {', '.join(schema.names)}"
                )
            label = next(
                (
                    name
                    for name in ("label", "labels", "cls", "class", "fine_label")
                    if name in schema.names
                ),
                None,
            )
            if label and given is None:
                values += parquet.read([label], use_threads=False).column(0).to_pylist()
                class_names = class_names or _hub_classes(schema, label)
            for group in range(parquet.num_row_groups):
                rows, first = parquet.metadata.row_group(group).num_rows, len(where) - before
                names += [f"{file.name}:{first + row}" for row in range(rows)]
                where += [(k, group, row) for row in range(rows)]
    what = f"{flag} {path}"
    if given is not None:
        raise UserError(
            f"--labels goes with images that have names; those of {path} are rows with labels of their own"
        )
    if values and (len(values) != len(names) or None in values):
        raise UserError(f"{what}: some rows have a label and some have none")
    labels = (
        index_classes(values, class_names, what)
        if values
        else (np.zeros(len(names), np.int64), ["0"])
    )
    where = np.array(where, np.int64).reshape(-1, 3)
    return ParquetSource(path, names, *labels, files=files, where=where, column=column)


def _image_column(schema, types) -> str | None:
    """A column of {"bytes", "path"} as `datasets` writes it, or else of bytes; one that is called image before others."""

    def is_binary(kind) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    structs = [
        field.name
        for field in schema
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    columns = structs + [field.name for field in schema if is_binary(field.type)]
    return next(
        (name for name in columns if name in ("image", "img", "jpg", "jpeg", "png")),
        next(iter(columns), None),
    )


def _hub_classes(schema, label: str) -> list[str] | None:
    """The classes' names, as Hugging Face's `datasets` writes them into a file."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
