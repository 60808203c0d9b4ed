"""Build a cache from the shards of a job. Each shard is made by one process and written atomically.

DEST/partial/plan.json        settings that all shards of an unfinished cache share
DEST/partial/00000.npy.json   manifest entry of shard 0; exists when the shard is complete
DEST/manifest.json            written last, when all shards are complete
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.cli import UserError
from common.files import discard_on_error, lock, write_file
from common.image_grid import save_png
from common.processes import World
from latents.manifest import CacheError, Manifest, read_manifest, write_manifest
from preprocessing.shards import (
    Shard,
    ShardEntry,
    add_images,
    channel_statistics,
    shard_file_name,
    write_shard,
)

Plan = dict[str, Any]  # the settings that determine the bytes of a cache or of features

# Defaults of settings that plans written by older versions do not contain.
PLAN_DEFAULTS = {"keep_images": False}
# Settings that may differ when a command is rerun on a complete cache: the first two change at most
# the last bit of a moment, and images can be added.
FREE_SETTINGS = ("batch_size", "shard_size", "keep_images")


class CacheJob(Protocol):
    """Makes the shards of a cache.

    Attributes:
        plan: All settings that determine the bytes of the shards. Shards of different plans are
            never mixed.
        settings: Settings to create the same job again, stored in the manifest.
        manifest_fields: Fields of the manifest that do not depend on the shards.
        num_images: Number of images of the source, including those that cannot be used.
        shard_size: Number of images per shard, except for the last one.
        description: Label of the progress bar.
    """

    plan: Plan
    settings: dict[str, Any]
    manifest_fields: dict[str, Any]
    num_images: int
    shard_size: int
    description: str

    def iter_shards(
        self,
        dest: Path,
        shard_indices: list[int],
        progress: Callable[[int], None],
        only_images: bool,
    ) -> Iterator[tuple[int, Shard]]:
        """Make shards.

        Args:
            dest: Folder of the cache, for the files of images.
            shard_indices: The shards to make, in this order.
            progress: Called after every few images with their number.
            only_images: Whether only the images and the data that `add_images` compares are
                needed.

        Yields:
            The index of each shard and the shard.
        """

    def make_preview(self) -> tuple[Image.Image, str]:
        """Return the content of preview.png, and one line of text about it."""


def image_range(job: CacheJob, shard_index: int) -> range:
    """Return the indices of a shard's images in the source."""
    start = shard_index * job.shard_size
    return range(start, min(start + job.shard_size, job.num_images))


def all_entries(manifest: Manifest) -> list[ShardEntry]:
    """Return the entries of all shards in order, including shards without any usable image."""
    entries = [*manifest.shards, *manifest.encoding.get("empty", [])]
    return sorted(entries, key=lambda entry: entry["file"])


def make_manifest(job: CacheJob, entries: list[ShardEntry]) -> Manifest:
    """Return the manifest of a cache with these shards, which must be in order.

    Raises:
        UserError: If no shard contains an image.
    """
    nonempty = [entry for entry in entries if entry["count"]]
    if not nonempty:
        raise UserError(f"{job.settings['source']}: none of the images can be used")
    kinds: Counter[str] = Counter()
    for entry in entries:
        kinds.update(entry["kinds"])
    empty = [entry for entry in entries if not entry["count"]]
    fields = job.manifest_fields
    mean, std = channel_statistics(nonempty, fields["latent_shape"], fields["flips"])
    return Manifest(
        **fields,
        count=sum(entry["count"] for entry in nonempty),
        skipped=sum(len(entry["skipped"]) for entry in entries),
        kinds=dict(sorted(kinds.items())),
        mean=mean.tolist(),
        std=std.tolist(),
        shards=nonempty,
        encoding=job.settings | {"plan": job.plan, "empty": empty},
    )


def manifest_with_images(manifest: Manifest, entries: list[ShardEntry]) -> Manifest:
    """Return the manifest of the same cache after images were added to its shards."""
    kept = {"keep_images": True}
    encoding = manifest.encoding | kept | {"plan": manifest.encoding["plan"] | kept}
    return replace(manifest, images=True, shards=entries, encoding=encoding)


def describe_differences(old: Plan, new: Plan) -> str:
    """Return a text with the values of `new` that differ from `old`, empty if there are none."""

    def shorten(value: object) -> object:
        if isinstance(value, str) and len(value) > 40:  # a hash
            return f"{value[:8]}..."
        return value

    return ", ".join(
        f"{key} was {shorten(old.get(key))}, is {shorten(value)}"
        for key, value in new.items()
        if old.get(key) != value
    )


def read_complete_cache(dest: Path, plan: Plan) -> Manifest | None:
    """Return the manifest if DEST is a complete cache of this plan, and None if DEST has none.

    Raises:
        UserError: If the cache cannot be read or was made with other settings.
    """
    if not (dest / "manifest.json").exists():
        return None
    try:
        manifest = read_manifest(dest)
    except CacheError as error:
        raise UserError(
            f"--dest {dest} contains a cache that cannot be read ({error}); choose another folder"
        ) from None
    old_plan = manifest.encoding.get("plan", {})
    new_plan = {key: value for key, value in plan.items() if key not in FREE_SETTINGS}
    changes = describe_differences(old_plan, new_plan)
    if changes:
        raise UserError(
            f"--dest {dest} contains a cache with other settings ({changes}); choose another "
            "folder or remove it"
        )
    lacks_images = plan["keep_images"] and not manifest.images
    if lacks_images and old_plan["shard_size"] != plan["shard_size"]:
        raise UserError(
            f"--dest {dest} was created with --shard-size {old_plan['shard_size']}; pass the same "
            "value to add the images"
        )
    return manifest


def check_or_record_plan(dest: Path, plan: Plan) -> None:
    """Record the plan of an unfinished cache, or check it if some shards are complete.

    --skip-bad is not part of the plan, so it can be added after a bad image has stopped a run.

    Raises:
        UserError: If the complete shards belong to another plan.
    """
    path = dest / "partial" / "plan.json"
    if path.exists() and list(path.parent.glob("*.npy.json")):
        changes = describe_differences(PLAN_DEFAULTS | json.loads(path.read_text()), plan)
        if changes:
            raise UserError(
                f"{dest} contains unfinished work with other settings ({changes}); rerun the "
                "command with the old settings, or remove the folder"
            )
    else:
        write_file(path, json.dumps(plan).encode())
        if not (dest / "manifest.json").exists():
            # An existing preview may belong to other settings.
            (dest / "preview.png").unlink(missing_ok=True)


def lock_and_clean(dest: Path, resources: ExitStack) -> None:
    """Lock DEST for the first process, and remove files that were left incomplete.

    The locks of all ranks are tested, because the first process of another command may have been
    killed while its other processes still run.

    Raises:
        UserError: If another command uses DEST, or DEST cannot be created.
    """
    partial = dest / "partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{dest} cannot be created ({error.strerror}); choose another folder"
        ) from None
    try:
        for path in partial.glob("lock.*"):
            with lock(path):
                pass
        resources.enter_context(lock(partial / "lock.0"))
    except BlockingIOError:
        raise UserError(
            f"{dest} is in use by another process; wait until it ends, or stop it"
        ) from None
    for name in (".", "partial", "moments", "mirrored", "labels", "images"):
        for incomplete in (dest / name).glob(".*.partial"):
            incomplete.unlink()


def lock_destination(
    world: World, resources: ExitStack, dest: Path, begin: Callable[[], Any]
) -> Any:
    """Lock DEST on all processes, and return the result of `begin`.

    Args:
        world: All processes of this command.
        resources: Releases the locks when it is closed.
        dest: Folder of a cache or of features.
        begin: Called on the first process, after it has locked DEST.

    Returns:
        The result of `begin`, on all processes.

    Raises:
        UserError: If another command uses DEST, or DEST cannot be created.
    """

    def lock_and_begin() -> Any:
        lock_and_clean(dest, resources)
        return begin()

    result = world.run_on_first_rank(lock_and_begin)
    if world.rank:
        resources.enter_context(lock(dest / "partial" / f"lock.{world.rank}"))
    return result


def check_same_plan(job: CacheJob, world: World) -> None:
    """Raise UserError if the processes have different flags, or read different sources."""
    for rank, plan in enumerate(world.all_gather(job.plan)):
        changes = describe_differences(job.plan, plan)
        if changes:
            raise UserError(
                f"process {rank} has other settings than process {world.rank} ({changes}); pass "
                "the same source and flags to all processes"
            )


def remove_partial_records(dest: Path) -> None:
    """Remove the records of an unfinished cache."""
    for file in (dest / "partial").iterdir():
        file.unlink()
    (dest / "partial").rmdir()


def make_shards(
    dest: Path,
    job: CacheJob,
    shard_indices: list[int],
    world: World,
    on_written: Callable[[int, ShardEntry], None],
    entries_without_images: dict[str, ShardEntry] | None = None,
) -> None:
    """Make this process's share of the shards. Each is written while the next one is made.

    Args:
        dest: Folder of the cache.
        job: The job of the cache.
        shard_indices: The shards that all processes make together.
        world: The processes over which the shards are distributed.
        on_written: Called with index and manifest entry of each shard that has been written, also
            if a later shard fails.
        entries_without_images: If given, images are added to existing shards. Maps the file names
            of these shards to their manifest entries.
    """
    local_indices = shard_indices[world.rank :: world.num_processes]
    num_images = sum(len(image_range(job, k)) for k in local_indices) * world.num_processes
    only_images = entries_without_images is not None

    def write(shard_index: int, shard: Shard) -> None:
        with discard_on_error(shard.images):
            if entries_without_images is None:
                entry = write_shard(dest, shard_index, shard)
            else:
                stored_entry = entries_without_images[shard_file_name(shard_index)]
                entry = add_images(dest, stored_entry, shard)
        on_written(shard_index, entry)

    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=num_images,
            unit="img",
            desc=job.description,
            disable=world.rank > 0,
            smoothing=0.05,
        ) as bar,
    ):

        def progress(images: int) -> None:
            bar.update(images * world.num_processes)

        pending: Future[None] | None = None
        for shard_index, shard in job.iter_shards(dest, local_indices, progress, only_images):
            with discard_on_error(shard.images):
                if pending is not None:
                    pending.result()
            pending = writer.submit(write, shard_index, shard)
        if pending is not None:
            pending.result()


def build_cache(dest: Path, job: CacheJob, world: World) -> Manifest:
    """Make the missing shards of a cache, or the missing images of a complete cache.

    While images are added, the cache stays valid and has no images. Call this on all processes.

    Raises:
        UserError: If DEST contains another cache or is in use, or if the job fails.
    """
    check_same_plan(job, world)
    manifest = world.run_on_first_rank(lambda: read_complete_cache(dest, job.plan))
    if manifest and (manifest.images or not job.plan["keep_images"]):
        return manifest

    shard_indices = list(range(-(-job.num_images // job.shard_size)))
    entries_without_images = None
    if manifest:
        entries_without_images = {entry["file"]: entry for entry in manifest.shards}
        shard_indices = [k for k in shard_indices if shard_file_name(k) in entries_without_images]
    records = {k: dest / "partial" / f"{shard_file_name(k)}.json" for k in shard_indices}

    def is_complete(shard_index: int) -> bool:
        if not records[shard_index].exists():
            return False
        folders = json.loads(records[shard_index].read_text())["sha256"]
        return all((dest / folder / shard_file_name(shard_index)).exists() for folder in folders)

    def begin() -> list[int]:
        check_or_record_plan(dest, job.plan)
        missing = [k for k in shard_indices if not is_complete(k)]
        if missing and not manifest and not (dest / "preview.png").exists():
            preview, description = job.make_preview()
            save_png(preview, dest / "preview.png")
            print(f"{dest / 'preview.png'}: {description}", flush=True)
        return missing

    entries: dict[int, ShardEntry] = {}

    def record(shard_index: int, entry: ShardEntry) -> None:
        write_file(records[shard_index], json.dumps(entry).encode())
        entries[shard_index] = entry

    with ExitStack() as resources:
        missing = lock_destination(world, resources, dest, begin)
        make_shards(dest, job, missing, world, record, entries_without_images)

        # A network disk may not show the records yet that other processes have just written, so
        # read only the records of earlier runs.
        new_entries = {k: entry for part in world.all_gather(entries) for k, entry in part.items()}
        if world.rank == 0:
            all_shards = [
                new_entries.get(k) or json.loads(records[k].read_text()) for k in shard_indices
            ]
            if manifest:
                manifest = manifest_with_images(manifest, all_shards)
            else:
                manifest = make_manifest(job, all_shards)
            finish(dest, manifest)
        return world.broadcast(manifest)


def finish(dest: Path, manifest: Manifest) -> None:
    """Write skipped.jsonl and the manifest, and remove the records of the unfinished cache."""
    skipped = [row for entry in all_entries(manifest) for row in entry["skipped"]]
    if skipped:
        lines = "".join(json.dumps(row) + "\n" for row in skipped)
        write_file(dest / "skipped.jsonl", lines.encode())
    else:
        (dest / "skipped.jsonl").unlink(missing_ok=True)
    write_manifest(dest, manifest)
    remove_partial_records(dest)


def rebuild_shards(
    dest: Path, job: CacheJob, shards: list[int], images: list[int], world: World
) -> list[str]:
    """Make damaged shards of a complete cache again.

    Args:
        dest: Folder of the cache.
        job: The job that created the cache.
        shards: Indices of shards to make again.
        images: Indices of shards of which only the images are made again.
        world: All processes of this command.

    Returns:
        The files whose bytes differ from those that the manifest recorded.

    Raises:
        UserError: If the job has other settings than the one that created the cache.
    """
    manifest = read_manifest(dest)
    changes = describe_differences(PLAN_DEFAULTS | manifest.encoding.get("plan", {}), job.plan)
    if changes:
        raise UserError(
            f"{dest} was created with other settings ({changes}); pass the source, labels and VAE "
            "that it was created from"
        )
    check_same_plan(job, world)
    old_entries = {entry["file"]: entry for entry in manifest.shards}
    local_entries: dict[str, ShardEntry] = {}

    def collect(_: int, entry: ShardEntry) -> None:
        local_entries[entry["file"]] = entry

    with ExitStack() as resources:
        lock_destination(world, resources, dest, lambda: None)
        make_shards(dest, job, shards, world, collect)
        make_shards(dest, job, images, world, collect, old_entries)
        new_entries = {
            file: entry for part in world.all_gather(local_entries) for file, entry in part.items()
        }
        if world.rank == 0:
            entries = [new_entries.get(entry["file"], entry) for entry in all_entries(manifest)]
            finish(dest, make_manifest(job, entries))
        world.barrier()
    return sorted(
        file
        for file, entry in new_entries.items()
        if entry["sha256"] != old_entries.get(file, {}).get("sha256")
    )


def format_summary(dest: Path, manifest: Manifest) -> str:
    """Return a few lines of text that describe a cache and the kinds of its images."""
    shape = "x".join(map(str, manifest.latent_shape))
    std = ", ".join(f"{value:.2f}" for value in np.multiply(manifest.std, manifest.scale))
    count = f"{manifest.count:,} images"
    if manifest.flips:
        count += " and their flipped versions"
    if manifest.images:
        count += ", with the images kept"
    lines = [
        f"{dest}: {count}, {manifest.num_classes} classes, latents {shape}, std per channel {std}"
    ]
    for kind, number in sorted(manifest.kinds.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {number:>9,} {kind}")
    if manifest.skipped:
        lines.append(f"  {manifest.skipped:>9,} skipped; see {dest / 'skipped.jsonl'}")
    return "\n".join(lines)
