"""Compare the classes of random image sources with a model that shares no code with preprocessing/.

    python -m tests.fuzz.sources --count 300 --seed 0 --broken

Each image has a different grey value, so that its class can be checked after it is read. The model
chooses the class of each image before it writes the label files. If the model considers a source
ambiguous, the correct result is an error. With --broken, the same sources are read by deliberately
broken variants of the reader, each of which must be detected.
"""

import argparse
import csv
import io
import json
import posixpath
import random
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image
from tqdm import tqdm

import preprocessing.classes
import preprocessing.labels
import preprocessing.listing
import preprocessing.parquet_files
import preprocessing.sources
import preprocessing.tar_files
from common.cli import UserError

NAMES = ["cat", "dog", "Ölbaum", "n02084071", "a b", "x.y", "7", "train", "00012"]
STYLES = [
    "folders",
    "dataset.json",
    "metadata.csv",
    "metadata.jsonl",
    "cls",
    "index",
    "json",
    "txt",
    "none",
    "captions",
    "splits",
    "partial",
]


class Case(NamedTuple):
    """A source and its correct classes.

    Attributes:
        path: The folder or file.
        classes: The class name of each image by its grey value; None if an error is correct.
        description: How the source was generated.
    """

    path: Path
    classes: dict[int, str] | None
    description: str


def make_image(grey: int) -> bytes:
    """Return a PNG file of one grey value."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def generate(rng: random.Random, folder: Path) -> Case:
    """Write a random source into a folder.

    Args:
        rng: Random number generator.
        folder: An empty folder.
    """
    style = rng.choice(STYLES)
    kind = rng.choice(["folder", "zip", "tar", "tars", "parquet"])
    if kind == "parquet":
        return generate_parquet(rng, folder)
    num_classes = rng.randint(2, 4)
    names = rng.sample(NAMES, num_classes)
    uses_folders = style in ("folders", "splits", "partial")
    if not uses_folders and rng.random() < 0.5:
        names = [str(i) for i in range(num_classes)]
    if style == "txt":
        names = [str(i) for i in range(num_classes)]
    count = rng.randint(num_classes, 10)
    labels = [i if i < num_classes else rng.randrange(num_classes) for i in range(count)]
    parent = "/".join(rng.sample(["m", "data", "val", "images"], rng.randint(0, 2)))
    parent += "/" if parent else ""

    # Choose the paths of the images, and write their labels.
    files: dict[str, bytes] = {}
    tables: list[tuple[str, str]] = []
    path_of_grey: dict[int, str] = {}
    for i, label in enumerate(labels):
        stem = rng.choice([f"{i}", f"img {i}", f"{i}.05", f"ü{i}"])
        path = parent
        if uses_folders:
            path += names[label] + "/"
        if style == "splits":
            path = parent + ("train/", "test/")[i % 2] + names[label] + "/"
        path += rng.choice(["", "sub/"]) if style == "folders" else ""
        image_path = path + stem + rng.choice([".png", ".PNG"])
        grey = 10 + 20 * i
        files[image_path] = make_image(grey)
        path_of_grey[grey] = image_path
        tables.append((image_path, names[label]))
        metadata: dict[str, Any] = {"width": 8, "caption": "text"}
        sidecars = {
            "cls": {".cls": names[label], ".json": json.dumps(metadata)},
            "index": {".index": names[label]},
            "json": {".json": json.dumps(metadata | {"label": names[label]}), ".txt": "a text"},
            "txt": {".txt": names[label] + "\n"},
            "captions": {".txt": f"a photo of a {names[label]}"},
        }.get(style, {})
        for extension, text in sidecars.items():
            files[path + stem + extension] = text.encode()
    if style == "partial":  # an image outside of the class folders
        files[parent + "outside.png"] = make_image(255)
    add_table(style, parent, tables, files)
    junk = add_junk(rng, files)

    class_of_image = find_correct_classes(style, parent, [names[label] for label in labels])
    classes = class_of_image and dict(zip(path_of_grey, class_of_image))
    path = write_source(rng, kind, folder, files)
    return Case(
        path, classes, f"{kind}, {style}, parent {parent!r}, junk {junk}, {len(labels)} images"
    )


def find_correct_classes(style: str, parent: str, names: list[str]) -> list[str] | None:
    """Return the class of each image, or None if the source is ambiguous or contradictory."""
    if style in ("captions", "splits", "partial"):
        return None
    if style == "none":  # a single folder is a class
        return [parent.split("/")[-2] if parent else "0"] * len(names)
    is_decimal = {name.isdecimal() for name in names}
    if style == "folders" or is_decimal == {False}:
        return names
    # In label files, all classes must be integers, or all must be names.
    return None if len(is_decimal) > 1 else [str(int(name)) for name in names]


def add_table(
    style: str, parent: str, tables: list[tuple[str, str]], files: dict[str, bytes]
) -> None:
    """Add a label file whose paths are relative to its folder."""
    rows = [(path.removeprefix(parent), name) for path, name in tables]
    if style == "dataset.json":
        content = {"labels": [[path, int(n) if n.isdecimal() else n] for path, n in rows]}
        files[parent + style] = json.dumps(content).encode()
    elif style == "metadata.csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerows([("file_name", "text", "label"), *((p, "text", n) for p, n in rows)])
        files[parent + style] = buffer.getvalue().encode()
    elif style == "metadata.jsonl":
        lines = [json.dumps({"file_name": path, "label": name}) for path, name in rows]
        files[parent + style] = ("\n".join(lines) + "\n").encode()


def add_junk(rng: random.Random, files: dict[str, bytes]) -> list[str]:
    """Add files that operating systems and storage devices create, and return their names."""
    junk = rng.sample(
        [
            "__MACOSX/cat/._1.png",
            "@eaDir/1.png/SYNOPHOTO_THUMB.jpg",
            "#recycle/1.png",
            ".ipynb_checkpoints/1.png",
            "lost+found/1.png",
            "Thumbs.db",
            "README.md",
        ],
        rng.randint(0, 3),
    )
    files.update(dict.fromkeys(junk, make_image(250)))
    return junk


def write_source(rng: random.Random, kind: str, folder: Path, files: dict[str, bytes]) -> Path:
    """Write files as a folder, a zip file, a tar file, or two tar files, and return the path."""
    names = list(files)
    rng.shuffle(names)
    if kind == "folder":
        for name in names:
            path = folder / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        return folder / "source"
    prefix = rng.choice(["", "./"])
    if kind == "zip":
        separator = rng.choice(["/", "\\"]) if not prefix else "/"
        with zipfile.ZipFile(folder / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(
                    zipfile.ZipInfo(prefix + name.replace("/", separator)), files[name]
                )
        return folder / "source.zip"
    paths = [folder / "source" / f"{i:05}.tar" for i in range(2 if kind == "tars" else 1)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for name in names:
                # The label files of an image are in the same tar file as the image.
                group = sum(name.rpartition(".")[0].encode()) % len(paths)
                if group == i or name.endswith((".jsonl", ".csv", "dataset.json")):
                    info = tarfile.TarInfo(prefix + name)
                    info.size = len(files[name])
                    archive.addfile(info, io.BytesIO(files[name]))
    return paths[0].parent if kind == "tars" else paths[0]


def generate_parquet(rng: random.Random, folder: Path) -> Case:
    """Write a random parquet file into a folder."""
    import pyarrow as pa
    from pyarrow import parquet

    column = rng.choice(["label", "cls", "target", "my_label", "breed", "none", "empty"])
    count = rng.randint(2, 6)
    labels = [rng.randrange(3) for _ in range(count)]
    greys = [10 + 20 * i for i in range(count)]
    table: dict[str, Any] = {"image": [{"bytes": make_image(grey), "path": ""} for grey in greys]}
    if column == "empty":
        table["label"] = [-1] * count
    elif column != "none":
        table[column] = labels
        table["width"] = [8] * count
    parquet.write_table(pa.table(table), folder / "a.parquet")
    classes: dict[int, str] | None = {grey: str(k) for grey, k in zip(greys, labels)}
    if column in ("none", "empty"):
        classes = dict.fromkeys(greys, "0")
    elif column == "breed":
        classes = None
    return Case(folder / "a.parquet", classes, f"parquet, column {column}")


def find_difference(case: Case) -> str:
    """Read a source, and describe the difference from the model; "" if there is none."""
    try:
        source = preprocessing.sources.open_source(case.path)
    except UserError as error:
        if case.classes is not None:
            return f"error: {error}"
        return "the message has several lines" if "\n" in str(error) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    actual = {}
    for index, label in enumerate(source.labels):
        with Image.open(source.open(index)) as image:
            grey = int(np.asarray(image)[0, 0, 0])
        actual[grey] = source.class_names[label]
    if case.classes is None:
        return f"no error, classes {actual}"
    return "" if actual == case.classes else f"classes {actual}, correct {case.classes}"


def _wrap_classes(change: Callable[[Any], Any]) -> Callable:
    original = preprocessing.sources.determine_classes
    return lambda *arguments: change(original(*arguments))


# Broken variants: the module, the name, and a function that makes the replacement.
BROKEN: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "ignored files are read": (
        preprocessing.listing,
        "find_ignored_name",
        lambda: lambda path: None,
    ),
    "paths are not normalized": (
        preprocessing.listing,
        "normalize_path",
        lambda: lambda name: name,
    ),
    "splits are classes": (preprocessing.classes, "SPLIT_NAMES", set),
    "labels are shifted": (
        preprocessing.sources,
        "determine_classes",
        lambda: _wrap_classes(lambda c: c._replace(labels=np.roll(c.labels, 1))),
    ),
    "class names are reversed": (
        preprocessing.sources,
        "determine_classes",
        lambda: _wrap_classes(lambda c: c._replace(names=c.names[::-1])),
    ),
    "all images are in one class": (
        preprocessing.sources,
        "determine_classes",
        lambda: _wrap_classes(lambda c: c._replace(labels=0 * c.labels)),
    ),
    "paths are cut at the first dot": (
        preprocessing.classes,
        "iter_stems",
        lambda: lambda path: [path.split(".")[0]],
    ),
    "extensions are case-sensitive": (
        preprocessing.listing,
        "split_extension",
        lambda: posixpath.splitext,
    ),
    "label files of folders are ignored": (
        preprocessing.classes,
        "read_tables",
        lambda: lambda listing, origin: None,
    ),
    "label files of images are ignored": (
        preprocessing.classes,
        "_read_sidecars",
        lambda: lambda listing, extension, origin: None,
    ),
    "captions are labels": (
        preprocessing.labels,
        "_parse_index",
        lambda: lambda value: 0,
    ),
    "ambiguous sources are accepted": (
        preprocessing.classes,
        "_check_not_ambiguous",
        lambda: lambda *arguments: None,
    ),
    "parquet labels are ignored": (
        preprocessing.parquet_files,
        "_find_label_column",
        lambda: lambda *arguments: None,
    ),
}


@contextmanager
def break_reader(name: str) -> Iterator[None]:
    """Replace a function of the reader by a broken variant."""
    module, attribute, make = BROKEN[name]
    with mock.patch.object(module, attribute, make()):
        yield


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="number of sources")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first source")
    parser.add_argument("--broken", action="store_true", help="also test the broken variants")
    args = parser.parse_args()
    num_differences = 0
    detected = dict.fromkeys(BROKEN, 0)
    for seed in tqdm(range(args.seed, args.seed + args.count), unit="source"):
        with tempfile.TemporaryDirectory() as folder:
            case = generate(random.Random(seed), Path(folder))
            difference = find_difference(case)
            if difference:
                num_differences += 1
                tqdm.write(f"seed {seed} ({case.description}): {difference}")
            for name in BROKEN if args.broken else ():
                with break_reader(name):
                    detected[name] += bool(find_difference(case))
    print(f"{args.count} sources, {num_differences} differences")
    if args.broken:
        for name, count in detected.items():
            print(f"broken variant, {name}: detected in {count} sources")
    sys.exit(int(bool(num_differences) or (args.broken and 0 in detected.values())))


if __name__ == "__main__":
    main()
