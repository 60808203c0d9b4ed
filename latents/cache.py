"""The latent cache, read: moments, images and features by number, out of memory maps. What lies where: manifest.py.

B images asked for, C latent channels, h w latent side, R resolution, N tokens, D width.
"""

import errno
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.machine import available_memory, memory_sharing_domain, raise_open_file_limit
from latents.manifest import (
    CacheError,
    Manifest,
    join_manifests,
    read_feature_metadata,
    read_manifest,
    write_manifest,
)

__all__ = ["CacheError", "LatentCache", "Manifest", "read_manifest", "write_manifest"]
KEEP_IMAGES_REMEDY = "give the command that made it again, with --keep-images"
REMEDY = "do it again with python -m preprocessing.verify --repair"
ADVISED = 8  # batches, after one that waited for the disk
SLOWEST_MEMORY = 2e9  # bytes a second; a copy that takes longer has waited for a disk
MAX_OPEN_MAPS = 16_384  # shards mapped at once; Linux allows a process 65,530 maps


class LatentCache:
    """One cache, or several joined, image numbers 0 to len - 1. Arrays are memory-mapped on first use, so that loader
    processes each map their own; labels are held in as few bytes as the classes need. Raises CacheError.
    """

    def __init__(self, *roots: Path | str):
        self.roots = [Path(root) for root in roots]
        self.manifests = [read_manifest(root) for root in self.roots]
        for root, manifest in zip(self.roots, self.manifests):
            held = sum(shard["count"] for shard in manifest.shards)
            if held != manifest.count or held < 1:
                raise CacheError(
                    f"{root / 'manifest.json'}: its shards hold {held} images, it says {manifest.count}"
                )
        self.manifest = (
            self.manifests[0] if len(roots) == 1 else join_manifests(self.roots, self.manifests)
        )
        self.shard_roots = [
            root for root, manifest in zip(self.roots, self.manifests) for _ in manifest.shards
        ]
        self.starts = np.cumsum([0] + [shard["count"] for shard in self.manifest.shards])
        self.item = np.dtype(
            (
                self.manifest.dtype,
                (2 * self.manifest.latent_shape[0], *self.manifest.latent_shape[1:]),
            )
        )
        self._items = dict.fromkeys(
            self.manifest.moment_folders, self.item
        )  # one row of each folder that is looked at
        self.labels = np.empty(len(self), np.min_scalar_type(self.manifest.num_classes - 1))
        for k, start in enumerate(
            self.starts[:-1]
        ):  # looks at every header now, so that training does not stop on day three
            labels = self._labels(k)
            self.labels[start : start + len(labels)] = labels
            for folder in self.manifest.moment_folders:
                self._map(k, folder)
        self._ram: np.ndarray | None = None
        self.open_shards: dict[tuple[int, str], tuple[mmap.mmap, int]] = {}
        self._advise: Counter = Counter()  # by folder
        self._most_open = min(MAX_OPEN_MAPS, raise_open_file_limit() // 2)  # each map keeps one

    def __len__(self) -> int:
        return self.manifest.count

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open_shards": {}}  # maps are every process's own

    def _read(self, shard: int, folder: str, mmap_mode: str | None = None) -> np.ndarray:
        path = self.shard_roots[shard] / folder / self.manifest.shards[shard]["file"]
        try:
            return np.load(path, mmap_mode=mmap_mode)
        except (OSError, ValueError, EOFError) as error:
            gone = getattr(error, "errno", None) in (
                None,
                errno.ENOENT,
            )  # otherwise it is the disk, or the machine
            remedy = f"{REMEDY} {self.shard_roots[shard]}"
            if folder.startswith("features/"):
                remedy = f"remove {self.shard_roots[shard] / folder} and make it again with python -m preprocessing.encode_features"
            raise CacheError(
                f"{path} cannot be read ({error}){f': {remedy}' if gone else ''}"
            ) from None

    def _map(self, shard: int, folder: str) -> np.ndarray:
        entry, channels, item = (
            self.manifest.shards[shard],
            self.manifest.latent_shape[0],
            self._items[folder],
        )
        array = self._read(shard, folder, "r")
        expected = (entry["count"], *item.shape)
        if (array.shape, array.dtype) != (expected, item.base):
            path, hint = self.shard_roots[shard] / folder / entry["file"], ""
            if (
                folder in self.manifest.moment_folders
                and array.ndim == 4
                and array.shape[1] == channels
            ):
                hint = f" ({channels} channels are latents; a cache holds moments, {2 * channels} channels)"
            raise CacheError(
                f"{path} has shape {array.shape} and dtype {array.dtype}, the manifest says {expected} and {item.base}{hint}"
            )
        assert array.flags.c_contiguous, array.filename
        return array

    def _labels(self, shard: int) -> np.ndarray:
        labels, count = self._read(shard, "labels"), self.manifest.shards[shard]["count"]
        path = self.shard_roots[shard] / "labels" / self.manifest.shards[shard]["file"]
        if labels.shape != (count,):
            raise CacheError(f"{path} has shape {labels.shape}, the manifest says {(count,)}")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.manifest.num_classes:
            raise CacheError(f"{path} has labels outside 0..{self.manifest.num_classes - 1}")
        return labels

    def gather(
        self, index: np.ndarray, mirrored: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images by number, read in the order of the disk and copied once: index (B,), mirrored (B,) bool where the mirror
        image is meant -> moments (B, 2C, h, w) as stored, labels (B,) int64.
        """
        assert ((index >= 0) & (index < len(self))).all(), (index, len(self))
        labels = torch.from_numpy(self.labels[index].astype(np.int64))
        if self._ram is None:
            return torch.from_numpy(
                self._rows(index, self.manifest.moment_folders, mirrored)
            ), labels
        moments = np.empty(len(index), self.item)
        rows = index if mirrored is None else index + len(self) * mirrored.astype(np.int64)
        np.take(
            self._ram, rows, 0, moments, "clip"
        )  # checked above; any other mode takes a second copy
        return torch.from_numpy(moments), labels

    def images(self, index: np.ndarray, mirrored: np.ndarray | None = None) -> Tensor:
        """What was encoded: index (B,), mirrored (B,) bool -> (B, 3, R, R) uint8. They stay on the disk, also where the moments
        are in memory.
        """
        self.require_folder("images")
        images = self._rows(index, ["images"])
        if mirrored is not None:
            images[mirrored] = images[mirrored][..., ::-1]
        return torch.from_numpy(images)

    def features(self, slug: str, index: np.ndarray) -> Tensor:
        """What preprocessing.encode_features stored: index (B,) -> (B, N, D) float16."""
        self.require_folder(f"features/{slug}")
        return torch.from_numpy(self._rows(index, [f"features/{slug}"]))

    def read_feature_metadata(self) -> dict[str, dict]:
        """{slug: features.json} of those that every cache here holds, made by one encoder."""
        return read_feature_metadata(self.roots, self.manifests)

    def require_folder(self, folder: str) -> None:
        """Looks at the headers of "images" or "features/SLUG", once. Raises CacheError if they are not there or not sound."""
        if folder in self._items:
            return
        if folder == "images":
            for root, manifest in zip(self.roots, self.manifests):
                if not manifest.images:
                    raise CacheError(
                        f"{root} holds no images: it was made without --keep-images; {KEEP_IMAGES_REMEDY}"
                    )
            item = np.dtype((np.uint8, (3, self.manifest.resolution, self.manifest.resolution)))
        else:
            stored, slug = self.read_feature_metadata(), folder.removeprefix("features/")
            if slug not in stored:
                raise CacheError(
                    f"{' '.join(map(str, self.roots))}: no features {slug}, but {', '.join(sorted(stored)) or 'none'}: make "
                    "them with python -m preprocessing.encode_features"
                )
            item = np.dtype(
                (stored[slug]["dtype"], (stored[slug]["tokens_side"] ** 2, stored[slug]["width"]))
            )
        self._items[folder] = item
        try:
            for k in range(len(self.manifest.shards)):
                self._map(k, folder)
        except CacheError:
            del self._items[folder]
            raise

    def _rows(
        self, index: np.ndarray, folders: list[str], which: np.ndarray | None = None
    ) -> np.ndarray:
        """Row index[i] of folders[which[i]], each copied once: (B, *item)."""
        item = self._items[folders[0]]
        rows_out = np.empty(len(index), item)
        order = np.argsort(index)
        number = index[order]
        shard = np.searchsorted(self.starts, number, side="right") - 1
        side = np.zeros_like(shard) if which is None else which[order].astype(np.int64)
        size, out = item.itemsize, memoryview(rows_out).cast("B")
        begin = (number - self.starts[shard]) * size
        rows = list(zip((order * size).tolist(), shard.tolist(), side.tolist(), begin.tolist()))
        advise = self._advise[folders[0]]
        if advise:  # the disk was waited for not long ago: ask it for all rows at once
            for _, k, which_one, offset in rows:
                stored, first = self._bytes(k, folders[which_one])
                page = (first + offset) // mmap.PAGESIZE * mmap.PAGESIZE
                stored.madvise(mmap.MADV_WILLNEED, page, first + offset + size - page)
        started = time.perf_counter()
        for row, k, which_one, offset in rows:
            stored, first = self.open_shards.get((k, folders[which_one])) or self._bytes(
                k, folders[which_one]
            )
            out[row : row + size] = memoryview(stored)[first + offset : first + offset + size]
        waited = time.perf_counter() - started > len(rows) * (size / SLOWEST_MEMORY + 2e-6)
        self._advise[folders[0]] = ADVISED if waited else max(0, advise - 1)
        return rows_out

    def _bytes(self, shard: int, folder: str) -> tuple[mmap.mmap, int]:
        """The map of a shard's file, and where its array begins. It is read here and there: without being told so, the system
        reads megabytes around each image.
        """
        if (shard, folder) not in self.open_shards:
            if len(self.open_shards) >= self._most_open:
                self.open_shards.pop(next(iter(self.open_shards)))[0].close()
            array = self._map(shard, folder)
            with open(array.filename, "rb") as file:
                stored = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            stored.madvise(mmap.MADV_RANDOM)
            self.open_shards[shard, folder] = stored, array.offset
        return self.open_shards[shard, folder]

    def load_into_ram(
        self, rank: int = 0, gather: Callable[[object], list] = lambda value: [value]
    ) -> None:
        """Copies the moments (not images or features) into memory, once on each machine: its processes share them, and the
        system frees them with the last of these, however that ends. `gather` returns what every process gave, in the order of
        their ranks.
        """
        sides = self.manifest.moment_folders
        shape = (len(sides) * len(self), *self.item.shape)
        size = len(sides) * len(self) * self.item.itemsize
        rooms = gather(memory_sharing_domain())
        owner = rooms.index(rooms[rank])
        path, problem = None, None
        if owner == rank:
            try:
                if size > (free := available_memory()):
                    raise CacheError(
                        f"--cache-in-ram needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of this machine's are free"
                    )
                if not hasattr(
                    os, "memfd_create"
                ):  # macOS: no shared memory without a name, so a copy a process
                    self._ram = np.empty(shape, self.item.base)
                else:
                    self._memory = os.memfd_create("latents")
                    os.ftruncate(self._memory, size)
                    path = f"/proc/{os.getpid()}/fd/{self._memory}"
                    self._ram = np.memmap(path, self.item.base, "r+", shape=shape)
                with tqdm(
                    total=size, unit="B", unit_scale=True, desc="into memory", disable=rank > 0
                ) as bar:
                    for k, start in enumerate(self.starts[:-1]):
                        for side, array in enumerate(self._map(k, folder) for folder in sides):
                            self._ram[side * len(self) + start :][: len(array)] = array
                            bar.update(array.nbytes)
            except CacheError as error:
                problem = error
        paths = gather((path, problem))
        if any(problem for _, problem in paths):
            raise next(problem for _, problem in paths if problem)
        if owner != rank and paths[owner][0]:
            self._ram = np.memmap(paths[owner][0], self.item.base, "r", shape=shape)
