"""Read a latent cache: moments, labels, images and features by image index (docs/data.md).

Shapes: B images per batch, C latent channels, h x w latent size, R resolution, N tokens, D feature
dimension.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.machine import get_available_memory, get_memory_sharing_domain, raise_open_file_limit
from common.progress import ProgressBar
from latents.manifest import CacheError, join_manifests
from latents.shard_reader import PrefetchPolicy, ShardReader
from latents.shared_array import SharedArray
from latents.sources import CacheSource, open_source

KEEP_IMAGES_REMEDY = "rerun the command that created it and add --keep-images"
MAX_OPEN_FILES = 16_384  # shards that a process keeps open
NUM_OPENING_THREADS = 8  # files that are opened at a time when a cache is opened


class LatentCache:
    """A latent cache, or several caches that are read as one.

    The indices of the images are 0 to len(cache) - 1.

    Moments and labels are validated when the cache is opened, so that a damaged file does not stop
    training days later; images and features are validated when they are first required. Each
    process opens a file when it first reads from it.

    Args:
        roots: Folders or URLs of the caches.
        local_cache: Folder to which remote caches are copied if there is enough space; None reads
            their rows by ranged requests.

    Attributes:
        roots: Folders or URLs of the caches.
        manifest: The manifest, joined if there are several caches.
        labels: Labels of all images, in the smallest unsigned integer type that holds them.
        open_shards: Readers of the open files, by shard index and folder.

    Raises:
        CacheError: A cache is missing or damaged, or the caches cannot be joined.
    """

    def __init__(self, *roots: Path | str, local_cache: Path | None = None):
        self.sources = [open_source(root, local_cache) for root in roots]
        self.roots = [source.root for source in self.sources]
        if len({source.get_identity() for source in self.sources}) < len(self.sources):
            raise CacheError(f"{' '.join(map(str, roots))}: the same cache is listed twice")
        self._shard_sources: list[CacheSource] = []
        for source in self.sources:
            manifest = source.manifest
            self._shard_sources += [source] * len(manifest.shards)
            num_images = sum(shard["count"] for shard in manifest.shards)
            if num_images != manifest.count or num_images < 1:
                raise CacheError(
                    f"{source.root}/manifest.json: the shards contain {num_images} images, "
                    f"but count is {manifest.count}; encode the images again"
                )
        self.manifest = join_manifests(self.roots, [source.manifest for source in self.sources])
        self.shard_starts = np.cumsum([0] + [shard["count"] for shard in self.manifest.shards])

        self._moments_format = self.manifest.moments_format
        # Shape and data type of the rows, for the folders that have been validated.
        self._row_formats: dict[str, np.dtype] = {}
        self._moments_in_ram: SharedArray | None = None
        self.open_shards: dict[tuple[int, str], ShardReader] = {}
        self._max_open_files = min(MAX_OPEN_FILES, raise_open_file_limit() // 2)
        self._prefetch_policies: dict[str, PrefetchPolicy] = defaultdict(PrefetchPolicy)

        for source in self.sources:
            source.prepare(source.manifest.required_formats)
        for folder in self.manifest.moment_folders:
            self._validate_shards(folder, self._moments_format)
        self.labels = np.empty(len(self), np.min_scalar_type(self.manifest.num_classes - 1))
        self._for_each_shard(self._read_labels)

    def _for_each_shard(self, function: Callable[[int], None]) -> None:
        """Call a function for all shards, in threads because each call waits for a disk or server.

        Raises:
            CacheError: The first error, in the order of the shards.
        """
        pool = ThreadPoolExecutor(NUM_OPENING_THREADS)
        try:
            for _ in pool.map(function, range(len(self.manifest.shards))):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_labels(self, shard_index: int) -> None:
        reader = self._open_shard(shard_index, "labels", np.dtype(np.int64))
        labels = reader.read()
        last_class = self.manifest.num_classes - 1
        if labels.size and not 0 <= labels.min() <= labels.max() <= last_class:
            raise CacheError(f"{reader.path} has labels outside 0..{last_class}; {reader.remedy}")
        start = self.shard_starts[shard_index]
        self.labels[start : start + len(labels)] = labels

    def _validate_shards(self, folder: str, row_format: np.dtype) -> None:
        """Open all files of a folder, so that a damaged file does not stop training later."""

        def validate(shard_index: int) -> None:
            self._open_shard(shard_index, folder, row_format)

        self._for_each_shard(validate)
        self._row_formats[folder] = row_format

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def is_remote(self) -> bool:
        """Whether moments are read from a URL for each batch."""
        if self._moments_in_ram is not None:
            return False
        return any(source.is_remote("moments") for source in self.sources)

    @property
    def images_per_class(self) -> list[int]:
        """The number of images of each class."""
        return np.bincount(self.labels, minlength=self.manifest.num_classes).tolist()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open_shards": {}}  # each process opens the files itself

    def gather(
        self, image_indices: np.ndarray, is_flipped: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read the moments and labels of a batch.

        Args:
            image_indices: Indices of the images, (B,) int64.
            is_flipped: Whether to read the moments of the flipped image, (B,) bool.

        Returns:
            Moments as stored, (B, 2C, h, w), and labels, (B,) int64.
        """
        is_valid = (image_indices >= 0) & (image_indices < len(self))
        assert is_valid.all(), (image_indices, len(self))
        labels = torch.from_numpy(self.labels[image_indices].astype(np.int64))
        folder_index = (
            np.zeros_like(image_indices) if is_flipped is None else is_flipped.astype(np.int64)
        )
        if self._moments_in_ram is None:
            moments = self._read_rows(image_indices, self.manifest.moment_folders, folder_index)
        else:
            moments = np.empty(len(image_indices), self._moments_format)
            row = image_indices + len(self) * folder_index
            # All indices are valid. Modes other than "clip" would buffer the result.
            np.take(self._moments_in_ram.array, row, 0, moments, "clip")
        return torch.from_numpy(moments), labels

    def describe_non_finite_moments(
        self, image_indices: np.ndarray, is_flipped: np.ndarray | None = None
    ) -> str:
        """Return which of the images has moments that are not finite, or "" if there is none.

        The arguments are the same as for `gather`.
        """
        moments, _ = self.gather(image_indices, is_flipped)
        is_finite = moments.isfinite().flatten(1).all(1)
        if is_finite.all():
            return ""
        batch_index = int(is_finite.int().argmin())
        image_index = int(image_indices[batch_index])
        folder_index = 0 if is_flipped is None else int(is_flipped[batch_index])
        folder = self.manifest.moment_folders[folder_index]
        shard_index = int(np.searchsorted(self.shard_starts, image_index, side="right")) - 1
        root = self._shard_sources[shard_index].root
        row = image_index - self.shard_starts[shard_index]
        path = f"{root}/{folder}/{self.manifest.shards[shard_index]['file']}"
        return (
            f"the moments of image {image_index} (row {row} of {path}) are not finite; "
            f"check the cache with python -m preprocessing.verify {root}"
        )

    def read_input(
        self, folder: str, image_indices: np.ndarray, is_flipped: np.ndarray | None = None
    ) -> Tensor:
        """Read the images or the stored features of a batch.

        Args:
            folder: "images" or "features/SLUG".
            image_indices: Indices of the images, (B,) int64.
            is_flipped: Whether to flip the image horizontally, (B,) bool. Ignored for features.

        Returns:
            Images, (B, 3, R, R) uint8, or features, (B, N, D) float16.
        """
        self.require_folder(folder)
        rows = self._read_rows(image_indices, [folder], np.zeros_like(image_indices))
        if folder == "images" and is_flipped is not None:
            rows[is_flipped] = rows[is_flipped][..., ::-1]
        return torch.from_numpy(rows)

    def read_feature_metadata(self) -> dict[str, dict]:
        """Return the metadata of the features that all joined caches contain, by slug.

        Features are omitted if the encoders of the caches differ, or if images have changed since
        the features were computed.

        Raises:
            CacheError: A features.json cannot be read.
        """
        first_cache, *other_caches = [source.read_feature_metadata() for source in self.sources]
        return {
            slug: metadata
            for slug, metadata in first_cache.items()
            if all(other.get(slug) == metadata for other in other_caches)
        }

    def require_folder(self, folder: str) -> None:
        """Validate the files of "images" or "features/SLUG" on the first call.

        Raises:
            CacheError: Files are missing or damaged.
        """
        if folder in self._row_formats:
            return
        row_format = self._find_input_format(folder)
        for source in self.sources:
            source.prepare({folder: row_format})
        self._validate_shards(folder, row_format)

    def _find_input_format(self, folder: str) -> np.dtype:
        """Return the shape and data type of the rows of "images" or "features/SLUG"."""
        if folder == "images":
            for source in self.sources:
                if not source.manifest.images:
                    raise CacheError(
                        f"{source.root} holds no images because it was created without "
                        f"--keep-images; {KEEP_IMAGES_REMEDY}"
                    )
            resolution = self.manifest.resolution
            return np.dtype((np.uint8, (3, resolution, resolution)))
        slug = folder.removeprefix("features/")
        metadata_by_slug = self.read_feature_metadata()
        if slug not in metadata_by_slug:
            raise CacheError(
                f"{' '.join(map(str, self.roots))}: there are no features named {slug} (available: "
                f"{', '.join(sorted(metadata_by_slug)) or 'none'}); create them with "
                "python -m preprocessing.encode_features"
            )
        metadata = metadata_by_slug[slug]
        shape = (metadata["tokens_side"] ** 2, metadata["width"])
        return np.dtype((metadata["dtype"], shape))

    def _read_rows(
        self, image_indices: np.ndarray, folders: list[str], folder_index: np.ndarray
    ) -> np.ndarray:
        """Read one row per image, (B, ...), from the folder that `folder_index` selects."""
        row_format = self._row_formats[folders[0]]
        out = np.empty(len(image_indices), row_format)

        # Locate the rows, in the order in which they are stored.
        order = np.argsort(image_indices)
        sorted_index = image_indices[order]
        shard_index = np.searchsorted(self.shard_starts, sorted_index, side="right") - 1
        row_index = sorted_index - self.shard_starts[shard_index]
        row_folders = [folders[k] for k in folder_index[order].tolist()]
        shards = zip(shard_index.tolist(), row_folders)
        rows = list(zip(order.tolist(), shards, row_index.tolist()))

        policy = self._prefetch_policies[folders[0]]
        if policy.remaining_batches or any(source.is_remote(folders[0]) for source in self.sources):
            for _, shard, row in rows:
                self._get_reader(*shard).file.prefetch(row)

        # Copy the rows. Calling `_get_reader` for every row would make this loop 5% slower.
        start_time = time.perf_counter()
        for i, shard, row in rows:
            reader = self.open_shards.get(shard) or self._get_reader(*shard)
            reader.read_into(row, out[i : i + 1])
        policy.update(len(rows), row_format.itemsize, time.perf_counter() - start_time)
        return out

    def _get_reader(self, shard_index: int, folder: str) -> ShardReader:
        """Return the reader of a shard from `open_shards`, after adding it if necessary."""
        reader = self.open_shards.get((shard_index, folder))
        if reader is None:
            if len(self.open_shards) >= self._max_open_files:
                oldest = next(iter(self.open_shards))
                del self.open_shards[oldest]
            reader = self._open_shard(shard_index, folder, self._row_formats[folder])
            reader.file.disable_read_ahead()
            self.open_shards[shard_index, folder] = reader
        return reader

    def _open_shard(self, shard_index: int, folder: str, row_format: np.dtype) -> ShardReader:
        """Validate and open a shard file."""
        shard = self.manifest.shards[shard_index]
        return self._shard_sources[shard_index].open_shard(shard, folder, row_format)

    def load_into_ram(
        self, rank: int = 0, all_gather: Callable[[object], list] = lambda value: [value]
    ) -> None:
        """Copy the moments into shared memory. Images and features stay on disk.

        There is one copy per machine. The system frees the memory when the last process exits, even
        if that process is killed.

        Args:
            rank: Rank of this process.
            all_gather: Function that returns the values of all processes, ordered by rank.

        Raises:
            CacheError: On all processes, if any process cannot load the cache.
        """
        # One process of each machine allocates the memory and fills it.
        domains = all_gather(get_memory_sharing_domain())
        owner_rank = domains.index(domains[rank])
        result: SharedArray | CacheError | None = None
        if owner_rank == rank:
            try:
                self._moments_in_ram = self._allocate_ram()
                self._fill_ram(self._moments_in_ram.array, show_progress=rank == 0)
                result = self._moments_in_ram
            except CacheError as error:
                result = error

        # The other processes map the same memory.
        results = all_gather(result)
        for process_result in results:
            if isinstance(process_result, CacheError):
                self._moments_in_ram = None
                raise process_result
        if owner_rank != rank:
            self._moments_in_ram = results[owner_rank]

    def _allocate_ram(self) -> SharedArray:
        """Allocate memory for the moments, of which those of the flipped images come last."""
        num_rows = len(self.manifest.moment_folders) * len(self)
        required_bytes = num_rows * self._moments_format.itemsize
        available_bytes = get_available_memory()
        if required_bytes > available_bytes:
            raise CacheError(
                f"--cache-in-ram needs {required_bytes / 1e9:.1f} GB of memory, but this machine "
                f"has only {available_bytes / 1e9:.1f} GB available; remove the flag"
            )
        return SharedArray((num_rows, *self._moments_format.shape), self._moments_format.base)

    def _fill_ram(self, moments: np.ndarray, show_progress: bool) -> None:
        """Read the moments of all shards, (number of rows, 2C, h, w)."""
        progress = ProgressBar(
            total=moments.nbytes,
            unit="B",
            unit_scale=True,
            desc="loading into memory",
            disable=not show_progress,
        )
        with progress:
            begin = 0
            for folder in self.manifest.moment_folders:
                for shard_index in range(len(self.manifest.shards)):
                    reader = self._open_shard(shard_index, folder, self._moments_format)
                    rows = moments[begin : begin + len(reader.file)]
                    reader.read_into(0, rows)
                    begin += len(rows)
                    progress.update(rows.nbytes)
