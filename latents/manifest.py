"""The latent cache on the disk (docs/data.md): what it is, whether several go together, what features it has.

    manifest.json      what the cache is, and the list of shards it vouches for; written last
    moments/00000.npy  (n, 2C, h, w) posterior mean and standard deviation, unscaled
    mirrored/00000.npy the same of the mirror images, in a cache with flips
    labels/00000.npy   (n,) int64
    images/00000.npy   (n, 3, R, R) uint8, what was encoded, in a cache that keeps the images
    features/SLUG/     of an image encoder, by preprocessing.encode_features: 00000.npy (n, N, D) float16 and features.json

n images in a shard, C latent channels, h w latent side, R resolution, N tokens, D width.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from common.files import write_file

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
    scale: (
        float | list[float]
    )  # of the latent, models.autoencoder.LatentScale; by channel for some VAEs
    shift: float | list[float]
    latent_shape: list[int]  # (C, h, w)
    dtype: str
    mean: list[float]
    std: list[float]
    shards: list[dict] = field(
        default_factory=list
    )  # {file, count, sha256: {moments, labels, ...}, sum, sum_of_squares, ...}
    skipped: int = 0  # images of the source that could not be used
    flips: bool = False  # whether the mirror images are there too
    images: bool = False  # whether the images are kept
    kinds: dict[str, int] = field(default_factory=dict)  # of images met: how many of each
    encoding: dict = field(
        default_factory=dict
    )  # what preprocessing was asked for: enough to do a shard again
    format_version: int = FORMAT_VERSION

    @property
    def moment_folders(self) -> list[str]:
        """Where a shard's moments lie."""
        return ["moments", *["mirrored"] * self.flips]

    @property
    def folders(self) -> list[str]:
        """Where a shard's arrays lie."""
        return [*self.moment_folders, "labels", *["images"] * self.images]


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
        raise CacheError(
            f"{root} is REPA's: make a cache of it with python -m preprocessing.import_repa {root} FOLDER"
        )
    if not path.exists():
        raise CacheError(
            f"{root} is no latent cache (no manifest.json): make one of images with python -m "
            "preprocessing.encode_latents --source IMAGES --dest FOLDER --resolution N, of the embedded ones with make demo"
        )
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}: encode the images again"
            )
        if not all({"file", "count"} <= shard.keys() for shard in content["shards"]):
            raise KeyError("a shard without file or count")
        return Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"{path} is not a manifest this code can read ({error}): encode the images again"
        ) from None


# What caches must share to be read as one; the images, and how many there are, may differ.
SHARED = (
    "class_names",
    "resolution",
    "vae_fingerprint",
    "scale",
    "shift",
    "latent_shape",
    "dtype",
    "flips",
)


def join_manifests(roots: list[Path], manifests: list[Manifest]) -> Manifest:
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
                raise CacheError(
                    f"{roots[0]} and {root} cannot be joined: {name} is {ours} in one, {theirs} in the other"
                )
    weights = np.array([manifest.count for manifest in manifests]) / sum(
        manifest.count for manifest in manifests
    )
    mean = weights @ np.array([manifest.mean for manifest in manifests])
    square = weights @ np.array(
        [np.square(manifest.mean) + np.square(manifest.std) for manifest in manifests]
    )
    return replace(
        first,
        source=" + ".join(manifest.source for manifest in manifests),
        count=sum(manifest.count for manifest in manifests),
        mean=mean.tolist(),
        std=np.sqrt(square - mean**2).tolist(),
        shards=[shard for manifest in manifests for shard in manifest.shards],
        encoding={"joined": [[manifest.count, manifest.mean] for manifest in manifests]},
        skipped=sum(manifest.skipped for manifest in manifests),
        images=all(manifest.images for manifest in manifests),
    )


def read_feature_metadata(roots: list[Path], manifests: list[Manifest]) -> dict[str, dict]:
    """{slug: features.json} of the features that every cache holds, by one encoder and of the images that are there now. Raises
    CacheError for a features.json that cannot be read.
    """
    found: dict[str, dict] = {}
    for i, (root, manifest) in enumerate(zip(roots, manifests)):
        here = {}
        for path in sorted((root / "features").glob("*/features.json")):
            try:
                stored = json.loads(path.read_text())
                kind = {
                    name: stored[name]
                    for name in ("encoder", "fingerprint", "side", "tokens_side", "width", "dtype")
                }
                of = {shard["file"]: shard["images_sha256"] for shard in stored["shards"]}
            except (ValueError, KeyError, TypeError) as error:
                raise CacheError(
                    f"{path} cannot be read ({error!r}): remove {path.parent} and make it again"
                ) from None
            if of == {shard["file"]: shard["sha256"].get("images") for shard in manifest.shards}:
                here[path.parent.name] = kind
        found = (
            here
            if i == 0
            else {slug: kind for slug, kind in found.items() if here.get(slug) == kind}
        )
    return found
