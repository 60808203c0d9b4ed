"""Read label files, and convert classes to labels."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cli import MAX_REASON_LENGTH, UserError, describe_read_error
from common.lfs import POINTER_START, format_pointer_problem
from preprocessing.listing import IMAGE_EXTENSIONS, normalize_path, split_extension

MAX_CLASSES = 1_000_000  # class indices must be below this number
# Names of the class in metadata files, and of the label column in parquet files.
LABEL_KEYS = ("label", "labels", "cls", "class", "fine_label", "class_name", "category", "target")


class LabelTable(NamedTuple):
    """Classes of images, read from a label file.

    Attributes:
        classes: The class of each image, as an index or a name, by its normalized path.
        class_names: The names of all classes, or None if the file does not list them.
        origin: The flag and file that the table was read from, for error messages.
    """

    classes: dict[str, object]
    class_names: list[str] | None
    origin: str


def read_label_file(path: Path, flag: str = "--labels") -> LabelTable:
    """Read a CSV file with rows image,class and an optional header, or a JSON file like EDM's.

    Raises:
        UserError: The file cannot be read or parsed.
    """
    origin = f"{flag} {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{origin} cannot be read ({error.strerror})") from None
    text = decode_label_file(data, origin)
    if path.suffix.lower() == ".json":
        return parse_dataset_json(text, origin)
    return LabelTable(_parse_csv(text, origin), None, origin)


def decode_label_file(data: bytes, origin: str) -> str:
    """Return the text of a label file. Raises UserError if it is not UTF-8 or a Git LFS pointer."""
    if data.startswith(POINTER_START):
        raise UserError(format_pointer_problem(origin))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not UTF-8 text ({error})") from None


def _parse_csv(text: str, origin: str) -> dict[str, object]:
    """Return the class of each image."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        raise UserError(f"{origin} is not a valid CSV file ({error})") from None
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise UserError(
                f"{origin}: row {number} has {len(row)} columns; "
                "expected two columns, image,class, separated by a comma"
            )
    if len(rows) > 1 and not _is_image_name(rows[0][0]) and _is_image_name(rows[1][0]):
        rows = rows[1:]  # skip the header
    if not rows:
        raise UserError(f"{origin} is empty")
    return _make_classes(rows, origin)


def _make_classes(rows: Iterable[Sequence[Any]], origin: str) -> dict[str, object]:
    """Return the class of each image by its normalized path.

    Args:
        rows: The name and the class of each image.
        origin: The flag and file that contain the rows, for error messages.

    Raises:
        UserError: A name is not text, or an image has two classes.
    """
    classes: dict[str, object] = {}
    for name, value in rows:
        if not isinstance(name, str):
            raise UserError(f"{origin} has {name!r} in place of the name of an image")
        path = normalize_path(name)
        if classes.setdefault(path, value) != value:
            raise UserError(f"{origin} lists {name} twice; remove one of the two rows")
    return classes


def _is_image_name(name: str) -> bool:
    return split_extension(name)[1] in IMAGE_EXTENSIONS


def parse_table(name: str, text: str, origin: str) -> LabelTable | None:
    """Parse a label file of a folder (one of TABLE_NAMES in preprocessing/listing.py).

    Returns:
        The table, or None if the file contains no classes, such as a file with captions.

    Raises:
        UserError: The file cannot be parsed.
    """
    if name == "dataset.json":
        return parse_dataset_json(text, origin)
    try:
        if name == "metadata.csv":
            records: list[Any] = list(csv.DictReader(io.StringIO(text)))
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = [(record["file_name"], find_class(record)) for record in records]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        reason = describe_read_error(error)
        raise UserError(f"{origin} is not ImageFolder metadata with file_name ({reason})") from None
    missing_names = [str(name) for name, value in rows if value is None]
    if len(missing_names) == len(rows):
        return None
    if missing_names:
        raise UserError(f"{origin} has no class for {summarize_names(missing_names)}")
    return LabelTable(_make_classes(rows, origin), None, origin)


def parse_sidecar(extension: str, text: str, origin: str) -> object | None:
    """Return the class in the label file of a single image, or None if it contains no class.

    Raises:
        UserError: The file cannot be parsed.
    """
    text = text.strip()
    if extension == ".json":
        try:
            return find_class(json.loads(text))
        except ValueError as error:
            raise UserError(f"{origin} is not a JSON file ({error})") from None
    if extension == ".txt" and _parse_index(text) is None:
        return None  # a caption
    return text or None


def find_class(content: object) -> object | None:
    """Return the class in the metadata of an image, or None if the metadata contains no class."""
    if not isinstance(content, dict):
        return None
    values = [content[key] for key in LABEL_KEYS if isinstance(content.get(key), int | float | str)]
    return values[0] if values and values[0] != "" else None


def parse_dataset_json(text: str, origin: str) -> LabelTable:
    """Parse the content of an EDM dataset.json. Raises UserError if it has another format."""
    try:
        content = json.loads(text)
        labels = content["labels"] or []
        rows = labels.items() if isinstance(labels, dict) else [(name, x) for name, x in labels]
        class_names = content.get("class_names")
    except (ValueError, KeyError, TypeError) as error:
        reason = describe_read_error(error)
        raise UserError(
            f'{origin} does not have the format {{"labels": [[image, class], ...]}} ({reason})'
        ) from None
    return LabelTable(_make_classes(rows, origin), class_names, origin)


def index_classes(
    classes: list, class_names: list[str] | None, origin: str
) -> tuple[np.ndarray, list[str]]:
    """Convert class indices or class names to labels.

    Args:
        classes: The class of each image, either as integers (which may be strings or floats like
            1.0) or as names.
        class_names: The names of all classes in the order of their indices. By default, names are
            sorted, and the name of an index is its decimal representation.
        origin: The flag and file that specify the classes, for error messages.

    Returns:
        The labels, (n,) int64, and the names of all classes.

    Raises:
        UserError: The classes mix indices and names, are out of range, or contradict `class_names`.
    """
    if class_names is not None:
        if not isinstance(class_names, list) or not all(isinstance(x, str) for x in class_names):
            raise UserError(f"{origin}: class_names must be a list of names")
        if len(set(class_names)) < len(class_names):
            raise UserError(f"{origin}: class_names has duplicate entries")
    parsed = [_parse_index(value) for value in classes]
    indices = [index for index in parsed if index is not None]
    if not indices and all(isinstance(value, str) and value for value in classes):
        return index_names(classes, class_names, origin)

    if len(indices) < len(parsed):
        value = repr(classes[parsed.index(None)])[:MAX_REASON_LENGTH]
        raise UserError(
            f"{origin}: classes must be either all integers or all names; found {value}"
        )
    lowest = min(indices, default=0)
    highest = max(indices, default=0)
    if lowest < 0 or highest >= MAX_CLASSES:
        label = lowest if lowest < 0 else highest
        raise UserError(f"{origin} has label {label}; labels must be from 0 to {MAX_CLASSES - 1:,}")
    names = list(class_names or map(str, range(highest + 1)))
    if len(names) <= highest:
        raise UserError(f"{origin} lists {len(names)} class names but has label {highest}")
    return np.array(indices, np.int64), names


def index_names(
    classes: list[str], class_names: list[str] | None, origin: str
) -> tuple[np.ndarray, list[str]]:
    """Convert class names to labels; see `index_classes`."""
    names = class_names or sorted(set(classes))
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise UserError(f"{origin}: class {unknown[0]} is not in class_names")
    index_of = {name: index for index, name in enumerate(names)}
    return np.array([index_of[name] for name in classes], np.int64), names


def _parse_index(value: object) -> int | None:
    """Return a class index, or None for other values. Floats like 1.0 are accepted."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}(\.0)?", value):
        return int(value.removesuffix(".0"))
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return None


def assign_labels(
    paths: list[str], table: LabelTable, scopes: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Look up the class of each image in a label table.

    The table may list an image by its path with or without the scope, by its file name, or by its
    file name without extension.

    Args:
        paths: The normalized path of each image.
        table: The label table.
        scopes: The prefix of each path that identifies the archive, if there are several archives.

    Returns:
        The labels, (n,) int64, and the names of all classes.

    Raises:
        UserError: An image has no class, or a row of the table matches two images.
    """
    if not table.classes:  # EDM writes "labels": null for an unlabeled data set
        return np.zeros(len(paths), np.int64), ["0"]

    classes = []
    missing_names = []
    image_by_key: dict[str, str] = {}
    for path, scope in zip(paths, scopes or [""] * len(paths)):
        file_name = path.rsplit("/", 1)[-1]
        keys = (scope + path, path, file_name, file_name.rsplit(".", 1)[0])
        key = next((key for key in keys if key in table.classes), None)
        if key is None:
            missing_names.append(path)
        elif key in image_by_key:
            raise UserError(
                f"{table.origin}: {key} matches both {image_by_key[key]} and {scope}{path}; "
                "list images by their paths"
            )
        else:
            image_by_key[key] = scope + path
            classes.append(table.classes[key])
    if missing_names:
        raise UserError(f"{table.origin} has no label for {summarize_names(missing_names)}")
    return index_classes(classes, table.class_names, table.origin)


def summarize_names(names: list[str]) -> str:
    """Return the first name and the number of other names, as in "a.png (and 3 more)"."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} (and {len(names) - 1} more)"
