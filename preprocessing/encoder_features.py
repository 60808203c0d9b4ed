"""Kept images -> an image encoder's features, computed once: shards beside the cache's own, each whole or not at all.

    CACHE/features/SLUG/00000.npy       (n, N, D) float16, of images/00000.npy
    CACHE/features/SLUG/features.json   which encoder, and the list of shards; written last
    CACHE/features/SLUG/partial/        only while they are made

n images of a shard, B of a batch, N tokens, D width, R resolution.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import UserError
from common.files import NpyWriter, discard_on_error, write_file
from common.processes import World
from latents.manifest import Manifest
from preprocessing.build import (
    check_or_record_plan,
    describe_differences,
    lock_destination,
    remove_partial_records,
)
from preprocessing.encoding import map_in_order

FEATURES_DTYPE = np.dtype(np.float16)


def features_slug(name: str, side: int, tokens_side: int) -> str:
    """The folder of the features of an encoder that sees `side` pixels."""
    return (
        f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-')}-{side}-{tokens_side}x{tokens_side}"
    )


def features_nbytes(manifest: Manifest, tokens_side: int, width: int) -> int:
    """Bytes that the features of a cache take."""
    return manifest.count * tokens_side**2 * width * FEATURES_DTYPE.itemsize


def finished(dest: Path, plan: dict, shards: list[dict]) -> bool:
    """Whether DEST holds the features of these shards already. Raises UserError if it holds others."""
    path = dest / "features.json"
    if not path.exists():
        return False
    try:
        then = json.loads(path.read_text())
        of = {shard["file"]: shard["images_sha256"] for shard in then["shards"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: remove {dest} and make it again") from None
    changed = describe_differences(then, plan)
    if changed:
        raise UserError(
            f"{dest} holds features made otherwise ({changed}): remove it to make them again"
        )
    if of != {entry["file"]: entry["sha256"]["images"] for entry in shards}:
        raise UserError(
            f"{dest} holds features of images that have changed since: remove it to make them again"
        )
    return all((dest / file).exists() for file in of)


def build_features(
    root: Path,
    manifest: Manifest,
    dest: Path,
    plan: dict,
    encode: Callable[[Tensor], Tensor],
    size: int,
    world: World,
) -> bool:
    """Makes what is missing of CACHE's features, on all processes of `world`; whether anything was. plan: what features.json
    says of the encoder. encode: images (B, 3, R, R) uint8 in host memory -> tokens (B, N, D). size: images a forward pass.
    Raises UserError.
    """
    if world.run_on_first_rank(lambda: finished(dest, plan, manifest.shards)):
        return False
    records = [dest / "partial" / f"{entry['file']}.json" for entry in manifest.shards]

    def done(entry: dict, record: Path) -> bool:
        """Of the images that are there now."""
        if not (record.exists() and (dest / entry["file"]).exists()):
            return False
        return json.loads(record.read_text())["images_sha256"] == entry["sha256"]["images"]

    def begin() -> list[int]:
        check_or_record_plan(dest, plan)
        return [
            k
            for k, (entry, record) in enumerate(zip(manifest.shards, records))
            if not done(entry, record)
        ]

    made: dict[int, dict] = {}
    with ExitStack() as held:
        todo = lock_destination(world, held, dest, begin)
        mine = todo[world.rank :: world.num_processes]
        left = sum(manifest.shards[k]["count"] for k in mine) * world.num_processes
        with tqdm(
            total=left, unit="img", desc=f"{dest.name}", disable=world.rank > 0, smoothing=0.05
        ) as bar:
            for k in mine:
                entry = manifest.shards[k]
                progress = lambda images: bar.update(images * world.num_processes)  # noqa: E731
                digest = shard(
                    root / "images" / entry["file"],
                    dest / entry["file"],
                    plan,
                    encode,
                    size,
                    progress,
                )
                made[k] = {"file": entry["file"], "count": entry["count"], "sha256": digest}
                made[k]["images_sha256"] = entry["sha256"]["images"]
                write_file(records[k], json.dumps(made[k]).encode())
        made = {k: record for part in world.all_gather(made) for k, record in part.items()}
        if world.rank == 0:
            shards = [
                made.get(k) or json.loads(record.read_text()) for k, record in enumerate(records)
            ]
            write_file(
                dest / "features.json",
                (json.dumps(plan | {"shards": shards}, indent=2) + "\n").encode(),
            )
            remove_partial_records(dest)
        world.barrier()
    return True


def shard(
    images: Path,
    path: Path,
    plan: dict,
    encode: Callable[[Tensor], Tensor],
    size: int,
    progress: Callable[[int], None],
) -> str:
    """The features of one file of images, written a batch at a time; their sha256. While one batch is copied off a GPU and
    written, the next is computed. Raises UserError.
    """
    try:
        stored = np.load(images, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{images} cannot be read ({error}): python -m preprocessing.verify --repair makes it again"
        ) from None

    def compute(start: int) -> np.ndarray:
        with torch.no_grad():
            tokens = encode(torch.from_numpy(stored[start : start + size].copy()))
        return tokens.half().cpu().numpy()

    out = NpyWriter(path, FEATURES_DTYPE, (plan["tokens_side"] ** 2, plan["width"]))
    with discard_on_error(out), ThreadPoolExecutor(2 if torch.cuda.is_available() else 1) as pool:
        for tokens in map_in_order(pool, compute, range(0, len(stored), size), 2):
            if not np.isfinite(tokens).all():
                raise UserError(
                    f"{plan['encoder']} makes values of {images} that float16 cannot hold"
                )
            out.append(tokens)
            progress(len(tokens))
        return out.finish()
