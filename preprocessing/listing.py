"""List the files of an image source: its images, and the files that contain their labels.

Every kind of source (folder, zip file, tar files) is listed in the same way, so that the same rules
apply to all of them: normalized paths, ignored files, label files, and splits.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
# Label files of a whole folder: EDM's format, and those of Hugging Face's ImageFolder.
TABLE_NAMES = ("dataset.json", "metadata.csv", "metadata.jsonl")
TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl")
# Label files of an image. WebDataset uses .cls and .index; img2dataset writes metadata (.json)
# and captions (.txt).
SIDECAR_EXTENSIONS = (".cls", ".index", ".json", ".txt")
# Files and folders that operating systems and network storage create, in lower case.
IGNORED_NAMES = {
    "@eadir",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__macosx",
    "thumbs.db",
    "desktop.ini",
}
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class ListedFile(NamedTuple):
    """A file of a source.

    Attributes:
        name: The name that identifies the file within the source.
        path: The normalized path, without the name of the archive.
        scope: The archive that contains the file, if the source consists of several archives.
        location: The position of the file in the source, in a form that depends on the source.
    """

    name: str
    path: str
    scope: str
    location: Any


@dataclass
class Listing:
    """The files of a source, sorted by name.

    Attributes:
        read: Returns the content of the file at a location.
        images: The images.
        tables: The label files of whole folders.
        sidecars: The label files of single images: the files by extension, and by scope and path
            without the extension.
        folders: The normalized paths of all folders of a folder source; empty for archives.
        ignored: The number of ignored files and folders by name.
        other_tables: The paths of other files that may contain labels.
    """

    read: Callable[[Any], bytes]
    images: list[ListedFile] = field(default_factory=list)
    tables: list[ListedFile] = field(default_factory=list)
    sidecars: dict[str, dict[tuple[str, str], ListedFile]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    other_tables: list[str] = field(default_factory=list)

    def add(self, name: str, location: Any, scope: str = "", path: str | None = None) -> None:
        """Add a file, unless its path contains an ignored name.

        Args:
            name: The name that identifies the file within the source.
            location: The position of the file in the source.
            scope: The archive that contains the file, if there are several.
            path: The path of the file in the source or archive. The default is `name`.
        """
        path = normalize_path(name if path is None else path)
        ignored_name = find_ignored_name(path)
        if ignored_name is not None:
            self.ignored[ignored_name] += 1
            return
        file = ListedFile(name, path, scope, location)
        stem, extension = split_extension(path)
        if extension in IMAGE_EXTENSIONS:
            self.images.append(file)
        elif posixpath.basename(path) in TABLE_NAMES:
            self.tables.append(file)
        elif extension in SIDECAR_EXTENSIONS:
            self.sidecars.setdefault(extension, {})[scope, stem] = file
        elif extension in TABLE_EXTENSIONS:
            self.other_tables.append(path)

    def sort(self) -> "Listing":
        """Sort the images by name, keep the last of several images with one name, and return self.

        Archives may contain several files with the same name, of which the last one is valid.
        """
        last_images = {image.name: image for image in self.images}
        self.images = [last_images[name] for name in sorted(last_images)]
        return self

    def describe_ignored(self) -> str:
        """Return the number of ignored files and folders with their names, or an empty string."""
        if not self.ignored:
            return ""
        count = sum(self.ignored.values())
        noun = "file or folder" if count == 1 else "files and folders"
        names = ", ".join(sorted(self.ignored)[:4])
        return f"{count:,} ignored {noun} ({names})"


def normalize_path(name: str) -> str:
    r"""Return a relative path with forward slashes, without "." and empty components.

    Backslashes are separators only if the name has no forward slash: archives that were created on
    Windows may contain names like `cat\1.png`.
    """
    if "/" not in name:
        name = name.replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def find_ignored_name(path: str) -> str | None:
    """Return the first hidden or ignored component of a path, or None."""
    for part in path.split("/"):
        if part.startswith(".") or part.lower() in IGNORED_NAMES:
            return part
    return None


def split_extension(path: str) -> tuple[str, str]:
    """Return a path without its last extension, and the extension in lower case."""
    stem, extension = posixpath.splitext(path)
    return stem, extension.lower()


def iter_stems(path: str) -> Iterator[str]:
    """Yield a path without its last extension, without the last two, and so on."""
    stem, extension = split_extension(path)
    while extension:
        yield stem
        stem, extension = split_extension(stem)


def find_split(path: str) -> str | None:
    """Return the first split name in a path, such as train in data/train-01.tar, or None."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((word for word in words if word in SPLIT_NAMES), None)
