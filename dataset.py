"""The latent cache, whose format this file owns, and the order in which training reads it (docs/method.md, "Data").

    manifest.json      what the cache is, and the list of shards it vouches for; written last
    moments/00000.npy  (n, 2C, h, w) posterior mean and standard deviation, unscaled
    labels/00000.npy   (n,) int64

n images in a shard, C latent channels, h w latent side."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from files import write_file

FORMAT_VERSION = 1


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
    shards: list[dict] = field(default_factory=list)  # {file, count, sha256: {moments, labels}}
    skipped: int = 0  # images of the source that did not decode
    flips: bool = False
    format_version: int = FORMAT_VERSION


class CacheError(ValueError):
    """The cache is missing, incomplete, or not what its manifest says."""


def write_manifest(root: Path, manifest: Manifest) -> None:
    """The last write of preprocessing: from here on the cache is one."""
    write_file(root / "manifest.json", (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(root: Path) -> Manifest:
    """Raises CacheError where there is none, or one of another format."""
    path = root / "manifest.json"
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
        return Manifest(**content)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is not a manifest this code can read ({error}): encode the images again") from None


class LatentCache:
    """Memory-mapped moments and labels, opened on first use so that worker processes each map their own."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.starts = np.cumsum([0] + [shard["count"] for shard in self.manifest.shards])
        if self.starts[-1] != self.manifest.count or self.manifest.count < 1:
            raise CacheError(
                f"{self.root / 'manifest.json'}: its shards hold {self.starts[-1]} images, it says {self.manifest.count}"
            )
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for shard in range(len(self.manifest.shards)):  # looks at every header now, so that training does not stop on day three
            self._open(shard)
        self._maps.clear()

    def __len__(self) -> int:
        return self.manifest.count

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._maps:
            entry = self.manifest.shards[shard]
            moments_path, labels_path = self.root / "moments" / entry["file"], self.root / "labels" / entry["file"]
            try:
                moments, labels = np.load(moments_path, mmap_mode="r"), np.load(labels_path)
            except (OSError, ValueError) as error:
                raise CacheError(f"{moments_path} or its labels cannot be read ({error}): encode the images again") from None
            channels, height, width = self.manifest.latent_shape
            expected = (entry["count"], 2 * channels, height, width)
            if moments.shape != expected:
                hint = ""
                if moments.ndim == 4 and moments.shape[1] == channels:
                    hint = f" ({channels} channels are latents; a cache holds moments, {2 * channels} channels)"
                raise CacheError(f"{moments_path} has shape {moments.shape}, the manifest says {expected}{hint}")
            if labels.shape != expected[:1]:
                raise CacheError(f"{labels_path} has shape {labels.shape}, the manifest says {expected[:1]}")
            if labels.size and not 0 <= labels.min() <= labels.max() < self.manifest.num_classes:
                raise CacheError(f"{labels_path} has labels outside 0..{self.manifest.num_classes - 1}")
            self._maps[shard] = moments, labels
        return self._maps[shard]

    def gather(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images by number, read in the order of the disk: (B,) -> moments (B, 2C, h, w) as stored, labels (B,) int64."""
        channels, height, width = self.manifest.latent_shape
        moments = np.empty((len(index), 2 * channels, height, width), self.manifest.dtype)
        labels = np.empty(len(index), np.int64)
        order = np.argsort(index, kind="stable")
        shard_of = np.searchsorted(self.starts, index[order], side="right") - 1
        for shard in np.unique(shard_of):
            rows = order[shard_of == shard]
            stored_moments, stored_labels = self._open(shard)
            moments[rows] = stored_moments[index[rows] - self.starts[shard]]
            labels[rows] = stored_labels[index[rows] - self.starts[shard]]
        return torch.from_numpy(moments), torch.from_numpy(labels)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): uint64 -> uint64, well mixed."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(number: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The image at each place of the endless training stream: number (B,) int64 -> index (B,) int64 in [0, size).

    Every run of `size` numbers from a multiple of `size` on is one epoch, each a permutation of its own. The permutation is
    computed, not stored: a Feistel network over the next power of two, walked until it lands inside (Black & Rogaway 2002)."""
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    widths = (np.uint64(bits - low), np.uint64(low))
    epoch = (number // size).astype(np.uint64)
    value = (number % size).astype(np.uint64)
    pending = np.arange(len(number))
    keys = [_mix(_mix(_mix(epoch) + np.uint64(seed)) + np.uint64(i)) for i in range(6)]
    while len(pending):
        x = value[pending]
        left, right = x >> widths[1], x & ((np.uint64(1) << widths[1]) - np.uint64(1))
        for i, key in enumerate(keys):  # the halves differ in width by one bit when `bits` is odd, and swap places
            mask = (np.uint64(1) << widths[i % 2]) - np.uint64(1)
            left, right = right, left ^ (_mix(right ^ key[pending]) & mask)
        value[pending] = (left << widths[1]) | right
        pending = pending[value[pending] >= size]
    return value.astype(np.int64)


class TrainingStream(Dataset):
    """Item k is this process's share of global batch k: stream numbers (b,), moments (b, 2C, h, w), labels (b,).

    Image number n of the run is the same on any number of processes: it depends on the seed alone."""

    def __init__(self, cache: LatentCache, seed: int, batch_size: int, rank: int = 0, processes: int = 1):
        assert batch_size % processes == 0, (batch_size, processes)
        self.cache, self.seed, self.batch_size = cache, seed, batch_size
        share = batch_size // processes
        self.own = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        number = step * self.batch_size + self.own
        return torch.from_numpy(number), *self.cache.gather(shuffled(number, len(self.cache), self.seed))

    def loader(
        self, first: int, last: int, num_workers: int, pin_memory: bool, worker_init: Callable[[int], None] | None = None
    ) -> DataLoader:
        """Steps first..last - 1, in order."""
        steps = range(first, last)
        return DataLoader(self, None, sampler=steps, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=worker_init)
