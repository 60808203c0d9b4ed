"""Read, write and join the manifests of latent caches (docs/data.md).

    manifest.json       settings of the cache and the list of its shards; written last
    moments/00000.npy   (n, 2C, h, w) posterior mean and standard deviation, unscaled
    mirrored/00000.npy  moments of the horizontally flipped images; only with --flip
    labels/00000.npy    (n,) int64
    images/00000.npy    (n, 3, R, R) uint8, the encoded images; only with --keep-images
    features/SLUG/      features of an image encoder (preprocessing.encode_features):
                        00000.npy (n, N, D) float16 and features.json

n images per shard, C latent channels, h x w latent size, R resolution, N tokens, D feature
dimension.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError, describe_read_error
from common.files import write_file
from common.lfs import describe_lfs_pointer

FORMAT_VERSION = 1

# Fields that must be equal in caches that are joined.
SHARED_FIELDS = (
    "class_names",
    "resolution",
    "vae_fingerprint",
    "scale",
    "shift",
    "latent_shape",
    "dtype",
    "flips",
)

# Entries of features.json that identify the encoder and the shape of its features.
FEATURE_FIELDS = ("encoder", "fingerprint", "side", "tokens_side", "width", "dtype")


def list_moment_folders(flips: bool) -> list[str]:
    """Return the folders of the moments of the images and, with flips, of the flipped images."""
    return ["moments", "mirrored"] if flips else ["moments"]


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    source: str
    count: int  # number of images
    num_classes: int
    class_names: list[str]
    resolution: int
    crop: str
    vae: str  # hub id or absolute path of a folder
    vae_fingerprint: str  # hash from Autoencoder.fingerprint
    scale: float | list[float]  # one value, or one value per channel
    shift: float | list[float]
    latent_shape: list[int]  # (C, h, w)
    dtype: str
    mean: list[float]  # mean of the unscaled latents in the cache, per channel
    std: list[float]  # standard deviation of the same latents, per channel
    # One entry per shard: file, count, sha256 by folder, sum, sum_of_squares, ...
    shards: list[dict] = field(default_factory=list)
    skipped: int = 0  # number of source images that could not be used
    flips: bool = False  # whether moments of the flipped images are stored
    images: bool = False  # whether the images are stored
    kinds: dict[str, int] = field(default_factory=dict)  # number of source images per kind
    encoding: dict = field(default_factory=dict)  # settings needed to encode a shard again
    format_version: int = FORMAT_VERSION

    @property
    def moment_folders(self) -> list[str]:
        """The folders of moments (see `list_moment_folders`)."""
        return list_moment_folders(self.flips)

    @property
    def moments_format(self) -> np.dtype:
        """Shape and data type of the moments of an image, as a subarray dtype."""
        channels, height, width = self.latent_shape
        return np.dtype((self.dtype, (2 * channels, height, width)))

    @property
    def required_formats(self) -> dict[str, np.dtype]:
        """Shape and data type of the rows in the folders that every cache has."""
        return {
            **dict.fromkeys(self.moment_folders, self.moments_format),
            "labels": np.dtype(np.int64),
        }

    @property
    def folders(self) -> list[str]:
        """All folders that contain one array per shard, except the folders of features."""
        folders = [*self.moment_folders, "labels"]
        if self.images:
            folders.append("images")
        return folders


class CacheError(UserError):
    """A cache is missing or incomplete, or its files do not match its manifest."""


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json. Write it last, because it makes the cache valid."""
    write_file(root / "manifest.json", (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def read_manifest(root: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        CacheError: The manifest is missing or has another format.
    """
    path = root / "manifest.json"
    if re.match(r"[a-z0-9+]+:/", str(root)) and not root.exists():
        raise CacheError(
            f"{root} looks like a URL, which only --data-dir and --eval-latents of train.py "
            "accept; copy the cache to a local folder"
        )
    if not root.exists():
        raise CacheError(f"{root} does not exist (current folder: {Path.cwd()})")
    if not path.exists():
        raise CacheError(_explain_missing_manifest(root))
    if problem := describe_lfs_pointer(path):
        raise CacheError(problem)
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, location: str) -> Manifest:
    """Parse the contents of manifest.json.

    Args:
        text: The contents.
        location: Path or URL of the file, for error messages.

    Raises:
        CacheError: The manifest is damaged or has another format.
    """
    try:
        content = json.loads(text)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            for shard in content["shards"]:
                if not isinstance(shard["file"], str) or not isinstance(shard["count"], int):
                    raise ValueError("a shard has no file or no count")
                if Path(shard["file"]).name != shard["file"]:
                    raise ValueError("the file of a shard is not a file name")
                if not isinstance(shard.get("sha256", {}), dict):
                    raise ValueError("sha256 of a shard is not an object")
            manifest = Manifest(**content)
            if not isinstance(manifest.flips, bool):
                raise ValueError("flips is neither true nor false")
            if len(manifest.class_names) != manifest.num_classes:
                raise ValueError("class_names does not contain num_classes names")
            _ = manifest.moments_format  # raises an exception if latent_shape or dtype is invalid
            return _resolve_vae(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = describe_read_error(error)
        raise CacheError(
            f"{location} is not a valid manifest ({reason}); encode the images again"
        ) from None
    raise CacheError(
        f"{location} has format version {version}, but this code reads version {FORMAT_VERSION}; "
        "encode the images again"
    )


def _resolve_vae(manifest: Manifest) -> Manifest:
    """Replace a relative path of the VAE, which older caches contain, by the absolute path."""
    path = Path(manifest.vae)
    absolute_path = Path(manifest.encoding.get("vae") or "")
    if absolute_path.is_absolute() and absolute_path.name == path.name and not path.exists():
        return replace(manifest, vae=str(absolute_path))
    return manifest


def _explain_missing_manifest(root: Path) -> str:
    if (root / "partial").exists():
        return f"{root} is incomplete; rerun the command that created it"
    if (root / "vae-sd").exists():
        return (
            f"{root} is in REPA's format; convert it with "
            f"python -m preprocessing.import_repa {root} FOLDER (for --align repa, add "
            "--keep-images)"
        )
    return (
        f"{root} is not a latent cache (no manifest.json); create one from images with "
        "python -m preprocessing.encode_latents --source IMAGES --dest FOLDER --resolution N, "
        "or from the bundled images with make demo"
    )


def join_manifests(roots: Sequence[Path | str], manifests: list[Manifest]) -> Manifest:
    """Return the manifest of several caches that are read as one cache, in the given order.

    Args:
        roots: Folders or URLs of the caches, for error messages.
        manifests: Manifests of the caches.

    Raises:
        CacheError: The caches differ in one of SHARED_FIELDS.
    """
    first = manifests[0]
    if len(manifests) == 1:
        return first
    for root, manifest in zip(roots, manifests):
        for name in SHARED_FIELDS:
            if getattr(manifest, name) != getattr(first, name):
                first_value, second_value = _describe_difference(
                    name, getattr(first, name), getattr(manifest, name)
                )
                raise CacheError(
                    f"{roots[0]} and {root} cannot be joined: "
                    f"{name} is {first_value} in one and {second_value} in the other"
                )
    counts = np.array([manifest.count for manifest in manifests])
    weights = counts / counts.sum()
    means = np.array([manifest.mean for manifest in manifests])
    stds = np.array([manifest.std for manifest in manifests])
    mean = weights @ means
    mean_square = weights @ (means**2 + stds**2)
    return replace(
        first,
        source=" + ".join(manifest.source for manifest in manifests),
        count=counts.sum().item(),
        mean=mean.tolist(),
        std=np.sqrt(mean_square - mean**2).tolist(),
        shards=[shard for manifest in manifests for shard in manifest.shards],
        encoding={"joined": [[manifest.count, manifest.mean] for manifest in manifests]},
        skipped=sum(manifest.skipped for manifest in manifests),
        images=all(manifest.images for manifest in manifests),
    )


def _describe_difference(name: str, first_value: Any, second_value: Any) -> tuple[str, str]:
    """Return short descriptions of two different values of a field."""
    if name != "class_names":
        return str(first_value), str(second_value)
    if len(first_value) != len(second_value):
        return f"{len(first_value)} classes", f"{len(second_value)} classes"
    is_equal = [first == second for first, second in zip(first_value, second_value)]
    k = is_equal.index(False)
    return f"{first_value[k]!r} for class {k}", f"{second_value[k]!r} for class {k}"


def format_repair_remedy(root: Path) -> str:
    """Return the remedy for a damaged shard of the cache `root`, for error messages."""
    return f"repair it with python -m preprocessing.verify --repair {root}"


def format_features_remedy(folder: Path) -> str:
    """Return the remedy for damaged features in `folder`, for error messages."""
    return f"remove {folder} and run python -m preprocessing.encode_features again"


def read_feature_metadata(root: Path, manifest: Manifest) -> dict[str, dict]:
    """Return the FEATURE_FIELDS of the features of a cache, by slug.

    Features are omitted if the images have changed since the features were computed.

    Raises:
        CacheError: A features.json cannot be read.
    """
    metadata_by_slug = {}
    for path in sorted((root / "features").glob("*/features.json")):
        remedy = format_features_remedy(path.parent)
        metadata = parse_feature_metadata(path.read_bytes(), str(path), manifest, remedy)
        if metadata is not None:
            metadata_by_slug[path.parent.name] = metadata
    return metadata_by_slug


def parse_feature_metadata(
    text: bytes, location: str, manifest: Manifest, remedy: str
) -> dict | None:
    """Return the FEATURE_FIELDS of a features.json, or None if the images have changed since.

    Args:
        text: The contents of features.json.
        location: Path or URL of the file, for error messages.
        manifest: Manifest of the cache.
        remedy: Instruction for error messages.

    Raises:
        CacheError: The contents are damaged.
    """
    try:
        content = json.loads(text)
        metadata = {name: content[name] for name in FEATURE_FIELDS}
        encoded_hashes = {shard["file"]: shard["images_sha256"] for shard in content["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        reason = describe_read_error(error)
        raise CacheError(f"{location} cannot be read ({reason}); {remedy}") from None
    image_hashes = {
        shard["file"]: shard.get("sha256", {}).get("images") for shard in manifest.shards
    }
    return metadata if encoded_hashes == image_hashes else None
