"""Which class an image has: by a CSV, by EDM's dataset.json, or by its folder."""

import csv
import io
import json
import re
from pathlib import Path, PurePosixPath

import numpy as np

from cli import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MOST_CLASSES = 1_000_000  # a larger label is no class number but something else


def is_image(name: str) -> bool:
    """By its extension; what a file browser hides is none."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS and not any(
        part.startswith(".") for part in name.removeprefix("./").split("/")
    )


def read_labels(path: Path) -> dict:
    """A CSV of name,class (with or without a line of headings), or a JSON as EDM's dataset.json: image -> class, and under the
    key None the names of the classes if it has them. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return read_json(text, f"--labels {path}")
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--labels {path} cannot be read ({error})") from None
    if any(len(row) != 2 for row in rows):
        bad = next(k for k, row in enumerate(rows) if len(row) != 2)
        raise UserError(f"--labels {path}: row {bad + 1} has {len(rows[bad])} columns; two are wanted, image and class")
    if rows and not is_image(rows[0][0]) and len(rows) > 1 and is_image(rows[1][0]):
        rows = rows[1:]  # headings
    repeated = len(rows) - len({name.strip() for name, _ in rows})
    if not rows or repeated:
        raise UserError(f"--labels {path} {'names ' + str(repeated) + ' images twice' if repeated else 'is empty'}")
    return {name.strip(): value.strip() for name, value in rows}


def read_json(text: str | bytes, what: str) -> dict:
    """EDM's dataset.json -> class of each image, and under the key None the names of the classes. Raises UserError."""
    try:
        meta = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        return dict(meta["labels"] or []) | {None: meta.get("class_names")}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f'{what} is not {{"labels": [[image, class], ...]}} ({reason})') from None


def number(values: list, class_names: list[str] | None, what: str) -> tuple[np.ndarray, list[str]]:
    """Classes as given, numbers or names -> labels (n,) int64 and the names of all classes. Raises UserError."""
    if class_names is not None:
        if not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
            raise UserError(f"{what}: class_names must be a list of names")
        if len(set(class_names)) < len(class_names):
            raise UserError(f"{what}: class_names has a name twice")
    whole = [_whole(value) for value in values]
    if None in whole and all(isinstance(value, str) and value for value in values):
        names = class_names or sorted(set(values))
        code = {name: k for k, name in enumerate(names)}
        if unknown := sorted({*values} - {*names}):
            raise UserError(f"{what}: class {unknown[0]} is none of those in class_names")
        return np.array([code[value] for value in values], np.int64), names
    if None in whole:
        raise UserError(f"{what}: classes must be whole numbers or names, not {values[whole.index(None)]!r}")
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


def labelled(names: list[str], given: dict, what: str) -> tuple[np.ndarray, list[str]]:
    """Classes by image: by its name as the source has it, or, in a CSV, by its last part with or without the extension.
    Raises UserError."""
    class_names = given.pop(None, None)
    if not given:  # EDM writes "labels": null
        return np.zeros(len(names), np.int64), ["0"]
    keys = []
    for name in names:
        last = name.rsplit("/", 1)[-1]
        keys.append(next((key for key in (name, last, last.rsplit(".", 1)[0]) if key in given), None))
    missing = [name for name, key in zip(names, keys) if key is None]
    if missing:
        raise UserError(f"{what} has no label for {missing[0]} (and {len(missing) - 1} more)")
    if len(set(keys)) < len(keys):
        first = dict(zip(reversed(keys), reversed(names)))
        a, b = next((first[key], name) for name, key in zip(names, keys) if first[key] != name)
        raise UserError(f"{what} does not tell {a} and {b} apart: name images by their paths")
    return number([given[key] for key in keys], class_names, what)


def by_folder(names: list[str], what: str) -> tuple[np.ndarray, list[str]]:
    """Classes are the first parts of the names, sorted; images without a folder are one class. Raises UserError."""
    tops = [top if rest else "" for top, _, rest in (name.removeprefix("./").partition("/") for name in names)]
    classes = sorted(set(tops))
    if "" in classes and len(classes) > 1:
        alone = names[tops.index("")]
        raise UserError(f"{what} has images in class folders and beside them ({alone}): move those, or give --labels")
    code = {name: k for k, name in enumerate(classes)}
    return np.array([code[top] for top in tops], np.int64), [name or "0" for name in classes]
