"""Features and statistics of references, and the cache that they are stored in.

F features per image, n images of the reference.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.cli import UserError
from common.files import write_file
from common.processes import World
from evaluations.extractors import extract_features
from evaluations.features import FeatureNetwork, Features
from evaluations.image_batches import NpzFile, open_images
from evaluations.metrics import MANIFOLD_NEIGHBOURS, Statistics, compute_statistics

# Well-known references by the sha256 of their file. The first three hashes are taken from other
# people's records (Git LFS pointers, download checksums); they have not been verified here.
# The names are part of metrics.json.
WELL_KNOWN = {
    "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758": (
        "ADM's ImageNet 256 (VIRTUAL_imagenet256_labeled.npz)"
    ),
    "412046720c0d496dc6d72a30eac3e22b9ef6ddac3501cce7f996674ad227ba4c": (
        "JiT's ImageNet 256 (jit_in256_stats.npz)"
    ),
    "cdd15b54f9d1f26a881fcdc920a3410fa7a934047d6c4f5b8395b87182a9ab42": (
        "JiT's ImageNet 512 (jit_in512_stats.npz)"
    ),
    "5ea05ef219f980dde46cc09b6caa153c4296ec9046d93727fed87510d1dc0574": (
        "Fashion-MNIST's 10,000 test images, as shipped"
    ),
}
CACHE_FORMAT = 1
POOL_SIZE = 2048
SPATIAL_SIZE = 2023


class ReferenceFile(NamedTuple):
    """A reference that samples are compared with.

    Attributes:
        path: An .npz of images, statistics or both, or any other source of images.
        sha256: Hash of its content.
        resolution: Width of the samples, to which images that are not in an .npz are cropped.
        flag: Flag that selected it, for error messages.
    """

    path: Path
    sha256: str
    resolution: int
    flag: str = "--reference"


class ReferenceFeatures(NamedTuple):
    """Features of a reference by one network.

    An ADM .npz may contain statistics, images or both. Its statistics take precedence over those
    computed from its images, as in ADM.

    Attributes:
        pool: Statistics of the features.
        spatial: Statistics of Inception's spatial features. None for other networks, or if the
            reference consists of statistics without them.
        features: The features, (n, F), for precision and recall. None if the reference consists of
            statistics.
    """

    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None


def default_cache_dir() -> Path:
    """Return the folder in which features of references are cached by default."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(user_cache) / "sra2" / "references"


def well_known_name(sha256: str) -> str | None:
    """Return the name of a well-known reference file, or None for any other file."""
    return WELL_KNOWN.get(sha256)


def load_reference_features(
    reference: ReferenceFile,
    networks: Mapping[str, FeatureNetwork],
    batch_size: int,
    device: torch.device | str,
    cache_dir: Path | None = None,
    world: World | None = None,
) -> dict[str, ReferenceFeatures] | None:
    """Load the features of a reference from the cache, or compute and cache them.

    Args:
        reference: The reference.
        networks: Feature networks by name.
        batch_size: Images per forward pass.
        device: Device of the networks.
        cache_dir: Folder of cached features. By default `default_cache_dir()`.
        world: Processes that share the work. By default this one does all of it.

    Returns:
        Features by name of the network on the first process, None on the others.

    Raises:
        UserError: If the reference cannot be used with these networks.
    """
    npz = NpzFile(reference.path, reference.flag) if reference.path.suffix == ".npz" else None
    has_images = npz is None or "arr_0" in npz
    if npz is not None and not has_images:
        _check_statistics_suffice(npz, networks)
    pool = spatial = None
    if npz is not None and "inception" in networks:
        pool, spatial = read_inception_statistics(npz)

    # Read the cache on the first process, and tell the others which networks have to run.
    is_first_process = world is None or world.rank == 0
    directory = cache_dir or default_cache_dir()
    cache_paths = {
        name: _cache_path(directory, reference, network) for name, network in networks.items()
    }
    features: dict[str, ReferenceFeatures] = {}
    if is_first_process:
        cached = {name: _read_cache(path) for name, path in cache_paths.items()}
        features = {name: entry for name, entry in cached.items() if entry is not None}
    missing = [name for name in networks if name not in features]
    if world:
        missing = world.broadcast(missing)

    # Compute what is missing, on all processes.
    if missing and has_images:
        computed = _compute_features(
            reference, {name: networks[name] for name in missing}, batch_size, device, world
        )
        for name, entry in computed.items():
            features[name] = entry
            _write_cache(cache_paths[name], entry)
    if not is_first_process:
        return None

    if pool is not None or spatial is not None:
        features["inception"] = _prefer_statistics(pool, spatial, features.get("inception"))
    return {name: features[name] for name in networks}


def read_inception_statistics(npz: NpzFile) -> tuple[Statistics | None, Statistics | None]:
    """Read the statistics of pool and spatial features of an .npz, None for those it lacks.

    Raises:
        UserError: If they cannot be statistics of Inception features.
    """
    return _read_statistics(npz, "", POOL_SIZE), _read_statistics(npz, "_s", SPATIAL_SIZE)


def _read_statistics(npz: NpzFile, suffix: str, size: int) -> Statistics | None:
    mu = npz.read_array(f"mu{suffix}")
    sigma = npz.read_array(f"sigma{suffix}")
    if mu is None or sigma is None:
        return None
    mu = np.asarray(mu, np.float64)
    sigma = np.asarray(sigma, np.float64)
    expected = (
        f"{npz.flag} {npz.path}: mu{suffix} and sigma{suffix} must be finite numbers of "
        f"{size} features"
    )
    if (mu.shape, sigma.shape) != ((size,), (size, size)):
        raise UserError(f"{expected}; their shapes are {mu.shape} and {sigma.shape}")
    if not np.isfinite(mu.sum() + sigma.sum()):
        raise UserError(f"{expected}; some are not finite")
    return Statistics(mu, sigma)


def _check_statistics_suffice(npz: NpzFile, networks: Mapping[str, FeatureNetwork]) -> None:
    """Raise UserError unless a file without images holds statistics for all networks."""
    if not ("mu" in npz and "sigma" in npz):
        raise UserError(
            f"{npz.flag} {npz.path} holds neither images (arr_0) nor statistics (mu, sigma)"
        )
    others = [name for name in networks if name != "inception"]
    if others:
        raise UserError(
            f"{npz.flag} {npz.path} holds Inception statistics, but the {others[0]} features need "
            "a reference with images"
        )


def _compute_features(
    reference: ReferenceFile,
    networks: Mapping[str, FeatureNetwork],
    batch_size: int,
    device: torch.device | str,
    world: World | None,
) -> dict[str, ReferenceFeatures]:
    """Compute features of the images of a reference.

    Returns:
        Features by name of the network on the first process, {} on the others.
    """
    path, side = reference.path, reference.resolution
    images = open_images(path, side, reference.flag)
    if images.size != (side, side):
        raise UserError(
            f"{reference.flag} {path} holds images of {images.size[0]}x{images.size[1]}, "
            f"the samples are {side}x{side}"
        )
    if images.count <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"{reference.flag} {path} holds {images.count} images: "
            f"use a reference of more than {MANIFOLD_NEIGHBOURS}"
        )
    extracted = extract_features(networks, images, batch_size, "reference", device, world)
    if extracted is None:
        return {}
    return {name: _summarise(features, device) for name, features in extracted.items()}


def _summarise(features: Features[np.ndarray], device: torch.device | str) -> ReferenceFeatures:
    spatial = None
    if features.spatial is not None:
        spatial = compute_statistics(features.spatial, device)
    return ReferenceFeatures(compute_statistics(features.pool, device), spatial, features.pool)


def _prefer_statistics(
    pool: Statistics | None, spatial: Statistics | None, computed: ReferenceFeatures | None
) -> ReferenceFeatures:
    """Combine the statistics of an .npz with the features of its images, if there are any."""
    if computed is not None:
        pool = pool or computed.pool
        spatial = spatial or computed.spatial
    assert pool is not None  # a file without images contains mu and sigma
    return ReferenceFeatures(pool, spatial, computed.features if computed else None)


def _cache_path(directory: Path, reference: ReferenceFile, network: FeatureNetwork) -> Path:
    """Return the cache file for this network's features of this reference."""
    network_class = type(network).__name__
    key = json.dumps(
        [
            CACHE_FORMAT,
            reference.sha256,
            network_class,
            network.weights_sha256,
            reference.resolution,
        ]
    )
    return directory / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def _read_cache(path: Path) -> ReferenceFeatures | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as content:
            pool = Statistics(content["mu"], content["sigma"])
            spatial = None
            if "mu_s" in content:
                spatial = Statistics(content["mu_s"], content["sigma_s"])
            return ReferenceFeatures(pool, spatial, content["features"])
    except Exception:  # truncated, or written by another program: the features are computed again
        return None


def _write_cache(path: Path, reference: ReferenceFeatures) -> None:
    arrays: dict[str, Any] = {"mu": reference.pool.mu, "sigma": reference.pool.sigma}
    if reference.features is not None:
        arrays["features"] = reference.features
    if reference.spatial is not None:
        arrays["mu_s"] = reference.spatial.mu
        arrays["sigma_s"] = reference.spatial.sigma
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with suppress(OSError):  # without space for a cache, the features are computed again next time
        write_file(path, buffer.getbuffer())
