"""Compute the features of an image encoder once and store them next to the shards of a cache.

    CACHE/features/SLUG/00000.npy       (n, N, D) float16, the features of images/00000.npy
    CACHE/features/SLUG/features.json   the encoder and the list of shards; written last
    CACHE/features/SLUG/partial/        state of unfinished work (preprocessing/partial_work.py)

n images per shard, B batch size, N tokens, D width, R image resolution.
"""

import json
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError
from common.files import NpyWriter, discard_on_error, write_file
from common.ordered_map import map_in_order
from common.processes import World
from latents.manifest import Manifest, format_repair_remedy
from latents.shard_reader import ShardReader
from preprocessing.partial_work import (
    check_or_record_plan,
    describe_differences,
    lock_destination,
    read_record,
    remove_partial_folder,
    show_progress_bar,
    write_record,
)

FEATURES_DTYPE = np.dtype(np.float16)


def build_features(
    root: Path,
    manifest: Manifest,
    dest: Path,
    plan: dict,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    world: World,
) -> bool:
    """Compute the missing features of a cache, with the shards distributed over all processes.

    Args:
        root: The folder of the cache.
        manifest: The manifest of the cache.
        dest: The folder of the features.
        plan: The entries of features.json that identify the encoder.
        encode: Maps images (B, 3, R, R) uint8, in host memory, to tokens (B, N, D).
        batch_size: The number of images per forward pass.
        world: The processes of this command.

    Returns:
        True if this call has completed the features, False if they were already complete.

    Raises:
        UserError: The folder contains other features, or an image or its features are invalid.
    """
    if world.run_on_first_rank(lambda: _is_complete(dest, plan, manifest.shards)):
        return False

    def list_missing() -> list[dict]:
        check_or_record_plan(dest, plan)
        return [entry for entry in manifest.shards if not _is_encoded(dest, entry)]

    with lock_destination(dest, world, list_missing) as missing_entries:
        # Encode the shards of this process.
        local_entries = missing_entries[world.rank :: world.num_processes]
        records = {}
        row_format = np.dtype((np.uint8, (3, manifest.resolution, manifest.resolution)))
        num_local_images = sum(entry["count"] for entry in local_entries)
        with show_progress_bar(world, dest.name, num_local_images) as progress:
            for entry in local_entries:
                file = entry["file"]
                path = root / "images" / file
                remedy = format_repair_remedy(root)
                images = ShardReader(path, entry["count"], row_format, remedy)
                record = {
                    "file": file,
                    "count": entry["count"],
                    "sha256": _encode_shard(
                        images, dest / file, plan, encode, batch_size, progress
                    ),
                    "images_sha256": entry["sha256"]["images"],
                }
                write_record(dest, record)
                records[file] = record

        # Write features.json. The processes exchange their records, because a network file system
        # may not yet show files that other processes have written.
        new_records = ChainMap(*world.all_gather(records))
        if world.rank == 0:
            files = [entry["file"] for entry in manifest.shards]
            shards = [new_records.get(file) or read_record(dest, file) for file in files]
            content = json.dumps(plan | {"shards": shards}, indent=2) + "\n"
            write_file(dest / "features.json", content.encode())
            remove_partial_folder(dest)
        world.barrier()
    return True


def _is_complete(dest: Path, plan: dict, shards: list[dict]) -> bool:
    """Return whether a folder contains the features of the shards with these manifest entries.

    Raises:
        UserError: The folder contains features of another encoder or of other images.
    """
    path = dest / "features.json"
    if not path.exists():
        return False
    try:
        content = json.loads(path.read_text())
        encoded_hashes = {shard["file"]: shard["images_sha256"] for shard in content["shards"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read; remove {dest} and rerun this command") from None
    changes = describe_differences(content, plan)
    if changes:
        raise UserError(
            f"{dest} contains features with other settings ({changes}); "
            "remove it and rerun this command"
        )
    if encoded_hashes != {entry["file"]: entry["sha256"]["images"] for entry in shards}:
        raise UserError(
            f"{dest} contains features of images that have changed; "
            "remove it and rerun this command"
        )
    return all((dest / file).exists() for file in encoded_hashes)


def _is_encoded(dest: Path, entry: dict) -> bool:
    """Return whether the features of the current images of a shard are stored."""
    record = read_record(dest, entry["file"])
    is_current = record.get("images_sha256") == entry["sha256"]["images"]
    return is_current and (dest / entry["file"]).exists()


def _encode_shard(
    images: ShardReader,
    dest_path: Path,
    plan: dict,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: Callable[[int], None],
) -> str:
    """Store the features of one file of images.

    On a GPU, the next batch is computed while the current one is copied and written.

    Returns:
        The sha256 of the features.

    Raises:
        UserError: The images cannot be read, or the features exceed the range of float16.
    """

    def compute(start: int) -> np.ndarray:
        batch = torch.from_numpy(images.read(start, start + batch_size))
        with torch.no_grad():
            return encode(batch).half().cpu().numpy()

    writer = NpyWriter(dest_path, FEATURES_DTYPE, (plan["tokens_side"] ** 2, plan["width"]))
    num_threads = 2 if torch.cuda.is_available() else 1
    with discard_on_error(writer), ThreadPoolExecutor(num_threads) as pool:
        for tokens in map_in_order(pool, compute, range(0, len(images.file), batch_size), 2):
            if not np.isfinite(tokens).all():
                raise UserError(
                    f"{plan['encoder']} produces features of {images.path} that float16 cannot "
                    "represent; choose another encoder"
                )
            writer.append(tokens)
            progress(len(tokens))
        return writer.finish()
