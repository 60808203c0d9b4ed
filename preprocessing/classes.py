"""Determine the class of each image of a source.

The rule is the same for folders, zip files and tar files. The first of these that exists is used:

1. --unlabeled: all images belong to one class;
2. --labels FILE;
3. dataset.json, metadata.csv or metadata.jsonl in any folder of the source;
4. a file .cls, .index or .json next to each image, if these files contain classes;
5. the names of the folders that contain the images, without parent folders of all images;
6. a file .txt next to each image, if all of these files contain an integer;
7. all images belong to one class, unless the source contains files that may hold labels.
"""

from typing import NamedTuple

import numpy as np

from common.cli import UserError, describe_read_error
from common.files import ZIP_READ_ERRORS
from preprocessing.labels import (
    LabelTable,
    assign_labels,
    decode_label_file,
    index_classes,
    index_names,
    parse_sidecar,
    parse_table,
    summarize_names,
)
from preprocessing.listing import SPLIT_NAMES, ListedFile, Listing, iter_stems


class Classes(NamedTuple):
    """The classes of the images of a source.

    Attributes:
        labels: The class index of each image, (n,) int64.
        names: The names of all classes.
        origin: Where the classes come from, for example "labels from folder names".
    """

    labels: np.ndarray
    names: list[str]
    origin: str


def make_one_class(count: int, origin: str) -> Classes:
    """Return the classes of images that all belong to one class."""
    return Classes(np.zeros(count, np.int64), ["0"], origin)


def determine_classes(
    listing: Listing, table: LabelTable | None, origin: str, is_unlabeled: bool
) -> Classes:
    """Determine the class of each image in a listing (see the top of this file).

    Args:
        listing: The files of the source.
        table: The contents of --labels, or None.
        origin: The flag and path of the source, for error messages.
        is_unlabeled: Whether to put all images in one class.

    Raises:
        UserError: The classes are incomplete, contradictory or ambiguous.
    """
    images = listing.images
    if is_unlabeled:
        return make_one_class(len(images), "no labels")
    if table is None:
        table = read_tables(listing, origin)
    if table is not None:
        paths = [image.path for image in images]
        labels, names = assign_labels(paths, table, [image.scope for image in images])
        label_origin = f"labels from {table.origin.removeprefix(origin + ': ')}"
        if not table.classes:
            label_origin = "no labels"
        return Classes(labels, names, label_origin)

    for extension in (".cls", ".index", ".json"):
        if classes := _read_sidecars(listing, extension, origin):
            return classes
    from_folders = _read_folder_names(listing, origin)
    if len(from_folders.names) == 1 and (classes := _read_sidecars(listing, ".txt", origin)):
        return classes
    _check_not_ambiguous(listing, from_folders.names, origin)
    return from_folders


def read_tables(listing: Listing, origin: str) -> LabelTable | None:
    """Merge the label files of folders. Return None if there are none, or none contains classes."""
    tables = []
    classes: dict[str, object] = {}
    for file in listing.tables:
        folder, slash, name = file.path.rpartition("/")
        table = parse_table(name, _read_text(listing, file, origin), f"{origin}: {file.path}")
        if table is not None:
            tables.append(table)
            prefix = file.scope + folder + slash
            classes |= {prefix + key: value for key, value in table.classes.items()}
    if not tables:
        return None
    first = tables[0]
    for table in tables[1:]:
        if table.class_names != first.class_names:
            raise UserError(f"{first.origin} and {table.origin} have different class_names")
    return LabelTable(classes, first.class_names, first.origin)


def _read_text(listing: Listing, file: ListedFile, origin: str) -> str:
    """Return the content of a label file. Raises UserError if it cannot be read."""
    try:
        data = listing.read(file.location)
    except ZIP_READ_ERRORS as error:
        reason = describe_read_error(error)
        raise UserError(f"{origin}: {file.name} cannot be read ({reason})") from None
    return decode_label_file(data, f"{origin}: {file.name}")


def _read_sidecars(listing: Listing, extension: str, origin: str) -> Classes | None:
    """Read the class of each image from the label file next to it.

    Returns:
        The classes, or None if no image has such a file, or if the files contain no classes.

    Raises:
        UserError: Some images have no class, or two images have the same file.
    """
    matches = [_find_sidecar(listing, image, extension) for image in listing.images]
    # A .cls file has no other purpose, so it is an error if none of these files matches an image.
    if not any(matches) and not (extension == ".cls" and listing.sidecars.get(extension)):
        return None
    classes: list = []
    missing_names = []
    image_by_file: dict[ListedFile, str] = {}
    for image, file in zip(listing.images, matches):
        value = None
        if file is not None:
            if file in image_by_file:
                raise UserError(f"{origin} has two images for {file.path}; remove one of them")
            image_by_file[file] = image.name
            text = _read_text(listing, file, origin)
            value = parse_sidecar(extension, text, f"{origin}: {file.name}")
        if value is None:
            missing_names.append(image.name)
        classes.append(value)
    if missing_names:
        is_required = extension == ".cls" or len(missing_names) < len(classes)
        if extension == ".txt" or not is_required:
            return None
        raise UserError(
            f"{origin} has no {extension} file for {summarize_names(missing_names)}, or the file "
            "contains no class"
        )
    labels, names = index_classes(classes, None, origin)
    return Classes(labels, names, f"labels from {extension} files")


def _find_sidecar(listing: Listing, image: ListedFile, extension: str) -> ListedFile | None:
    files = listing.sidecars.get(extension, {})
    for stem in iter_stems(image.path):
        if (image.scope, stem) in files:
            return files[image.scope, stem]
    return None


def _read_folder_names(listing: Listing, origin: str) -> Classes:
    """Use the first folder of each path as the class, after removing folders of all images.

    Raises:
        UserError: The folders are splits, some images are outside of class folders, or some class
            folders contain no images.
    """
    folders = [image.path.split("/")[:-1] for image in listing.images]
    # Remove parent folders: the folders that contain all images and have subfolders with images.
    depth = 0
    while folders and len({tuple(parts[: depth + 1]) for parts in folders}) == 1:
        if len(folders[0]) <= depth or not any(len(parts) > depth + 1 for parts in folders):
            break
        depth += 1
    parent = "/".join(folders[0][:depth]) if folders else ""

    for level in (depth, depth + 1):
        names = {parts[level] for parts in folders if len(parts) > level}
        splits = sorted(name for name in names if name.lower() in SPLIT_NAMES)
        if len(splits) > 1:
            raise UserError(
                f"{origin} contains several splits ({', '.join(splits)}); pass the folder of one "
                "split, or --labels"
            )

    classes = [parts[depth] if len(parts) > depth else "" for parts in folders]
    labels, names_of_classes = index_names(classes, None, origin)
    if "" in names_of_classes and len(names_of_classes) > 1:
        outside_name = listing.images[classes.index("")].name
        raise UserError(
            f"{origin} has images inside and outside of class folders ({outside_name}); "
            "move all images into class folders, or pass --labels"
        )
    siblings = [folder for folder in listing.folders if folder.rpartition("/")[0] == parent]
    empty = sorted({folder.rpartition("/")[2] for folder in siblings} - set(names_of_classes))
    if empty and names_of_classes != [""]:
        raise UserError(
            f"{origin}: some classes have no images ({', '.join(empty[:5])}); "
            "add images or remove these folders"
        )
    if names_of_classes == [""]:
        return make_one_class(len(folders), "no labels")
    return Classes(labels, names_of_classes, "labels from folder names")


def _check_not_ambiguous(listing: Listing, class_names: list[str], origin: str) -> None:
    """Raise UserError if the source contains unused label files and no classes.

    Folders with numeric names, as created by img2dataset, are not classes.
    """
    used = [
        extension
        for extension in (".json", ".txt")
        if any(_find_sidecar(listing, image, extension) for image in listing.images)
    ]
    used += [file.path for file in listing.tables]
    if len(class_names) == 1:
        used += listing.other_tables
    if used and (len(class_names) == 1 or all(name.isdecimal() for name in class_names)):
        raise UserError(
            f"{origin} has {' and '.join(used)} files, but no classes were read from them; pass "
            "--labels FILE, or --unlabeled to put all images in one class"
        )
