"""Which class an image has: by a CSV, by EDM's dataset.json, or by its folder."""

import csv
import io
import json
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from common.cli import UserError

IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MOST_CLASSES = 1_000_000  # a larger label is no class number but something else


def is_image_name(name: str) -> bool:
    """By its extension; what a file browser hides is none."""
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS and not any(
        part.startswith(".") for part in name.removeprefix("./").split("/")
    )


class LabelTable(NamedTuple):
    """Classes that a file gives, by image, and where from."""

    classes: dict
    class_names: list[str] | None
    origin: str  # flag and file, for messages


def read_label_file(path: Path) -> LabelTable:
    """A CSV of image,class (with or without a line of headings), or a JSON as EDM's dataset.json. Raises UserError."""
    what = f"--labels {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return parse_dataset_json(text, what)
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror})") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{what} is neither a CSV of image,class nor a JSON ({error})") from None
    for k, row in enumerate(rows):
        if len(row) != 2:
            raise UserError(
                f"{what}: row {k + 1} has {len(row)} columns; wanted are two, image,class, with a comma between"
            )
    if len(rows) > 1 and not is_image_name(rows[0][0]) and is_image_name(rows[1][0]):
        rows = rows[1:]  # headings
    classes: dict = {}
    for name, value in rows:
        if name.strip() in classes:
            raise UserError(f"{what} names {name.strip()} twice")
        classes[name.strip()] = value.strip()
    if not classes:
        raise UserError(f"{what} is empty")
    return LabelTable(classes, None, what)


def parse_dataset_json(text: str | bytes, what: str) -> LabelTable:
    """EDM's dataset.json. Raises UserError."""
    try:
        meta = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        return LabelTable(dict(meta["labels"] or []), meta.get("class_names"), what)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f'{what} is not {{"labels": [[image, class], ...]}} ({reason})') from None


def index_classes(
    values: list, class_names: list[str] | None, what: str
) -> tuple[np.ndarray, list[str]]:
    """Classes as given, numbers or names -> labels (n,) int64 and the names of all classes. Raises UserError."""
    if class_names is not None:
        if not (
            isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
        ):
            raise UserError(f"{what}: class_names must be a list of names")
        if len(set(class_names)) < len(class_names):
            raise UserError(f"{what}: class_names has a name twice")
    whole = [_whole(value) for value in values]
    if not any(isinstance(k, int) for k in whole) and all(
        isinstance(value, str) and value for value in values
    ):
        names = class_names or sorted(set(values))
        code = {name: k for k, name in enumerate(names)}
        if unknown := sorted({*values} - {*names}):
            raise UserError(f"{what}: class {unknown[0]} is none of those in class_names")
        return np.array([code[value] for value in values], np.int64), names
    if None in whole:
        raise UserError(
            f"{what}: classes must be all whole numbers, or all names, not {values[whole.index(None)]!r}"
        )
    low, high = min(whole, default=0), max(whole, default=0)
    if low < 0 or high >= MOST_CLASSES:
        raise UserError(f"{what} has label {low if low < 0 else high}: classes are numbered from 0")
    names = list(class_names or map(str, range(high + 1)))
    if len(names) <= high:
        raise UserError(f"{what} names {len(names)} classes but has label {high}")
    return np.array(whole, np.int64), names


def _whole(value: object) -> int | None:
    """A class number, also as pandas may write it (1.0); None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}(\.0)?", value):
        return int(value.removesuffix(".0"))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def assign_labels(names: list[str], given: LabelTable) -> tuple[np.ndarray, list[str]]:
    """Classes by image: by its name as the source has it, or by its last part with or without the extension. Raises
    UserError.
    """
    if not given.classes:  # EDM writes "labels": null
        return np.zeros(len(names), np.int64), ["0"]
    keys = []
    for name in names:
        last = name.rsplit("/", 1)[-1]
        keys.append(
            next(
                (key for key in (name, last, last.rsplit(".", 1)[0]) if key in given.classes), None
            )
        )
    missing = [name for name, key in zip(names, keys) if key is None]
    if missing:
        raise UserError(f"{given.origin} has no label for {summarize_names(missing)}")
    if len(set(keys)) < len(keys):
        first = dict(zip(reversed(keys), reversed(names)))
        a, b = next((first[key], name) for name, key in zip(names, keys) if first[key] != name)
        raise UserError(
            f"{given.origin} does not tell {a} and {b} apart: name images by their paths"
        )
    return index_classes([given.classes[key] for key in keys], given.class_names, given.origin)


def summarize_names(names: list[str]) -> str:
    """The first of several, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def labels_from_folders(names: list[str], what: str) -> tuple[np.ndarray, list[str]]:
    """Classes are the first parts of the names, sorted; images without a folder are one class. Raises UserError."""
    tops = [
        top if rest else ""
        for top, _, rest in (name.removeprefix("./").partition("/") for name in names)
    ]
    classes = sorted(set(tops))
    if "" in classes and len(classes) > 1:
        alone = names[tops.index("")]
        raise UserError(
            f"{what} has images in class folders and beside them ({alone}): move those, or give --labels"
        )
    code = {name: k for k, name in enumerate(classes)}
    return np.array([code[top] for top in tops], np.int64), [name or "0" for name in classes]
