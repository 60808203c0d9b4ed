"""Check that a latent cache matches its manifest, and repair damaged shards.

    python -m preprocessing.verify data/imagenet256
    python -m preprocessing.verify data/imagenet256 --repair

The command checks the sha256 and the shape of each file, the range of the labels, and the
statistics per channel. It also checks that moments are finite and that standard deviations are not
negative. It lists the damaged shards. With --repair, it rebuilds them from the images (or from the
imported folder) with the settings in the manifest. The exit code is 2 if a fault remains.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import cli
from common.cli import UserError, describe_read_error
from common.files import sha256
from common.lfs import describe_lfs_pointer
from common.npy_file import NpyFile
from common.processes import World
from common.progress import ProgressBar
from latents.manifest import Manifest, read_manifest
from preprocessing.build import rebuild_shards
from preprocessing.cache_job import CacheJob
from preprocessing.encoding import EncodingJob, EncodingSettings
from preprocessing.repa_files import ImportJob, ImportSettings
from preprocessing.shards import compute_channel_statistics, compute_channel_sums, iter_chunks


class Fault(NamedTuple):
    """A fault of a shard.

    Attributes:
        part: The folder of the damaged file, or "statistics".
        description: What is wrong with the file.
    """

    part: str
    description: str


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__, "python -m preprocessing.verify", "DATA")

    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="folder of a latent cache")
    add("--repair", action="store_true", help="rebuild damaged shards")
    add(
        "--source",
        type=Path,
        help="for --repair: current location of the images (default: the recorded one)",
    )
    add(
        "--labels",
        type=Path,
        help="for --repair: current location of the label file (default: the recorded one)",
    )
    add("--vae", help="for --repair: current location of the VAE (default: the recorded one)")
    cli.add_device_flag(add, "for --repair: device that encodes images")
    add(
        "--num-workers",
        type=int,
        default=-1,
        help="for --repair: number of decoding workers; -1: one per core",
    )

    return parser.parse_args()


def find_all_faults(root: Path, manifest: Manifest) -> dict[str, list[Fault]]:
    """Return the faults of each damaged shard by its file name."""
    faults = {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ProgressBar(total=manifest.count, unit="img", desc=f"verifying {root.name}") as bar,
    ):
        results = pool.map(lambda entry: find_shard_faults(root, manifest, entry), manifest.shards)
        for entry, shard_faults in zip(manifest.shards, results):
            bar.update(entry["count"])
            if shard_faults:
                faults[entry["file"]] = shard_faults
    return faults


def find_shard_faults(root: Path, manifest: Manifest, entry: dict) -> list[Fault]:
    """Return the faults of a shard, given its entry in the manifest."""
    # Compare each file with its sha256 and its expected shape.
    faults = []
    arrays = {}
    for folder in manifest.folders:
        path = root / folder / entry["file"]
        if pointer_problem := describe_lfs_pointer(path):
            faults.append(Fault(folder, pointer_problem))
            continue
        try:
            if sha256(path) != entry.get("sha256", {}).get(folder):
                faults.append(Fault(folder, "sha256 does not match the manifest"))
            array = NpyFile(path)
        except (OSError, ValueError, EOFError) as error:
            faults.append(Fault(folder, f"cannot be read ({describe_read_error(error)})"))
            continue
        shape, dtype = _get_expected_layout(manifest, folder, entry["count"])
        if array.shape == shape and array.dtype == dtype:
            arrays[folder] = array
        else:
            description = f"is {array.dtype} {array.shape}, should be {dtype} {shape}"
            faults.append(Fault(folder, description))

    # Check the values of labels and moments.
    labels = arrays["labels"][:] if "labels" in arrays else np.empty(0)
    if labels.size:
        lowest = labels.min()
        highest = labels.max()
        if lowest < 0 or highest >= manifest.num_classes:
            expected = f"should be from 0 to {manifest.num_classes - 1}"
            faults.append(Fault("labels", f"range from {lowest} to {highest}, {expected}"))
    moments = {folder: arrays[folder] for folder in manifest.moment_folders if folder in arrays}
    for folder, array in moments.items():
        if problem := _describe_invalid_moments(array):
            faults.append(Fault(folder, problem))

    # Compare the sums per channel with those in the manifest.
    if not faults and "sum" in entry:
        sums = compute_channel_sums(list(moments.values()))
        if not all(
            _is_close(np.array(value), entry.get(name), 1e-9) for name, value in sums.items()
        ):
            faults.append(Fault("statistics", "do not match the manifest"))
    return faults


def _get_expected_layout(
    manifest: Manifest, folder: str, count: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and the dtype that the array of a shard must have."""
    if folder == "labels":
        return (count,), np.dtype(np.int64)
    if folder == "images":
        return (count, 3, manifest.resolution, manifest.resolution), np.dtype(np.uint8)
    row_format = manifest.moments_format
    return (count, *row_format.shape), row_format.base


def _describe_invalid_moments(moments: NpyFile) -> str | None:
    """Describe the first invalid values in moments (n, 2C, h, w), if there are any."""
    channels = moments.shape[1] // 2
    try:
        for chunk in iter_chunks(moments):
            if not np.isfinite(chunk).all():
                return "contains values that are not finite"
            if (chunk[:, channels:] < 0).any():
                return "contains negative standard deviations"
    except OSError as error:
        return f"cannot be read ({describe_read_error(error)})"
    return None


def _is_close(actual: np.ndarray, recorded: object, rtol: float, atol: float = 1e-8) -> bool:
    """Return whether recorded numbers are close to the actual ones. The record may be damaged."""
    try:
        array = np.array(recorded, np.float64)
    except (TypeError, ValueError):
        return False
    return array.shape == actual.shape and np.allclose(actual, array, rtol=rtol, atol=atol)


def find_manifest_fault(manifest: Manifest) -> str | None:
    """Describe a mismatch between the totals of the manifest and its shards, if there is one."""
    count = sum(entry["count"] for entry in manifest.shards)
    if count != manifest.count:
        return f"manifest.json records {manifest.count} images, but its shards contain {count}"
    if any("sum" not in entry for entry in manifest.shards):
        return "manifest.json was written by an older version and lacks the sums of its shards"
    mean, std = compute_channel_statistics(manifest.shards, manifest.latent_shape, manifest.flips)
    is_mean_equal = _is_close(mean, manifest.mean, rtol=1e-6, atol=1e-9)
    if not is_mean_equal or not _is_close(std, manifest.std, rtol=1e-6):
        return "mean and std of manifest.json do not agree with its shards"
    return None


def make_job(manifest: Manifest, args: argparse.Namespace, world: World) -> CacheJob:
    """Return the job that created a cache. Locations from the flags replace the recorded ones.

    Raises:
        UserError: The manifest does not record a job, or its images or VAE are missing.
    """
    recorded = manifest.encoding
    locations = {
        "source": Path(args.source or recorded.get("source", "")),
        "labels": args.labels or (recorded.get("labels") and Path(recorded["labels"])),
        "vae": args.vae or recorded.get("vae"),
    }

    def make_settings(settings_class: type) -> Any:
        names = [field.name for field in fields(settings_class)]
        values = recorded | locations
        return settings_class(**{name: values[name] for name in names if name in values})

    match recorded.get("made_by"):
        case "import_repa":
            return ImportJob(make_settings(ImportSettings), args.device)
        case "encode_latents":
            return EncodingJob(
                make_settings(EncodingSettings), args.device, args.num_workers, world
            )
    raise UserError(
        f"{args.data}: the manifest does not record how the cache was created; "
        "encode the images again into another folder"
    )


def repair(
    args: argparse.Namespace, manifest: Manifest, faults: dict[str, list[Fault]], world: World
) -> None:
    """Rebuild the damaged shards on all processes, and report files that have changed."""
    image_files = [
        file
        for file, shard_faults in faults.items()
        if all(fault.part == "images" for fault in shard_faults)
    ]
    shard_files = [file for file in faults if file not in image_files]
    job = make_job(manifest, args, world)
    changed_files = rebuild_shards(args.data, job, shard_files, image_files, world)
    if world.rank == 0:
        print(f"{args.data}: rebuilt {len(faults)} of {len(manifest.shards)} shards")
        for file in changed_files:
            print(
                f"{file} differs from the original, because the images or the machine are "
                "different; manifest.json has the new sha256"
            )


def main() -> None:
    """Run the command."""
    args = parse_args()
    world = World()
    manifest = read_manifest(args.data)

    # The first process checks the files. All processes need the result to distribute the repair.
    faults = world.broadcast(find_all_faults(args.data, manifest) if world.rank == 0 else None)
    if world.rank == 0:
        for file, shard_faults in faults.items():
            for fault in shard_faults:
                print(f"{file}: {fault.part}: {fault.description}", flush=True)

    num_shards = len(manifest.shards)
    if faults and args.repair:
        repair(args, manifest, faults, world)
    elif faults:
        raise UserError(
            f"{args.data}: {len(faults)} of {num_shards} shards are damaged; "
            "pass --repair to rebuild them"
        )
    elif manifest_fault := find_manifest_fault(manifest):
        raise UserError(
            f"{args.data}: {manifest_fault}; encode the images again into another folder"
        )
    elif world.rank == 0:
        print(f"{args.data} is valid: {num_shards} shards, {manifest.count:,} images")
    world.close()


if __name__ == "__main__":
    cli.run(main)
