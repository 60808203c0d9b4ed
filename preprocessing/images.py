"""Where images come from, and how they become squares of the right size."""

import io
import json
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from cli import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


class ImageSource:
    """A numbered list of labelled images. Entry i is (name, label)."""

    def __init__(self, root: Path, entries: list[tuple[str, int]], class_names: list[str]):
        self.root, self.entries, self.class_names = root, entries, class_names

    def open(self, i: int) -> BinaryIO:
        """The stored bytes of entry i, as a file."""
        return (self.root / self.entries[i][0]).open("rb")


class ZipSource(ImageSource):
    """Entries are members of a zip file."""

    def __init__(self, root: Path, entries: list[tuple[str, int]], class_names: list[str]):
        super().__init__(root, entries, class_names)
        self.archive = zipfile.ZipFile(root)

    def open(self, i: int) -> BinaryIO:
        return io.BytesIO(self.archive.read(self.entries[i][0]))


def open_source(path: Path, flag: str = "--source") -> ImageSource:
    """A folder tree `class/.../image.ext`, or EDM's zip: images and a dataset.json with {"labels": [[path, class], ...]} and,
    optionally, "class_names". Raises UserError, naming `flag`, if it is missing or holds no images."""
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist")
    source = _open_zip(path, flag) if path.is_file() else _open_folder(path, flag)
    if not source.entries:
        raise UserError(f"{flag} {path} holds no images ({' '.join(sorted(EXTENSIONS))})")
    return source


def _open_folder(path: Path, flag: str) -> ImageSource:
    classes = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise UserError(f"{flag} {path} has no class folders: the layout is class/image.ext")
    entries, empty = [], []
    for label, folder in enumerate(classes):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS)
        entries += [(str(file.relative_to(path)), label) for file in files]
        if not files:
            empty.append(folder.name)
    if entries and empty:
        raise UserError(f"{flag} {path}: classes without images ({', '.join(empty[:5])}): fill or remove those folders")
    return ImageSource(path, entries, [folder.name for folder in classes])


def _open_zip(path: Path, flag: str) -> ImageSource:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in EXTENSIONS)
            meta = json.loads(archive.read("dataset.json")) if "dataset.json" in archive.namelist() else {}
    except (zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise UserError(f"{flag} {path} is not a readable zip of images with a dataset.json ({error})") from None
    labels = dict(meta.get("labels") or [])
    if not labels:  # unlabelled data is one class
        return ZipSource(path, [(name, 0) for name in names], ["0"])
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(f"{flag} {path}: dataset.json has no label for {missing[0]} (and {len(missing) - 1} more)")
    num_classes = max(labels.values()) + 1
    class_names = meta.get("class_names") or [str(k) for k in range(num_classes)]
    if len(class_names) < num_classes:
        raise UserError(f"{flag} {path}: dataset.json names {len(class_names)} classes but has label {num_classes - 1}")
    return ZipSource(path, [(name, int(labels[name])) for name in names], list(class_names))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (guided-diffusion, image_datasets.py): halve by box while twice too large, bicubic, crop.

    Images smaller than `size` are enlarged by the same bicubic step."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright and RGB. Transparency is laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode.startswith(("I", "F")):  # 16 bits a pixel: PIL's own convert would clip them at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def load_square(source: ImageSource, i: int, size: int) -> np.ndarray:
    """Entry i as (3, size, size) uint8. An RGB image that already has the size passes through untouched."""
    with source.open(i) as file, Image.open(file) as image:
        image = to_rgb(image)
        if image.size != (size, size):
            image = center_crop(image, size)
        return np.asarray(image).transpose(2, 0, 1)


def read_or_name(source: ImageSource, i: int, size: int, flag: str = "--reference") -> np.ndarray:
    """load_square; an image that does not decode is a UserError that names it."""
    try:
        return load_square(source, i, size)
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder may raise for a broken file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{flag} {source.root}: {source.entries[i][0]} does not decode ({reason})") from None
