"""A tree of REPA's or SRA's preprocessing -> shards, without encoding anything again.

vae-sd/00000/img-mean-std-00000000.npy  (2C, h, w) float32, posterior mean and standard deviation
vae-sd/dataset.json                     {"labels": [["00000/img-mean-std-00000000.npy", class], ...]}
images/00000/img00000000.png            what they were made of: for preview.png, and with --keep-images for the cache
"""

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

from common.cli import UserError
from common.files import NpyWriter, discard_on_error
from models.autoencoder import DEFAULT_VAE, Autoencoder
from models.errors import FieldError
from preprocessing.build import image_range
from preprocessing.cache_preview import make_preview, spread_indices
from preprocessing.encoding import absolute_if_exists, map_in_order
from preprocessing.images import BadImage, SquareReader, UnreadableImage, format_image_error
from preprocessing.labels import assign_labels, parse_dataset_json, summarize_names
from preprocessing.shards import Shard, shard_file_name
from preprocessing.sources import ImageSource

READERS = 16  # threads that read small files, which is waiting for the most part


@dataclass(frozen=True)
class ImportSettings:
    """What is asked for: import_repa's flags of the same names."""

    source: str
    skip_bad: bool = False
    vae: str = DEFAULT_VAE
    dtype: str = "float16"
    shard_size: int = 8192
    keep_images: bool = False


class ImportJob:
    """The job (preprocessing.build.Job) that reads moments from REPA's files."""

    def __init__(self, settings: ImportSettings, device: str):
        """Lists the files and opens the VAE. Raises UserError."""
        root = Path(settings.source)
        if not root.is_dir():
            raise UserError(f"SRC {root} is no folder")
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        self.pixels = self.root.parent / "images"
        self.source = open_moments(self.root)
        self.description, self.num_images, self.shard_size = (
            f"importing {root.name}",
            len(self.source),
            settings.shard_size,
        )
        self.skip_bad, self.dtype, self.keep_images = (
            settings.skip_bad,
            np.dtype(settings.dtype),
            settings.keep_images,
        )
        try:
            self.vae = Autoencoder(settings.vae, device)
        except FieldError as error:
            raise UserError(f"--vae {error.reason}") from None
        self.shape = self._shape_of_first()
        channels, side = self.vae.channels, self.shape[1]
        self.settings = asdict(settings) | {"made_by": "import_repa"}
        self.settings |= {
            name: absolute_if_exists(self.settings[name]) for name in ("source", "vae")
        }
        self.plan: dict[str, Any] = {
            "images": self.num_images,
            "vae_fingerprint": self.vae.fingerprint(),
            "dtype": settings.dtype,
            "shard_size": settings.shard_size,
            "keep_images": settings.keep_images,
            "names_and_labels": self.source.digest(self.num_images),
        }
        self.manifest_fields: dict[str, Any] = {
            "source": settings.source,
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "resolution": side * self.vae.downsampling_factor,
            "crop": "as imported",
            "vae": settings.vae,
            "vae_fingerprint": self.plan["vae_fingerprint"],
            "scale": self.vae.scale.scale,
            "shift": self.vae.scale.shift,
            "latent_shape": [channels, side, side],
            "dtype": settings.dtype,
            "flips": False,
            "images": settings.keep_images,
        }

    def _shape_of_first(self) -> tuple[int, int, int]:
        """What every file must have: (2C, h, h)."""
        shapes: list[tuple] = []
        for i in spread_indices(
            self.num_images
        ):  # a few, of which one may be odd; reading its shard will say so
            with suppress(OSError, ValueError, EOFError, AttributeError):
                shapes.append((np.load(self.root / self.source.names[i], mmap_mode="r").shape, i))
        for shape, i in sorted(
            shapes, key=lambda pair: -[shape for shape, _ in shapes].count(pair[0])
        ):
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
                line = format_image_error(
                    "SRC", self.source, i, error.strerror, "could not be read"
                )
                raise UserError(
                    f"{line}: when that is mended, run the same command again"
                ) from None
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

    def _read_both(self, i: int) -> tuple[np.ndarray, np.ndarray | None] | BadImage:
        """Moments and, where images are kept, the image."""
        moments = self._read(i)
        if isinstance(moments, BadImage) or not self.keep_images:
            return moments if isinstance(moments, BadImage) else (moments, None)
        try:
            pixels = self._image_of(self.source.names[i])
        except BadImage as error:
            return BadImage(f"its image: {error}")
        except UnreadableImage as error:
            line = format_image_error(
                "SRC", self.source, i, error, "has an image that could not be read"
            )
            raise UserError(f"{line}: when that is mended, run the same command again") from None
        return (
            BadImage(f"its image is not in {self.pixels}")
            if pixels is None
            else (moments, pixels.numpy())
        )

    def iter_shards(
        self,
        dest: Path,
        shard_indices: list[int],
        progress: Callable[[int], None],
        only_images: bool = False,
    ) -> Iterator[tuple[int, Shard]]:
        """(number, shard) of each, in this order. Also for the images alone the moments are read, to be compared."""
        for shard in shard_indices:
            images, side = None, self.manifest_fields["resolution"]
            if self.keep_images:
                images = NpyWriter(
                    dest / "images" / shard_file_name(shard), np.uint8, (3, side, side)
                )
            with discard_on_error(images):
                made = self._shard(shard, progress, images)
            yield shard, made

    def _shard(
        self, shard: int, progress: Callable[[int], None], images: NpyWriter | None
    ) -> Shard:
        numbers, labels, skipped = image_range(self, shard), [], []
        moments = np.empty((len(numbers), *self.shape), self.dtype)
        with ThreadPoolExecutor(READERS) as pool:
            for i, read in zip(numbers, map_in_order(pool, self._read_both, numbers, 4 * READERS)):
                if isinstance(read, BadImage):
                    if not self.skip_bad:
                        pool.shutdown(cancel_futures=True)
                        raise UserError(
                            f"{format_image_error('SRC', self.source, i, read)}; mend it or pass --skip-bad"
                        )
                    skipped.append(
                        {
                            "file": self.source.names[i],
                            "shard": shard_file_name(shard),
                            "reason": str(read),
                        }
                    )
                else:
                    moments[len(labels)] = read[0]
                    labels.append(self.source.labels[i])
                    if images:
                        images.append(read[1][None])
                if (i + 1) % 256 == 0 or i == numbers[-1]:
                    progress(i % 256 + 1 if i >= numbers[0] + 255 else i - numbers[0] + 1)
        arrays = {"moments": moments[: len(labels)], "labels": np.array(labels, np.int64)}
        return Shard(
            arrays, skipped, Counter({"imported moments": len(labels)} if labels else {}), images
        )

    def make_preview(self) -> tuple[Image.Image, str]:
        """Moments spread over the tree, decoded, beside the images they were made of where those are kept."""
        names, images, moments = [], [], []
        for i in spread_indices(self.num_images):
            values = self._read(i)
            if not isinstance(values, BadImage):
                names.append(self.source.class_names[self.source.labels[i]])
                moments.append(torch.from_numpy(values.astype(self.dtype))[None])
                images.append(None)
                with suppress(BadImage):
                    images[-1] = self._image_of(self.source.names[i])
        return make_preview(names, images, moments, self.vae)

    def _image_of(self, name: str) -> torch.Tensor | None:
        """Raises BadImage."""
        digits = re.findall(r"\d+", Path(name).stem)
        path = Path(name).parent / f"img{digits[-1]}.png" if digits else None
        if path is None or not (self.pixels / path).exists():
            return None
        source = ImageSource(self.pixels, [str(path)], np.zeros(1, np.int64), ["0"])
        return torch.from_numpy(
            SquareReader(self.manifest_fields["resolution"]).read(source, 0).pixels.copy()
        )


def open_moments(root: Path) -> ImageSource:
    """Names and labels of the .npy files under `root`, paired by name. Raises UserError."""
    names = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        prefix = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"
        names += [
            prefix + file for file in files if file.endswith(".npy") and not file.startswith(".")
        ]
    if not names:
        raise UserError(
            f"SRC {root} holds no .npy files: it should be REPA's data folder, with vae-sd/00000/img-mean-std-*.npy"
        )
    names.sort()
    record = root / "dataset.json"
    if not record.exists():
        raise UserError(
            f"SRC {record} is missing, and with it the classes: REPA's encoding writes it last; was it finished?"
        )
    given = parse_dataset_json(record.read_bytes(), f"SRC {record}")
    gone = sorted({*given.classes} - {*names})
    if gone:
        raise UserError(
            f"SRC {record} names what is not there: {summarize_names(gone)}; is the tree whole?"
        )
    return ImageSource(root, names, *assign_labels(names, given))
