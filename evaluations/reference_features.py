"""What samples are compared with: statistics or images, whatever they come as, and a cache of what was made of them.

F features an image; n images of the reference.
"""

import hashlib
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.cli import UserError
from common.files import write_file
from common.processes import World
from evaluations.extractors import Features, extract_all
from evaluations.image_batches import NpzFile, open_images
from evaluations.metrics import MANIFOLD_NEIGHBOURS, Statistics, compute_statistics

KNOWN = {  # sha256 -> name; the first three as others recorded them (Git LFS pointers, checks of downloads), not hashed here
    "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758": "ADM's ImageNet 256 (VIRTUAL_imagenet256_labeled.npz)",
    "412046720c0d496dc6d72a30eac3e22b9ef6ddac3501cce7f996674ad227ba4c": "JiT's ImageNet 256 (jit_in256_stats.npz)",
    "cdd15b54f9d1f26a881fcdc920a3410fa7a934047d6c4f5b8395b87182a9ab42": "JiT's ImageNet 512 (jit_in512_stats.npz)",
    "5ea05ef219f980dde46cc09b6caa153c4296ec9046d93727fed87510d1dc0574": "Fashion-MNIST's 10,000 test images, as shipped",
}
CACHE_FORMAT = 1


class ReferenceFeatures(NamedTuple):
    """What one network says of a reference. An ADM .npz may hold statistics, images or both; statistics win, as in ADM."""

    pool: Statistics
    spatial: Statistics | None
    features: (
        np.ndarray | None
    )  # (n, F) for precision and recall; None where only statistics are known


def default_cache_dir() -> Path:
    """Where features of references are kept, unless a flag says otherwise."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        / "sra2"
        / "references"
    )


def load_reference_features(
    path: Path,
    digest: str,
    networks: dict[str, nn.Module],
    side: int,
    batch_size: int,
    device: torch.device | str,
    flag: str = "--reference",
    cache: Path | None = None,
    world: World | None = None,
) -> dict[str, ReferenceFeatures] | None:
    """A reference by each network's eyes, for samples of `side` pixels; on the first process of `world`, None on the others.

    digest: sha256 of `path`. cache: a folder where features are kept for the next time. Raises UserError naming `flag`.
    """
    npz = NpzFile(path, flag) if path.suffix == ".npz" else None
    if npz and "arr_0" not in npz:
        if not ("mu" in npz and "sigma" in npz):
            raise UserError(
                f"{flag} {path} holds neither images (arr_0) nor statistics (mu, sigma)"
            )
        if others := [name for name in networks if name != "inception"]:
            raise UserError(
                f"{flag} {path} holds Inception statistics; the {others[0]} features need images"
            )
    adms = _adms(npz) if npz and "inception" in networks else (None, None)
    first = world is None or world.rank == 0
    places = {name: _place(cache, digest, network, side) for name, network in networks.items()}
    own = {name: _read(place) for name, place in places.items()} if first else {}
    missing = [name for name in networks if own.get(name) is None]
    if world:
        missing = world.broadcast(missing)
    if missing and (npz is None or "arr_0" in npz):
        images = open_images(path, side, flag)
        if images.size != (side, side):
            raise UserError(
                f"{flag} {path} holds images of {images.size[0]}x{images.size[1]}, the samples are {side}x{side}"
            )
        if images.count <= MANIFOLD_NEIGHBOURS:
            raise UserError(
                f"{flag} {path} holds {images.count} images: there is nothing to compare with"
            )
        chosen = {name: networks[name] for name in missing}
        made = extract_all(chosen, images, batch_size, "reference", device, world)
        for name, features in (made or {}).items():
            own[name] = _reference(features, device)
            _write(places[name], own[name])
    if not first:
        return None
    if "inception" in networks:  # statistics before those of the images
        images = own.get("inception") or ReferenceFeatures(None, None, None)
        own["inception"] = ReferenceFeatures(
            adms[0] or images.pool, adms[1] or images.spatial, images.features
        )
    return {name: own[name] for name in networks}


def _reference(features: Features, device: torch.device | str) -> ReferenceFeatures:
    spatial = None if features.spatial is None else compute_statistics(features.spatial, device)
    return ReferenceFeatures(compute_statistics(features.pool, device), spatial, features.pool)


def _adms(npz: NpzFile) -> tuple[Statistics | None, Statistics | None]:
    """The statistics of pool and spatial features that an .npz holds. Raises UserError for what cannot be Inception's."""

    def of(key: str, size: int) -> Statistics | None:
        if f"mu{key}" not in npz or f"sigma{key}" not in npz:
            return None
        mu, sigma = (
            np.asarray(npz.read_array(f"{name}{key}"), np.float64) for name in ("mu", "sigma")
        )
        if (mu.shape, sigma.shape) != ((size,), (size, size)) or not np.isfinite(
            mu.sum() + sigma.sum()
        ):
            found = (
                f"they are {mu.shape} and {sigma.shape}" if mu.shape != (size,) else "some are not"
            )
            raise UserError(
                f"{npz.flag} {npz.path}: mu{key} and sigma{key} must be finite numbers of {size} features; {found}"
            )
        return Statistics(mu, sigma)

    return of("", 2048), of("_s", 2023)


def _place(cache: Path | None, digest: str, network: nn.Module, side: int) -> Path | None:
    """The file for what this network says of this reference."""
    if cache is None:
        return None
    key = json.dumps([CACHE_FORMAT, digest, type(network).__name__, network.weights_sha256, side])
    return cache / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def _read(place: Path | None) -> ReferenceFeatures | None:
    if place is None or not place.exists():
        return None
    try:
        with np.load(place) as content:
            spatial = Statistics(content["mu_s"], content["sigma_s"]) if "mu_s" in content else None
            return ReferenceFeatures(
                Statistics(content["mu"], content["sigma"]), spatial, content["features"]
            )
    except Exception:  # half a file, or another program's: it is only a cache
        return None


def _write(place: Path | None, reference: ReferenceFeatures) -> None:
    if place is None:
        return
    arrays = {
        "mu": reference.pool.mu,
        "sigma": reference.pool.sigma,
        "features": reference.features,
    }
    if reference.spatial:
        arrays |= {"mu_s": reference.spatial.mu, "sigma_s": reference.spatial.sigma}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with suppress(OSError):  # no place to keep it: it is made again next time
        write_file(place, buffer.getbuffer())


def known_name(digest: str) -> str | None:
    """What a reference is, if its bytes are a well-known one's."""
    return KNOWN.get(digest)
