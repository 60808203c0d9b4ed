"""The latent cache: what it is on the disk (docs/data.md), and how it is read.

    manifest.json      what the cache is, and the list of shards it vouches for; written last
    moments/00000.npy  (n, 2C, h, w) posterior mean and standard deviation, unscaled
    mirrored/00000.npy the same of the mirror images, in a cache with flips
    labels/00000.npy   (n,) int64

n images in a shard, C latent channels, h w latent side."""

import errno
import json
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from files import write_file
from machine import descriptors, free_memory, room

FORMAT_VERSION = 1
REMEDY = "do it again with python -m preprocessing.verify --repair"
ADVISED = 8  # batches, after one that waited for the disk
SLOWEST_MEMORY = 2e9  # bytes a second; a copy that takes longer has waited for a disk
MOST_OPEN = 16_384  # shards mapped at once; Linux allows a process 65,530 maps


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `mean` and `std` are those of the unscaled latents, per channel, over the whole cache."""

    source: str
    count: int
    num_classes: int
    class_names: list[str]
    resolution: int
    crop: str
    vae: str  # hub id or folder
    vae_fingerprint: str  # models.autoencoder.fingerprint
    scale: float
    shift: float
    latent_shape: list[int]  # (C, h, w)
    dtype: str
    mean: list[float]
    std: list[float]
    shards: list[dict] = field(default_factory=list)  # {file, count, sha256: {moments, labels, ...}, sum, sum_of_squares, ...}
    skipped: int = 0  # images of the source that could not be used
    flips: bool = False  # whether the mirror images are there too
    kinds: dict[str, int] = field(default_factory=dict)  # of images met: how many of each
    encoding: dict = field(default_factory=dict)  # what preprocessing was asked for: enough to do a shard again
    format_version: int = FORMAT_VERSION

    @property
    def folders(self) -> list[str]:
        """Where a shard's arrays lie."""
        return ["moments", *["mirrored"] * self.flips, "labels"]


class CacheError(ValueError):
    """The cache is missing, incomplete, or not what its manifest says."""


def write_manifest(root: Path, manifest: Manifest) -> None:
    """The last write of preprocessing: from here on the cache is one."""
    write_file(root / "manifest.json", (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(root: Path) -> Manifest:
    """Raises CacheError where there is none, or one of another format."""
    path = root / "manifest.json"
    if not root.exists():
        raise CacheError(f"{root} does not exist, seen from {Path.cwd()}")
    if not path.exists() and (root / "partial").exists():
        raise CacheError(f"{root} is not finished: run the command that makes it again")
    if not path.exists() and (root / "vae-sd").exists():
        raise CacheError(f"{root} is REPA's: make a cache of it with python -m preprocessing.import_repa {root} FOLDER")
    if not path.exists():
        raise CacheError(
            f"{root} is no latent cache (no manifest.json): make one of images with python -m "
            "preprocessing.encode_latents --source IMAGES --dest FOLDER --resolution N, of the embedded ones with make demo"
        )
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise CacheError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: encode the images again")
        if not all({"file", "count"} <= shard.keys() for shard in content["shards"]):
            raise KeyError("a shard without file or count")
        return Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{path} is not a manifest this code can read ({error}): encode the images again") from None


# What caches must share to be read as one; the images, and how many there are, may differ.
SHARED = ("class_names", "resolution", "vae_fingerprint", "scale", "shift", "latent_shape", "dtype", "flips")


def joined(roots: list[Path], manifests: list[Manifest]) -> Manifest:
    """Several caches as one, in the order given. Raises CacheError if they do not go together."""
    first = manifests[0]
    if len({root.resolve() for root in roots}) < len(roots):
        raise CacheError(f"{' '.join(map(str, roots))}: one cache stands there twice")
    for root, manifest in zip(roots, manifests):
        for name in SHARED:
            ours, theirs = getattr(first, name), getattr(manifest, name)
            if ours != theirs and name == "class_names" and len(ours) == len(theirs):
                k = next(k for k, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                ours, theirs = (f"{names[k]!r} for class {k}" for names in (ours, theirs))
            elif ours != theirs and name == "class_names":
                ours, theirs = f"{len(ours)} classes", f"{len(theirs)} classes"
            if ours != theirs:
                raise CacheError(f"{roots[0]} and {root} cannot be joined: {name} is {ours} in one, {theirs} in the other")
    weights = np.array([manifest.count for manifest in manifests]) / sum(manifest.count for manifest in manifests)
    mean = weights @ np.array([manifest.mean for manifest in manifests])
    square = weights @ np.array([np.square(manifest.mean) + np.square(manifest.std) for manifest in manifests])
    return replace(
        first,
        source=" + ".join(manifest.source for manifest in manifests),
        count=sum(manifest.count for manifest in manifests),
        mean=mean.tolist(),
        std=np.sqrt(square - mean**2).tolist(),
        shards=[shard for manifest in manifests for shard in manifest.shards],
        encoding={"joined": [[manifest.count, manifest.mean] for manifest in manifests]},
        skipped=sum(manifest.skipped for manifest in manifests),
    )


class LatentCache:
    """One cache, or several joined, image numbers 0 to len - 1. Moments are memory-mapped on first use, so that loader
    processes each map their own; labels are held in as few bytes as the classes need. Raises CacheError."""

    def __init__(self, *roots: Path | str):
        self.roots = [Path(root) for root in roots]
        manifests = [read_manifest(root) for root in self.roots]
        for root, manifest in zip(self.roots, manifests):
            held = sum(shard["count"] for shard in manifest.shards)
            if held != manifest.count or held < 1:
                raise CacheError(f"{root / 'manifest.json'}: its shards hold {held} images, it says {manifest.count}")
        self.manifest = manifests[0] if len(manifests) == 1 else joined(self.roots, manifests)
        self.root_of = [root for root, manifest in zip(self.roots, manifests) for _ in manifest.shards]
        self.starts = np.cumsum([0] + [shard["count"] for shard in self.manifest.shards])
        self.item = np.dtype((self.manifest.dtype, (2 * self.manifest.latent_shape[0], *self.manifest.latent_shape[1:])))
        self.labels = np.empty(len(self), np.min_scalar_type(self.manifest.num_classes - 1))
        for k, start in enumerate(self.starts[:-1]):  # looks at every header now, so that training does not stop on day three
            labels = self._labels(k)
            self.labels[start : start + len(labels)] = labels
            self._map(k)
        self._ram: np.ndarray | None = None
        self._open: dict[int, list[tuple[mmap.mmap, int]]] = {}
        self._advise = 0
        self._most_open = min(MOST_OPEN, descriptors() // 2) // len(self.manifest.folders[:-1])  # each map keeps one

    def __len__(self) -> int:
        return self.manifest.count

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # maps are every process's own

    def _read(self, shard: int, folder: str, mmap_mode: str | None = None) -> np.ndarray:
        path = self.root_of[shard] / folder / self.manifest.shards[shard]["file"]
        try:
            return np.load(path, mmap_mode=mmap_mode)
        except (OSError, ValueError, EOFError) as error:
            gone = getattr(error, "errno", None) in (None, errno.ENOENT)  # otherwise it is the disk, or the machine
            raise CacheError(f"{path} cannot be read ({error}){f': {REMEDY} {self.root_of[shard]}' if gone else ''}") from None

    def _map(self, shard: int) -> list[np.ndarray]:
        """Moments, and of a cache with flips those of the mirror images."""
        entry, channels = self.manifest.shards[shard], self.manifest.latent_shape[0]
        maps = []
        for folder in self.manifest.folders[:-1]:
            array = self._read(shard, folder, "r")
            expected = (entry["count"], *self.item.shape)
            if (array.shape, array.dtype) != (expected, self.item.base):
                path, hint = self.root_of[shard] / folder / entry["file"], ""
                if array.ndim == 4 and array.shape[1] == channels:
                    hint = f" ({channels} channels are latents; a cache holds moments, {2 * channels} channels)"
                raise CacheError(
                    f"{path} has shape {array.shape} and dtype {array.dtype}, the manifest says {expected} and "
                    f"{self.manifest.dtype}{hint}"
                )
            assert array.flags.c_contiguous, array.filename
            maps.append(array)
        return maps

    def _labels(self, shard: int) -> np.ndarray:
        labels, count = self._read(shard, "labels"), self.manifest.shards[shard]["count"]
        path = self.root_of[shard] / "labels" / self.manifest.shards[shard]["file"]
        if labels.shape != (count,):
            raise CacheError(f"{path} has shape {labels.shape}, the manifest says {(count,)}")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.manifest.num_classes:
            raise CacheError(f"{path} has labels outside 0..{self.manifest.num_classes - 1}")
        return labels

    def gather(self, index: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Images by number, read in the order of the disk and copied once: index (B,), mirrored (B,) bool where the mirror
        image is meant -> moments (B, 2C, h, w) as stored, labels (B,) int64."""
        assert ((index >= 0) & (index < len(self))).all(), (index, len(self))
        moments = np.empty(len(index), self.item)
        labels = torch.from_numpy(self.labels[index].astype(np.int64))
        if self._ram is not None:
            rows = index if mirrored is None else index + len(self) * mirrored.astype(np.int64)
            np.take(self._ram, rows, 0, moments, "clip")  # checked above; any other mode takes a second copy
            return torch.from_numpy(moments), labels
        order = np.argsort(index)
        number = index[order]
        shard = np.searchsorted(self.starts, number, side="right") - 1
        side = np.zeros_like(shard) if mirrored is None else mirrored[order].astype(np.int64)
        size, out = self.item.itemsize, memoryview(moments).cast("B")
        begin = (number - self.starts[shard]) * size
        rows = list(zip((order * size).tolist(), shard.tolist(), side.tolist(), begin.tolist()))
        if self._advise:  # the disk was waited for not long ago: ask it for all rows at once
            for _, k, which, offset in rows:
                stored, first = self._bytes(k)[which]
                page = (first + offset) // mmap.PAGESIZE * mmap.PAGESIZE
                stored.madvise(mmap.MADV_WILLNEED, page, first + offset + size - page)
        started = time.perf_counter()
        for row, k, which, offset in rows:
            stored, first = self._bytes(k)[which]
            out[row : row + size] = memoryview(stored)[first + offset : first + offset + size]
        waited = time.perf_counter() - started > len(rows) * (size / SLOWEST_MEMORY + 2e-6)
        self._advise = ADVISED if waited else max(0, self._advise - 1)
        return torch.from_numpy(moments), labels

    def _bytes(self, shard: int) -> list[tuple[mmap.mmap, int]]:
        """The maps of a shard's files, and where their arrays begin. They are read here and there: without being told so, the
        system reads megabytes around each image."""
        if shard not in self._open:
            if len(self._open) >= self._most_open:
                for stored, _ in self._open.pop(next(iter(self._open))):
                    stored.close()
            self._open[shard] = []
            for array in self._map(shard):
                with open(array.filename, "rb") as file:
                    stored = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                stored.madvise(mmap.MADV_RANDOM)
                self._open[shard].append((stored, array.offset))
        return self._open[shard]

    def load_into_ram(self, rank: int = 0, gather: Callable[[object], list] = lambda value: [value]) -> None:
        """Copies the moments into memory, once on each machine: its processes share them, and the system frees them with the
        last of these, however that ends. `gather` returns what every process gave, in the order of their ranks."""
        sides = self.manifest.folders[:-1]
        shape = (len(sides) * len(self), *self.item.shape)
        size = len(sides) * len(self) * self.item.itemsize
        rooms = gather(room())
        owner = rooms.index(rooms[rank])
        path, problem = None, None
        if owner == rank:
            try:
                if size > (free := free_memory()):
                    raise CacheError(
                        f"--cache-in-ram needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of this machine's are free"
                    )
                if not hasattr(os, "memfd_create"):  # macOS: no shared memory without a name, so a copy a process
                    self._ram = np.empty(shape, self.item.base)
                else:
                    self._memory = os.memfd_create("latents")
                    os.ftruncate(self._memory, size)
                    path = f"/proc/{os.getpid()}/fd/{self._memory}"
                    self._ram = np.memmap(path, self.item.base, "r+", shape=shape)
                with tqdm(total=size, unit="B", unit_scale=True, desc="into memory", disable=rank > 0) as bar:
                    for k, start in enumerate(self.starts[:-1]):
                        for side, array in enumerate(self._map(k)):
                            self._ram[side * len(self) + start :][: len(array)] = array
                            bar.update(array.nbytes)
            except CacheError as error:
                problem = error
        paths = gather((path, problem))
        if any(problem for _, problem in paths):
            raise next(problem for _, problem in paths if problem)
        if owner != rank and paths[owner][0]:
            self._ram = np.memmap(paths[owner][0], self.item.base, "r", shape=shape)
