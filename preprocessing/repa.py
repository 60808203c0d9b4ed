"""A tree of REPA's or SRA's preprocessing -> shards, without encoding anything again.

vae-sd/00000/img-mean-std-00000000.npy  (2C, h, w) float32, posterior mean and standard deviation
vae-sd/dataset.json                     {"labels": [["00000/img-mean-std-00000000.npy", class], ...]}
images/00000/img00000000.png            what they were made of; only looked at, for preview.png"""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cli import UserError
from models.autoencoder import DEFAULT_VAE, Autoencoder
from preprocessing.build import Shard, file_of, numbers_of
from preprocessing.encoding import lasting
from preprocessing.images import BadImage, Square, bad_line
from preprocessing.labels import labelled, read_json, some
from preprocessing.preview import compare, spread
from preprocessing.sources import ImageSource

READERS = 16  # threads that read small files, which is waiting for the most part


@dataclass(frozen=True)
class Settings:
    """What is asked for: import_repa's flags of the same names."""

    source: str
    skip_bad: bool = False
    vae: str = DEFAULT_VAE
    dtype: str = "float16"
    shard_size: int = 8192


class Import:
    """The job (preprocessing.build.Job) that reads moments from REPA's files."""

    def __init__(self, settings: Settings, device: str):
        """Lists the files and opens the VAE. Raises UserError."""
        root = Path(settings.source)
        if not root.is_dir():
            raise UserError(f"SRC {root} is no folder")
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        self.pixels = self.root.parent / "images"
        self.source = open_moments(self.root)
        self.what, self.images, self.shard_size = f"importing {root.name}", len(self.source), settings.shard_size
        self.skip_bad, self.dtype = settings.skip_bad, np.dtype(settings.dtype)
        try:
            self.vae = Autoencoder(settings.vae, device)
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        self.shape = self._shape_of_first()
        channels, side = self.vae.channels, self.shape[1]
        self.settings = asdict(settings) | {"made_by": "import_repa"}
        self.settings |= {name: lasting(self.settings[name]) for name in ("source", "vae")}
        self.plan: dict[str, Any] = {
            "images": self.images, "vae_fingerprint": self.vae.fingerprint(), "dtype": settings.dtype,
            "shard_size": settings.shard_size, "names_and_labels": self.source.digest(self.images),
        }  # fmt: skip
        self.manifest: dict[str, Any] = {
            "source": settings.source, "num_classes": len(self.source.class_names), "class_names": self.source.class_names,
            "resolution": side * self.vae.factor, "crop": "as imported", "vae": settings.vae,
            "vae_fingerprint": self.plan["vae_fingerprint"], "scale": self.vae.scale.scale, "shift": self.vae.scale.shift,
            "latent_shape": [channels, side, side], "dtype": settings.dtype, "flips": False,
        }  # fmt: skip

    def _shape_of_first(self) -> tuple[int, int, int]:
        """What every file must have: (2C, h, h)."""
        shapes: list[tuple] = []
        for i in spread(self.images):  # a few, of which one may be odd; reading its shard will say so
            with suppress(OSError, ValueError, EOFError, AttributeError):
                shapes.append((np.load(self.root / self.source.names[i], mmap_mode="r").shape, i))
        for shape, i in sorted(shapes, key=lambda pair: -[shape for shape, _ in shapes].count(pair[0])):
            channels = self.vae.channels
            if len(shape) == 4 and shape[0] == 1:
                shape = shape[1:]
            if len(shape) == 3 and shape[0] == channels:
                raise UserError(
                    f"SRC {self.root / self.source.names[i]} has {channels} channels: a latent, drawn and perhaps scaled, not "
                    f"the posterior's mean and std ({2 * channels} channels), which cannot be had from it: encode the images"
                )
            if len(shape) != 3 or shape[0] != 2 * channels or shape[1] != shape[2]:
                raise UserError(
                    f"SRC {self.root / self.source.names[i]} has shape {shape}; wanted are {2 * channels} channels, mean and "
                    f"std of --vae {self.vae.name}, and a square"
                )
            return shape
        raise UserError(f"SRC {self.root}: not one file can be read")

    def _read(self, i: int) -> np.ndarray | BadImage:
        try:
            moments = np.load(self.root / self.source.names[i])
        except (OSError, ValueError, EOFError) as error:
            if getattr(error, "errno", None) not in (None, errno.ENOENT, errno.EACCES):
                line = bad_line("SRC", self.source, i, error.strerror, "could not be read")
                raise UserError(f"{line}: when that is mended, run the same command again") from None
            return BadImage(f"{type(error).__name__}: {error}".splitlines()[0])
        if not isinstance(moments, np.ndarray) or moments.dtype.kind != "f":
            return BadImage("it is no array of floating-point numbers")
        if moments.shape not in (self.shape, (1, *self.shape)):
            return BadImage(f"its shape is {moments.shape}, others have {self.shape}")
        moments = moments.reshape(self.shape)
        if (moments[len(moments) // 2 :] < 0).any():
            return BadImage("negative standard deviations: are these log-variances?")
        with np.errstate(over="ignore"):
            if not np.isfinite(moments.astype(self.dtype)).all():
                return BadImage(f"it has values that {self.dtype} cannot hold")
        return moments

    def shards(self, numbers: list[int], progress: Callable[[int], None]) -> Iterator[tuple[int, Shard]]:
        """(number, shard) of each, in this order."""
        with ThreadPoolExecutor(READERS) as pool:
            for shard in numbers:
                images = numbers_of(self, shard)
                moments, labels, skipped = np.empty((len(images), *self.shape), self.dtype), [], []
                for i, values in zip(images, pool.map(self._read, images)):
                    if isinstance(values, BadImage):
                        if not self.skip_bad:
                            pool.shutdown(cancel_futures=True)
                            raise UserError(f"{bad_line('SRC', self.source, i, values)}; mend it or pass --skip-bad")
                        skipped.append({"file": self.source.names[i], "shard": file_of(shard), "reason": str(values)})
                    else:
                        moments[len(labels)] = values
                        labels.append(self.source.labels[i])
                    if (i + 1) % 256 == 0 or i == images[-1]:
                        progress(i % 256 + 1 if i >= images[0] + 255 else i - images[0] + 1)
                arrays = {"moments": moments[: len(labels)], "labels": np.array(labels, np.int64)}
                yield shard, Shard(arrays, skipped, Counter({"imported moments": len(labels)} if labels else {}))

    def preview(self) -> tuple[Image.Image, str]:
        """Moments spread over the tree, decoded, beside the images they were made of where those are kept."""
        names, images, moments = [], [], []
        for i in spread(self.images):
            values = self._read(i)
            if not isinstance(values, BadImage):
                names.append(self.source.class_names[self.source.labels[i]])
                moments.append(torch.from_numpy(values.astype(self.dtype))[None])
                images.append(self._image_of(self.source.names[i]))
        return compare(names, images, moments, self.vae)

    def _image_of(self, name: str) -> torch.Tensor | None:
        digits = re.findall(r"\d+", Path(name).stem)
        path = Path(name).parent / f"img{digits[-1]}.png" if digits else None
        if path is None or not (self.pixels / path).exists():
            return None
        source = ImageSource(self.pixels, [str(path)], np.zeros(1, np.int64), ["0"])
        try:
            return torch.from_numpy(Square(self.manifest["resolution"]).read(source, 0).pixels.copy())
        except BadImage:
            return None


def open_moments(root: Path) -> ImageSource:
    """Names and labels of the .npy files under `root`, paired by name. Raises UserError."""
    names = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        prefix = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"
        names += [prefix + file for file in files if file.endswith(".npy") and not file.startswith(".")]
    if not names:
        raise UserError(
            f"SRC {root} holds no .npy files: it should be REPA's data folder, with vae-sd/00000/img-mean-std-*.npy"
        )
    names.sort()
    record = root / "dataset.json"
    if not record.exists():
        raise UserError(f"SRC {record} is missing, and with it the classes: REPA's encoding writes it last; was it finished?")
    given = read_json(record.read_bytes(), f"SRC {record}")
    gone = sorted({*given.classes} - {*names})
    if gone:
        raise UserError(f"SRC {record} names what is not there: {some(gone)}; is the tree whole?")
    return ImageSource(root, names, *labelled(names, given))
