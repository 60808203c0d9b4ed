"""Is a latent cache what its manifest says?

    python -m preprocessing.verify data/imagenet256
    python -m preprocessing.verify data/imagenet256 --repair

Every file's sha256, shapes, finite values, standard deviations that are not negative, labels in range, and the statistics per
channel. Says which shards are not sound; --repair makes those again from the images (or the tree they were imported from), with
the settings that the manifest records. Exit code 2 if something is wrong and was not mended.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import cli
from common.cli import UserError
from common.files import sha256
from common.processes import World
from latents.cache import CacheError, Manifest, read_manifest
from preprocessing import encoding, repa_files
from preprocessing.build import CacheJob, rebuild_shards
from preprocessing.shards import IMAGES_PER_CHUNK, channel_statistics, channel_sums


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m preprocessing.verify", "DATA")

    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="folder of a latent cache")
    add("--repair", action="store_true", help="make what is not sound again")
    add(
        "--source",
        type=Path,
        help="for --repair, where the images are now (default: where they were)",
    )
    add(
        "--labels",
        type=Path,
        help="for --repair, where the file of labels is now (default: where it was)",
    )
    add("--vae", help="for --repair, where the VAE is now (default: as recorded)")
    add(
        "--device",
        type=cli.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="for --repair",
    )
    add(
        "--num-workers",
        type=int,
        default=-1,
        help="for --repair, decoding processes; -1: one for each core",
    )

    return parser.parse_args()


def faults(root: Path, manifest: Manifest, entry: dict) -> list[str]:
    """What is wrong with a shard, in words; nothing if it is sound."""
    arrays, found = {}, []
    channels, *side = manifest.latent_shape
    rows = {
        "labels": ((), np.int64),
        "images": ((3, manifest.resolution, manifest.resolution), np.uint8),
    }
    for folder in manifest.folders:
        path = root / folder / entry["file"]
        try:
            if sha256(path) != entry.get("sha256", {}).get(folder):
                found.append(f"{folder}: not the bytes that were written (sha256)")
            arrays[folder] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            found.append(f"{folder}: cannot be read ({error})")
            continue
        row, dtype = rows.get(folder, ((2 * channels, *side), manifest.dtype))
        expected, dtype = (entry["count"], *row), np.dtype(dtype)
        if (arrays[folder].shape, arrays[folder].dtype) != (expected, dtype):
            array = arrays.pop(folder)
            found.append(f"{folder}: is {array.dtype} {array.shape}, should be {dtype} {expected}")
    labels = arrays.pop("labels", None)
    arrays.pop("images", None)
    if (
        labels is not None
        and labels.size
        and not 0 <= labels.min() <= labels.max() < manifest.num_classes
    ):
        found.append(
            f"labels: from {labels.min()} to {labels.max()}, should be from 0 to {manifest.num_classes - 1}"
        )
    for folder, array in arrays.items():
        for start in range(0, len(array), IMAGES_PER_CHUNK):
            part = array[start : start + IMAGES_PER_CHUNK]
            if not np.isfinite(part).all():
                found.append(f"{folder}: values that are not finite")
                break
            if (part[:, channels:] < 0).any():
                found.append(f"{folder}: standard deviations below 0")
                break
    if not found and "sum" in entry:
        now = channel_sums(list(arrays.values()))
        if not all(np.allclose(now[key], entry[key], rtol=1e-9) for key in now):
            found.append("statistics: not what the manifest says of this shard")
    return found


def statistics_fault(manifest: Manifest) -> str | None:
    """Whether mean and std of the whole follow from the shards'."""
    if any("sum" not in entry for entry in manifest.shards):
        return "manifest.json lacks the sums of its shards: it is an older one"
    mean, std = channel_statistics(manifest.shards, manifest.latent_shape, manifest.flips)
    if np.allclose(mean, manifest.mean, rtol=1e-6, atol=1e-9) and np.allclose(
        std, manifest.std, rtol=1e-6
    ):
        return None
    return "mean and std of manifest.json are not those of its shards"


def verify(root: Path, manifest: Manifest, quiet: bool) -> dict[str, list[str]]:
    """Faults by shard, of those that have any."""
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=manifest.count, unit="img", desc=f"verifying {root.name}", disable=quiet) as bar,
    ):
        found = {}
        for entry, wrong in zip(
            manifest.shards, pool.map(lambda entry: faults(root, manifest, entry), manifest.shards)
        ):
            bar.update(entry["count"])
            if wrong:
                found[entry["file"]] = wrong
    return found


def job_of(manifest: Manifest, args: argparse.Namespace, world: World) -> CacheJob:
    """The job that made a cache. Raises UserError if it is not known, or if what it was made of is gone."""
    recorded = dict(manifest.encoding)
    made_by = recorded.get("made_by")
    kinds = {"encode_latents": encoding.Settings, "import_repa": repa_files.Settings}
    if made_by not in kinds:
        raise UserError(
            f"{args.data}: its manifest does not say how it was made; encode the images again into another folder"
        )
    moved = {
        "source": args.source and str(args.source),
        "labels": args.labels and str(args.labels),
        "vae": args.vae,
    }
    recorded |= {key: value for key, value in moved.items() if value}
    known = {field.name for field in fields(kinds[made_by])} & recorded.keys()
    settings = kinds[made_by](**{name: recorded[name] for name in known})
    if made_by == "import_repa":
        return repa_files.ImportJob(settings, args.device)
    return encoding.EncodingJob(settings, args.device, args.num_workers, world)


def main() -> None:
    args = parse_args()
    world = World()
    try:
        manifest = read_manifest(args.data)
    except CacheError as error:
        raise UserError(str(error)) from None
    found = world.broadcast(verify(args.data, manifest, quiet=False) if world.rank == 0 else None)
    whole = statistics_fault(manifest)
    if world.rank == 0:
        for file, wrong in found.items():
            print("\n".join(f"{file}: {line}" for line in wrong), flush=True)
    count = sum(entry["count"] for entry in manifest.shards)
    if count != manifest.count:
        whole = f"manifest.json says {manifest.count} images, its shards hold {count}"
    if not found and not whole:
        if world.rank == 0:
            print(f"{args.data} is sound: {len(manifest.shards)} shards, {manifest.count:,} images")
    elif whole and not found:
        raise UserError(f"{args.data}: {whole}; encode the images again into another folder")
    elif not args.repair:
        raise UserError(
            f"{args.data}: {len(found)} of {len(manifest.shards)} shards are not sound: --repair makes them again"
        )
    else:
        numbers, images = [], []
        for file, wrong in sorted(found.items()):
            (images if all(line.startswith("images:") for line in wrong) else numbers).append(
                int(Path(file).stem)
            )
        changed = rebuild_shards(args.data, job_of(manifest, args, world), numbers, images, world)
        if world.rank == 0:
            print(f"{args.data}: made {len(found)} of {len(manifest.shards)} shards again")
            for file in changed:
                print(
                    f"{file} is not to the byte what it was: another machine, or other images; manifest.json has the new sha256"
                )
    world.close()


if __name__ == "__main__":
    cli.run(main)
