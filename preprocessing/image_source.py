"""A list of images with their labels, and access to the stored bytes of each image.

A source can be read in forked processes and can be pickled. Subclasses read from archives:
ZipSource (preprocessing/sources.py), TarSource (preprocessing/tar_files.py) and ParquetSource
(preprocessing/parquet_files.py).

The messages of errors that `open` raises are stored in skipped.jsonl and are compared with those of
existing caches, so they must not be reworded.
"""

import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np


@dataclass(eq=False, repr=False)
class ImageSource:
    """A source that reads images from the files of a folder, in a fixed order.

    Attributes:
        root: The folder that contains the images. In subclasses, also an archive file or a glob
            pattern.
        names: The name of each image: its path relative to `root`.
        labels: The class index of each image, (n,) int64.
        class_names: The names of all classes.
        label_origin: Where the classes come from, for example "labels from folder names".
        ignored: The number of ignored files and folders with their names, or an empty string.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    label_origin: str = field(default="", kw_only=True)
    ignored: str = field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.names)

    def describe(self) -> str:
        """Return the number of images, the classes and where they come from, in one line."""
        names = ", ".join(self.class_names[:3])
        if len(self.class_names) > 3:
            names += ", ..."
        text = f"{len(self):,} {'image' if len(self) == 1 else 'images'}, "
        text += f"{len(self.class_names):,} {'class' if len(self.class_names) == 1 else 'classes'}"
        details = filter(None, (self.label_origin, self.ignored))
        return f"{text} ({names}); {'; '.join(details)}"

    def open(self, image_index: int) -> BinaryIO:
        """Return the stored bytes of an image as a file object. Raises OSError if that fails."""
        path = self.root / self.names[image_index]
        if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe could block forever
            raise OSError("not a file")
        return path.open("rb")

    def digest(self, count: int) -> str:
        """Return the sha256 of the first `count` names and labels and of all class names."""
        digest = hashlib.sha256(json.dumps([self.class_names, count]).encode())
        for name in self.names[:count]:
            digest.update(os.fsencode(name) + b"\0")
        digest.update(self.labels[:count].astype(np.int64).tobytes())
        return digest.hexdigest()
