"""Read images from the rows of Hugging Face's parquet files.

The messages of errors that `open` raises must not be reworded (see preprocessing/image_source.py).
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from common import cli
from common.cli import UserError, describe_read_error
from preprocessing.image_source import ImageSource
from preprocessing.labels import LABEL_KEYS, index_classes

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png")


@dataclass(eq=False, repr=False)
class ParquetSource(ImageSource):
    """A source that reads images from the rows of parquet files.

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


def open_parquet(
    path: Path, files: list[Path], flag: str, label_column: str | None, is_unlabeled: bool
) -> ImageSource:
    """List the images of parquet files, and read their labels.

    Args:
        path: The file, folder or pattern that the user specified.
        files: The parquet files.
        flag: The command-line flag that specifies the path, for error messages.
        label_column: The column that contains the class. By default, it is chosen by its name.
        is_unlabeled: Whether to put all images in one class.

    Raises:
        UserError: pyarrow is not installed, a file cannot be read, or a column is missing.
    """
    origin = f"{flag} {path}"
    cli.require_package("pyarrow", f"{origin}, which contains parquet files,")

    # Locate the images and read the label columns.
    names: list[str] = []
    locations: list[tuple[int, int, int]] = []
    classes: list = []
    class_names: list[str] | None = None
    image_column = ""
    column: str | None = None
    for file_index, file in enumerate(files):
        with _open_parquet_file(file, flag) as parquet:
            schema = parquet.schema_arrow
            image_column = _find_image_column(schema, f"{flag} {file}")
            metadata = parquet.metadata
            names += [f"{file.name}:{row}" for row in range(metadata.num_rows)]
            for group in range(metadata.num_row_groups):
                rows = range(metadata.row_group(group).num_rows)
                locations += [(file_index, group, row) for row in rows]
            if not is_unlabeled:
                column = _find_label_column(schema, image_column, label_column, f"{flag} {file}")
            if column is not None:
                classes += parquet.read([column], use_threads=False).column(0).to_pylist()
                class_names = class_names or _read_class_names(schema).get(column)

    # Convert classes to labels. A test split may have no label or the label -1 for all images.
    if not names:
        raise UserError(f"{origin} contains no images")
    is_labeled = any(value not in (None, -1) for value in classes)
    if is_labeled and (len(classes) != len(names) or None in classes):
        raise UserError(f"{origin}: some rows have a label and others have none")
    labels, class_names = index_classes(
        classes if is_labeled else [0] * len(names), class_names if is_labeled else None, origin
    )
    array = np.array(locations, np.int64).reshape(-1, 3)
    source = ParquetSource(
        path, names, labels, class_names, files=files, locations=array, column=image_column
    )
    source.label_origin = f"labels from the column {column}" if is_labeled else "no labels"
    return source


@contextmanager
def _open_parquet_file(file: Path, flag: str) -> "Iterator[pyarrow.parquet.ParquetFile]":
    """Open a parquet file, and convert exceptions of pyarrow in the context to UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = describe_read_error(error)
        raise UserError(f"{flag} {file} is not a readable parquet file ({reason})") from None


def _find_image_column(schema: "pyarrow.Schema", origin: str) -> str:
    """Return the name of the column that contains the bytes of the images.

    The column is a struct {"bytes", "path"}, as written by the library `datasets`, or else a binary
    column. Columns whose names are in IMAGE_COLUMNS take precedence.

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


def _find_label_column(
    schema: "pyarrow.Schema", image_column: str, label_column: str | None, origin: str
) -> str | None:
    """Return the name of the column that contains the classes, or None if there is no such column.

    The column is the first of these that exists: `label_column`, a column with one of the names
    LABEL_KEYS, the only ClassLabel of the library `datasets`, or the only column whose name
    contains label or class.

    Raises:
        UserError: `label_column` does not exist, or it is not clear whether the other columns
            contain classes.
    """
    from pyarrow import types

    if label_column is not None:
        if label_column not in schema.names:
            raise UserError(
                f"--label-column {label_column}: {origin} has the columns {', '.join(schema.names)}"
            )
        return label_column
    for name in LABEL_KEYS:
        if name in schema.names:
            return name
    others = [
        column.name
        for column in schema
        if column.name != image_column
        and (types.is_integer(column.type) or types.is_string(column.type))
    ]
    class_labels = [name for name in _read_class_names(schema) if name in others]
    named = [name for name in others if "label" in name.lower() or "class" in name.lower()]
    for candidates in (class_labels, named):
        if len(candidates) == 1:
            return candidates[0]
    if others:
        raise UserError(
            f"{origin} has no column that is known to contain classes (columns: "
            f"{', '.join(others)}); pass --label-column NAME, or --unlabeled to put all images in "
            "one class"
        )
    return None


def _read_class_names(schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """Return the class names that the library `datasets` has stored in the file, by column."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {column: value["names"] for column, value in features.items() if "names" in value}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
