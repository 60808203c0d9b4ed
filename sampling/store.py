"""Store samples batch by batch, and merge the batches into the result files.

Each batch is stored in separate files until all batches exist. Any number of processes on any
number of machines can therefore sample batches in any order, and can be killed at any time.

    NAME.parts/sampling.json         settings of the samples
    NAME.parts/000012.npy            images of batch 12: (B, H, W, 3) uint8
    NAME.parts/000012.safetensors    features of batch 12, if the samples are evaluated: an array
                                     NETWORK/OUTPUT, (B, ...) float32, per network and output
    NAME.npz  NAME.json  NAME.png    results: images and labels (ADM's arr_0 and arr_1), settings,
                                     and a grid of images
    NAME/000345.png                  image 345, if PNG files are requested
"""

import glob
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from common.cli import UserError
from common.evenly_spaced import make_evenly_spaced_indices
from common.files import lock, write_array, write_file, write_npz
from common.image_grid import draw_labelled_grid, save_png
from evaluations.extractors import concatenate_features
from evaluations.features import Features, NumpyFeatures
from evaluations.image_batches import NpzImages
from evaluations.runs import JsonObject
from sampling.record import check_same_settings, format_grid_title, read_record

# Maximum delay until a file that another machine has written is visible on a network file system.
FILE_WAIT_SECONDS = 120
GRID_ROWS = 10  # maximum number of classes in the grid
GRID_COLUMNS = 10  # maximum number of images per class


class StoredBatches(NamedTuple):
    """Indices of the batches that are already stored, per kind of file.

    Attributes:
        images: Batches whose images are stored.
        features: Batches whose features are stored, or all batches if no features are requested.
        pngs: Batches whose PNG files exist, or all batches if no PNG files are requested.
    """

    images: set[int]
    features: set[int]
    pngs: set[int]


class SampleStore:
    """The samples that are stored under one name in a folder.

    Args:
        folder: Folder of the results.
        name: Name of the result files.
        record: Settings of the samples, which are written to NAME.json.
        networks: sha256 of the weights of each feature network, by the name of the network.
        keep_images: Whether to write NAME.npz. If False, only the images of the grid are stored.
        write_pngs: Whether to write each image to a PNG file.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        record: JsonObject,
        networks: dict[str, str],
        keep_images: bool = True,
        write_pngs: bool = False,
    ):
        self.parts_folder = folder / f"{name}.parts"
        self.png_folder = folder / name
        self.npz_path = folder / f"{name}.npz"
        self.record_path = folder / f"{name}.json"
        self.grid_path = folder / f"{name}.png"
        self.metrics_path = folder / f"{name}.metrics.json"
        self.record = record
        self.networks = networks
        self.keep_images = keep_images
        self.write_pngs = write_pngs
        self.count = record["count"]
        self.batch_size = record["per_proc_batch_size"]
        self.batches = range(-(-self.count // self.batch_size))
        self.npz_images: NpzImages | None = None  # the images of an existing NAME.npz
        self.grid_indices: list[int] = []

    def claim(self, resources: ExitStack) -> StoredBatches:
        """Lock the samples, record their settings, and find the batches that are already stored.

        Call this method on the first process only.

        Args:
            resources: Stack that releases the lock when it is closed.

        Raises:
            UserError: Another process is sampling under this name, or existing files with this name
                have different settings.
        """
        busy = UserError(
            f"{self.parts_folder} is in use by another process; "
            "wait until it ends or choose another --name"
        )
        resources.enter_context(lock(self.parts_folder / ".lock", busy))
        resources.callback(self._remove_parts_folder_if_empty)
        self._check_compatible()

        record = json.dumps(self.record, indent=2).encode()
        write_file(self.parts_folder / "sampling.json", record)
        if self.write_pngs:
            write_file(self.png_folder / "sampling.json", record)
        # Remove incomplete files of killed processes.
        pattern = f".{glob.escape(self.npz_path.name)}.*.partial"
        for partial_file in self.npz_path.parent.glob(pattern):
            partial_file.unlink(missing_ok=True)
        return self._find_stored_batches()

    def open_npz(self) -> None:
        """Open NAME.npz if the file exists."""
        if self.npz_path.exists():
            self.npz_images = NpzImages(self.npz_path, "--name")

    def verify_npz(self) -> None:
        """Raise UserError if NAME.npz exists and is damaged."""
        if self.npz_images is not None:
            self.npz_images.verify()

    def is_complete(self) -> bool:
        """Return whether NAME.npz contains all images."""
        return self.npz_images is not None and self.npz_images.count == self.count

    def find_pending_batches(self, stored_batches: StoredBatches) -> list[int]:
        """Return the indices of the batches that lack images, features or PNG files."""
        # If images are not kept, only features are stored for a finished batch.
        images = stored_batches.images if self.keep_images else stored_batches.features
        return sorted(set(self.batches) - (images & stored_batches.features & stored_batches.pngs))

    def write_batch(
        self,
        batch: int,
        images: np.ndarray,
        features: dict[str, NumpyFeatures],
        is_new: bool,
    ) -> None:
        """Store a batch.

        Args:
            batch: Index of the batch.
            images: Images, (B, 3, H, W) uint8. The last batch is padded to B images.
            features: Features of the images by the name of the network.
            is_new: Whether the images have just been sampled. If False, they come from this store.
        """
        indices = self._indices(batch)
        pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        if self.keep_images and is_new:
            write_array(self._make_part_path(batch, "npy"), pixels)
        if not self.keep_images:
            for index in indices:
                if index in self.grid_indices:
                    write_array(self._make_grid_part_path(index), pixels[index - indices.start])
        if self.write_pngs:
            self.png_folder.mkdir(parents=True, exist_ok=True)
            for index, image in zip(indices, pixels):
                save_png(Image.fromarray(image), self.png_folder / f"{index:06d}.png")
        # Write the features last, because they mark the batch as finished if images are not kept.
        if features:
            arrays = {
                f"{network}/{name}": np.ascontiguousarray(output)
                for network, outputs in features.items()
                for name, output in outputs.as_dict().items()
            }
            metadata = {"networks": json.dumps(self.networks)}
            write_file(self._make_part_path(batch, "safetensors"), save(arrays, metadata))

    def finalize(self, labels: np.ndarray) -> None:
        """Write NAME.json, NAME.npz and NAME.png.

        Call this method on the first process only, when no batch is pending.

        Args:
            labels: Class of each image, (count,).
        """
        # Write the record first, so that an .npz never exists without its record.
        write_file(self.record_path, json.dumps(self.record, indent=2).encode())
        if self.keep_images and not self.is_complete():
            # The last batch may be padded.
            blocks = (self.read_pixels(k)[: len(self._indices(k))] for k in self.batches)
            shape = (self.count, *self.read_pixels(0).shape[1:])
            write_npz(self.npz_path, blocks, shape, arr_1=labels)
            self.open_npz()
        self._save_grid(labels)

    def read_features(self) -> dict[str, NumpyFeatures]:
        """Return the features of all images by the name of the network.

        Call this method on the first process only.
        """
        return {
            name: concatenate_features(
                (self._read_batch_features(batch, name) for batch in self.batches), self.count
            )
            for name in self.networks
        }

    def _read_batch_features(self, batch: int, network: str) -> NumpyFeatures:
        """Return the features that a network computed for a batch. The last batch may be padded."""
        arrays = load_file(_wait_for_file(self._make_part_path(batch, "safetensors")))
        prefix = f"{network}/"
        return Features(
            **{
                key.removeprefix(prefix): output
                for key, output in arrays.items()
                if key.startswith(prefix)
            }
        )

    def remove_parts_folder(self) -> None:
        """Remove the folder with the files of the batches."""
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    def choose_grid_images(self, labels: np.ndarray) -> None:
        """Choose the images of the grid, which are the first images of evenly spaced classes.

        Args:
            labels: Class of each image, (count,).
        """
        present_labels = np.unique(labels)
        self.grid_indices = [
            int(index)
            for label in present_labels[make_evenly_spaced_indices(len(present_labels), GRID_ROWS)]
            for index in np.flatnonzero(labels == label)[:GRID_COLUMNS]
        ]

    def _remove_parts_folder_if_empty(self) -> None:
        """Remove the folder unless batches are stored in it."""
        if not any(self.parts_folder.glob("[0-9]*")):
            self.remove_parts_folder()

    def _check_compatible(self) -> None:
        """Raise UserError unless existing files with this name belong to the same samples."""
        old_record = read_record(self.record_path)
        results = self.npz_path.with_suffix(".*")
        is_foreign_json = self.record_path.exists() and "ema_sha256" not in old_record
        if self.npz_path.exists() or self.metrics_path.exists() or is_foreign_json:
            check_same_settings(self.record_path, self.record, results)
        if any(self.parts_folder.glob("[0-9]*")):
            self._check_folder(self.parts_folder)
        png_indices = self._find_png_indices()
        if png_indices:
            self._check_folder(self.png_folder)

        self.open_npz()
        num_npz_images = self.npz_images.count if self.npz_images else 0
        num_existing_images = max(num_npz_images, max(png_indices, default=-1) + 1)
        if num_existing_images > self.count:
            raise UserError(
                f"{results} already contains {num_existing_images:,} images, but "
                f"--num-fid-samples is {self.count:,}; choose another --name"
            )
        if self.keep_images:
            return
        if self.npz_path.exists():
            raise UserError(
                f"--no-npz: {self.npz_path} already exists; "
                "remove the flag or choose another --name"
            )
        old_count = old_record.get("count")
        if self.metrics_path.exists() and old_count != self.count:
            raise UserError(
                f"{self.metrics_path} is for {old_count} images, which were discarded; "
                "choose another --name"
            )

    def _check_folder(self, folder: Path) -> None:
        """Raise UserError if a folder contains files of samples with different settings."""
        check_same_settings(folder / "sampling.json", self.record, folder)

    def _find_stored_batches(self) -> StoredBatches:
        """Return the batches that are stored in NAME.parts, NAME.npz and NAME."""
        images = {int(path.stem) for path in self.parts_folder.glob("[0-9]*.npy")}
        if self.npz_images is not None:
            images |= {k for k in self.batches if self._indices(k).stop <= self.npz_images.count}
        features = {k for k in self.batches if self._has_features(k)}
        pngs = set(self.batches)
        if self.write_pngs:
            png_indices = self._find_png_indices()
            pngs = {k for k in self.batches if png_indices.issuperset(self._indices(k))}
        return StoredBatches(images, features, pngs)

    def _has_features(self, batch: int) -> bool:
        """Return whether the features of all networks are stored for all images of a batch.

        The features of the last batch of an .npz have no padding. If the number of images
        increases, these features are therefore incomplete.
        """
        if not self.networks:
            return True
        try:
            with safe_open(self._make_part_path(batch, "safetensors"), "numpy") as file:
                stored_networks = json.loads(file.metadata()["networks"])
                keys = file.keys()
                num_rows = min(file.get_slice(key).get_shape()[0] for key in keys)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return False
        has_all_rows = num_rows >= len(self._indices(batch))
        return has_all_rows and self.networks.items() <= stored_networks.items()

    def _find_png_indices(self) -> set[int]:
        """Return the indices of the images that have PNG files, if PNG files are requested."""
        if not self.write_pngs:
            return set()
        return {int(path.stem) for path in self.png_folder.glob("*.png") if path.stem.isdecimal()}

    def _save_grid(self, labels: np.ndarray) -> None:
        """Write NAME.png, with one class per row."""
        images_per_class: dict[int, list[np.ndarray]] = {}
        for index in self.grid_indices:
            image = self._read_grid_image(index)
            if image is not None:
                images_per_class.setdefault(int(labels[index]), []).append(image)
        if images_per_class:
            names = self.record["class_names"]
            rows = [(names[label], np.stack(row)) for label, row in images_per_class.items()]
            save_png(draw_labelled_grid(rows, format_grid_title(self.record)), self.grid_path)

    def _read_grid_image(self, index: int) -> np.ndarray | None:
        """Return an image of the grid, (H, W, 3), or None if the image is not stored."""
        if self.npz_images is not None and self.keep_images:
            return self.npz_images.read_rows(index, index + 1)[0]
        # The file is missing if an interrupted run with a smaller count finished the batch but
        # chose different images for its grid.
        path = self._make_grid_part_path(index)
        return np.load(path) if path.exists() else None

    def read_pixels(self, batch: int) -> np.ndarray:
        """Return the images of a stored batch, (B, H, W, 3) uint8."""
        indices = self._indices(batch)
        if self.npz_images is not None and indices.stop <= self.npz_images.count:
            return self.npz_images.read_rows(indices.start, indices.stop)
        return np.load(_wait_for_file(self._make_part_path(batch, "npy")))

    def _indices(self, batch: int) -> range:
        """Return the indices of the images of a batch, without padding."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, self.count))

    def _make_part_path(self, batch: int, suffix: str) -> Path:
        """Return the path of a file with images or features of a batch."""
        return self.parts_folder / f"{batch:06d}.{suffix}"

    def _make_grid_part_path(self, index: int) -> Path:
        """Return the path of the file with an image of the grid."""
        return self.parts_folder / f"drawn-{index:06d}.npy"


def _wait_for_file(path: Path) -> Path:
    """Wait for a file that another machine may have just written, and return its path.

    Raises:
        UserError: The file is not visible after FILE_WAIT_SECONDS.
    """
    for _ in range(FILE_WAIT_SECONDS):
        if path.exists():
            return path
        list(path.parent.iterdir())  # listing a folder on a network file system refreshes it
        time.sleep(1)
    raise UserError(
        f"{path} is missing; choose a --sample-dir on a file system that all machines share"
    )
