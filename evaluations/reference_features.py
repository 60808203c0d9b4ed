"""Compute, read and cache features and statistics of references.

Shapes: n images of the reference, F features per image.
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
from evaluations.metrics import Device, Statistics, compute_statistics

# sha256 of the file of a well-known reference -> its name in metrics.json. The first three hashes
# are from third-party records (Git LFS pointers, download checksums) and have not been verified.
WELL_KNOWN_REFERENCES = {
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
POOL_SIZE = 2048  # number of Inception features for the FID
SPATIAL_SIZE = 2023  # number of Inception features for sFID


class ReferenceFile(NamedTuple):
    """A reference that samples are compared with.

    Attributes:
        path: An .npz of images, statistics or both, or any other source of images.
        sha256: Hash of the content.
        resolution: Width of the samples. Images that are not in an .npz are cropped to this size.
        flag: Flag that selected the reference, for error messages.
    """

    path: Path
    sha256: str
    resolution: int
    flag: str = "--reference"


class ReferenceFeatures(NamedTuple):
    """Features of a reference, computed by one network.

    An .npz in ADM's format may contain statistics, images or both. As in ADM, stored statistics
    take precedence over statistics that are computed from the images.

    Attributes:
        pool: Statistics of the features.
        spatial: Statistics of Inception's spatial features. None for other networks, or if the
            reference contains neither images nor these statistics.
        features: The features, (n, F), for precision and recall. None if the reference contains no
            images.
    """

    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None


def get_default_cache_dir() -> Path:
    """Return the default folder for cached features of references."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(user_cache) / "sra2" / "references"


def load_reference_features(
    reference: ReferenceFile,
    networks: Mapping[str, FeatureNetwork],
    batch_size: int,
    device: Device,
    cache_dir: Path | None = None,
    world: World | None = None,
) -> dict[str, ReferenceFeatures]:
    """Load the features of a reference from the cache, or compute and cache them.

    Args:
        reference: The reference.
        networks: Feature networks by name.
        batch_size: Images per forward pass.
        device: Device of the networks.
        cache_dir: Folder of cached features. By default, `get_default_cache_dir()`.
        world: Processes that share the work. By default, this process does all of it.

    Returns:
        On the first process, the features by the name of the network; on the others, {}.

    Raises:
        UserError: If the reference cannot be used with these networks.
    """
    is_npz = reference.path.suffix == ".npz"
    npz = NpzFile(reference.path, reference.flag) if is_npz else None
    pool = spatial = None
    if npz is not None and "inception" in networks:
        pool = read_statistics(npz, "", POOL_SIZE)
        spatial = read_statistics(npz, "_s", SPATIAL_SIZE)
    if npz is not None and "arr_0" not in npz:
        _check_statistics_suffice(npz, networks)
        assert pool is not None
        return {"inception": ReferenceFeatures(pool, spatial, None)}

    # Read the cache on the first process, and broadcast the names of the missing networks.
    is_first_process = world is None or world.rank == 0
    directory = cache_dir or get_default_cache_dir()
    cache_paths = {
        name: _make_cache_path(directory, reference, network) for name, network in networks.items()
    }
    features: dict[str, ReferenceFeatures] = {}
    if is_first_process:
        cached = {name: _read_cache(path) for name, path in cache_paths.items()}
        features = {name: entry for name, entry in cached.items() if entry}
    missing = {name: network for name, network in networks.items() if name not in features}
    if world:
        names = world.broadcast(list(missing))
        missing = {name: networks[name] for name in names}

    # Compute the missing features on all processes.
    if missing:
        images = open_images(reference.path, reference.resolution, reference.flag)
        extracted = extract_features(missing, images, batch_size, "reference", device, world)
        for name, outputs in extracted.items():
            statistics = Features(outputs.pool, outputs.spatial).map(
                lambda output: compute_statistics(output, device)
            )
            entry = ReferenceFeatures(statistics.pool, statistics.spatial, outputs.pool)
            features[name] = entry
            _write_cache(cache_paths[name], entry)

    if "inception" in features:
        computed = features["inception"]
        features["inception"] = computed._replace(
            pool=pool or computed.pool, spatial=spatial or computed.spatial
        )
    return features


def read_statistics(npz: NpzFile, suffix: str, size: int) -> Statistics | None:
    """Read mu and sigma from an .npz.

    Args:
        npz: The file.
        suffix: Suffix of the names of the two arrays.
        size: Expected number of features.

    Returns:
        The statistics, or None if the file contains neither of the two arrays.

    Raises:
        UserError: If one of the arrays is missing, or if they are not a mean and a covariance.
    """
    mu = npz.read_array(f"mu{suffix}")
    sigma = npz.read_array(f"sigma{suffix}")
    if mu is None and sigma is None:
        return None
    if mu is None or sigma is None:
        raise UserError(
            f"{npz.flag} {npz.path} contains only one of mu{suffix} and sigma{suffix}: use a file "
            "with both or with neither"
        )
    requirement = (
        f"{npz.flag} {npz.path}: mu{suffix} and sigma{suffix} must be finite statistics "
        f"of {size} features"
    )
    if (mu.shape, sigma.shape) != ((size,), (size, size)):
        raise UserError(f"{requirement}; their shapes are {mu.shape} and {sigma.shape}")
    if not {mu.dtype.kind, sigma.dtype.kind} <= set("fiu"):
        raise UserError(f"{requirement}; their data types are {mu.dtype} and {sigma.dtype}")
    statistics = Statistics(mu.astype(np.float64), sigma.astype(np.float64))
    if not np.isfinite(statistics.mu.sum() + statistics.sigma.sum()):
        raise UserError(f"{requirement}; some values are not finite")
    problem = _find_covariance_problem(statistics.sigma)
    if problem:
        raise UserError(f"{requirement}; sigma{suffix} {problem}, so it is not a covariance")
    return statistics


def _find_covariance_problem(sigma: np.ndarray) -> str | None:
    """Return why a matrix (F, F) is not a covariance, or None if it is one.

    Rounding errors of statistics that were computed in float32 are tolerated.
    """
    tolerance = len(sigma) * np.finfo(np.float32).eps * np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > tolerance:
        return "is not symmetric"
    # The Cholesky decomposition exists if no eigenvalue is below -tolerance. The smallest positive
    # number makes it exist for a matrix of zeros, too.
    shift = tolerance + np.finfo(np.float64).tiny
    shifted = torch.from_numpy(sigma + shift * np.eye(len(sigma)))
    if torch.linalg.cholesky_ex(shifted).info:
        return "is not positive semi-definite"
    return None


def _check_statistics_suffice(npz: NpzFile, networks: Mapping[str, FeatureNetwork]) -> None:
    """Raise UserError unless a file without images contains statistics for all networks."""
    if not ("mu" in npz and "sigma" in npz):
        raise UserError(
            f"{npz.flag} {npz.path} contains neither images (arr_0) nor statistics (mu, sigma)"
        )
    others = [name for name in networks if name != "inception"]
    if others:
        raise UserError(
            f"{npz.flag} {npz.path} contains Inception statistics, but the {others[0]} features "
            "need a reference with images"
        )


def _make_cache_path(directory: Path, reference: ReferenceFile, network: FeatureNetwork) -> Path:
    """Return the path of the cache file for a network's features of a reference."""
    network_identity = [type(network).__name__, network.weights_sha256]
    key = [CACHE_FORMAT, reference.sha256, *network_identity, reference.resolution]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return directory / f"{digest}.npz"


def _read_cache(path: Path) -> ReferenceFeatures | None:
    """Return the features in a cache file, or None if the file cannot be used."""
    try:
        with np.load(path) as content:
            statistics = {
                suffix: Statistics(content[f"mu{suffix}"], content[f"sigma{suffix}"])
                for suffix in ("", "_s")
                if f"mu{suffix}" in content
            }
            return ReferenceFeatures(statistics[""], statistics.get("_s"), content["features"])
    except Exception:  # the file is missing, is truncated or has another format
        return None


def _write_cache(path: Path, reference: ReferenceFeatures) -> None:
    arrays: dict[str, Any] = {**reference.pool._asdict(), "features": reference.features}
    if reference.spatial is not None:
        arrays["mu_s"] = reference.spatial.mu
        arrays["sigma_s"] = reference.spatial.sigma
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    # If the cache cannot be written, the next evaluation computes the features again.
    with suppress(OSError):
        write_file(path, buffer.getbuffer())
