"""Build a latent cache. One process creates each shard and writes it atomically.

DEST/partial/        state of an unfinished cache (preprocessing/partial_work.py)
DEST/manifest.json   written last, when all shards are complete
"""

import json
from collections import ChainMap, Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.files import discard_on_error, write_file
from common.image_grid import save_png
from common.logs import get_logger
from common.processes import World
from latents.cache import LatentCache
from latents.manifest import CacheError, Manifest, read_manifest, write_manifest
from models.labels import describe_empty_classes
from preprocessing.cache_job import CacheJob, Plan
from preprocessing.partial_work import (
    PLAN_DEFAULTS,
    check_or_record_plan,
    describe_differences,
    lock_destination,
    read_record,
    remove_partial_folder,
    show_progress_bar,
    write_record,
)
from preprocessing.shards import (
    Shard,
    ShardEntry,
    add_images,
    compute_channel_statistics,
    shard_file_name,
    write_shard,
)

logger = get_logger(__name__)

# Settings that may differ when a command is rerun on a complete cache. The first two change at most
# the last bit of a moment, and the third one adds images.
SETTINGS_ALLOWED_TO_CHANGE = ("batch_size", "shard_size", "keep_images")


def list_all_entries(manifest: Manifest) -> list[ShardEntry]:
    """Return the entries of all shards in order, including shards without usable images."""
    entries = [*manifest.shards, *manifest.encoding.get("empty", [])]
    return sorted(entries, key=lambda entry: entry["file"])


def make_manifest(job: CacheJob, entries: list[ShardEntry]) -> Manifest:
    """Return the manifest of a cache with these shards, which must be in order.

    Raises:
        UserError: If no shard contains an image.
    """
    nonempty = [entry for entry in entries if entry["count"]]
    if not nonempty:
        raise UserError(f"{job.recorded_settings['source']}: none of the images can be used")
    kinds: Counter[str] = Counter()
    for entry in entries:
        kinds.update(entry["kinds"])
    empty = [entry for entry in entries if not entry["count"]]
    fields = job.manifest_fields
    mean, std = compute_channel_statistics(nonempty, fields["latent_shape"], fields["flips"])
    return Manifest(
        **fields,
        count=sum(entry["count"] for entry in nonempty),
        skipped=sum(len(entry["skipped"]) for entry in entries),
        kinds=dict(sorted(kinds.items())),
        mean=mean.tolist(),
        std=std.tolist(),
        shards=nonempty,
        encoding=job.recorded_settings | {"plan": job.plan, "empty": empty},
    )


def add_images_to_manifest(manifest: Manifest, entries: list[ShardEntry]) -> Manifest:
    """Return the manifest of the same cache after images were added to its shards."""
    setting = {"keep_images": True}
    encoding = manifest.encoding | setting | {"plan": manifest.encoding["plan"] | setting}
    return replace(manifest, images=True, shards=entries, encoding=encoding)


def read_complete_cache(dest: Path, plan: Plan) -> Manifest | None:
    """Return the manifest if DEST is a complete cache of this plan, or None if it is not complete.

    Raises:
        UserError: If the cache cannot be read or was created with other settings.
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
    new_plan = {key: value for key, value in plan.items() if key not in SETTINGS_ALLOWED_TO_CHANGE}
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


def check_same_plan(job: CacheJob, world: World) -> None:
    """Raise UserError if the flags or the sources of the processes differ."""
    for rank, plan in enumerate(world.all_gather(job.plan)):
        changes = describe_differences(job.plan, plan)
        if changes:
            raise UserError(
                f"process {rank} has different settings from process {world.rank} ({changes}); "
                "pass the same source and flags to all processes"
            )


def make_shards(
    dest: Path,
    job: CacheJob,
    files: list[str],
    world: World,
    entries_without_images: dict[str, ShardEntry] | None = None,
    keep_records: bool = False,
) -> dict[str, ShardEntry]:
    """Create shards on all processes. Each shard is written while the next one is computed.

    Args:
        dest: Folder of the cache.
        job: The job of the cache.
        files: File names of the shards.
        world: All processes of this command.
        entries_without_images: Manifest entries, by file name, of existing shards to which images
            are added. If it is None, complete shards are created.
        keep_records: Whether to record each complete shard, so that the work can be resumed.

    Returns:
        The manifest entries of the shards by file name, on all processes.
    """
    local_files = files[world.rank :: world.num_processes]
    local_indices = [int(Path(file).stem) for file in local_files]
    images_only = entries_without_images is not None
    local_entries: dict[str, ShardEntry] = {}

    def write(shard: Shard) -> None:
        with discard_on_error(shard.images):
            if entries_without_images is None:
                entry = write_shard(dest, shard)
            else:
                entry = add_images(dest, entries_without_images[shard.file], shard)
        if keep_records:
            write_record(dest, entry)
        local_entries[shard.file] = entry

    num_images = sum(len(job.get_image_range(shard_index)) for shard_index in local_indices)
    with (
        ThreadPoolExecutor(1) as writer,
        show_progress_bar(world, job.description, num_images) as progress,
    ):
        pending: Future[None] | None = None
        for shard in job.iter_shards(dest, local_indices, progress, images_only):
            with discard_on_error(shard.images):
                if pending:
                    pending.result()
            pending = writer.submit(write, shard)
        if pending:
            pending.result()
    return dict(ChainMap(*world.all_gather(local_entries)))


def build_cache(dest: Path, job: CacheJob, world: World) -> Manifest:
    """Create the missing shards of a cache, or the missing images of a complete cache.

    While images are being added, the cache remains valid without images. Call this function on all
    processes.

    Raises:
        UserError: If DEST contains another cache or is in use, or if the job fails.
    """
    check_same_plan(job, world)
    manifest = world.run_on_first_rank(lambda: read_complete_cache(dest, job.plan))
    if manifest and (manifest.images or not job.plan["keep_images"]):
        return manifest

    entries_without_images = None
    num_shards = -(-job.num_images // job.settings.shard_size)
    files = [shard_file_name(shard_index) for shard_index in range(num_shards)]
    if manifest:
        entries_without_images = {entry["file"]: entry for entry in manifest.shards}
        files = list(entries_without_images)

    def is_complete(file: str) -> bool:
        record = read_record(dest, file)
        return bool(record) and all((dest / folder / file).exists() for folder in record["sha256"])

    def prepare() -> list[str]:
        check_or_record_plan(dest, job.plan)
        missing_files = [file for file in files if not is_complete(file)]
        if missing_files and not manifest and not (dest / "preview.png").exists():
            preview, description = job.make_preview()
            save_png(preview, dest / "preview.png")
            logger.info("%s: %s", dest / "preview.png", description)
        return missing_files

    with lock_destination(dest, world, prepare) as missing_files:
        new_entries = make_shards(
            dest, job, missing_files, world, entries_without_images, keep_records=True
        )
        # A network file system may not yet show the records that other processes have just written.
        # Therefore, read only the records of earlier runs.
        if world.rank == 0:
            entries = [new_entries.get(file) or read_record(dest, file) for file in files]
            if manifest:
                manifest = add_images_to_manifest(manifest, entries)
            else:
                manifest = make_manifest(job, entries)
            finish_cache(dest, manifest)
        return world.broadcast(manifest)


def build_and_report(dest: Path, job: CacheJob, world: World) -> None:
    """Build a cache and print a summary, or report that the cache was already complete."""
    path = dest / "manifest.json"
    old_manifest = path.read_bytes() if path.exists() else b""
    manifest = build_cache(dest, job, world)
    if world.rank == 0:
        if path.read_bytes() == old_manifest:
            print(f"{dest} is complete: {manifest.count:,} images")
        else:
            print(format_summary(dest, manifest))
        note = describe_empty_classes(LatentCache(dest).images_per_class, manifest.class_names)
        if note:
            print(f"{dest} has {note}")
    world.close()


def finish_cache(dest: Path, manifest: Manifest) -> None:
    """Write skipped.jsonl and the manifest, and remove the state of the unfinished cache."""
    skipped = [row for entry in list_all_entries(manifest) for row in entry["skipped"]]
    if skipped:
        lines = "".join(json.dumps(row) + "\n" for row in skipped)
        write_file(dest / "skipped.jsonl", lines.encode())
    else:
        (dest / "skipped.jsonl").unlink(missing_ok=True)
    write_manifest(dest, manifest)
    remove_partial_folder(dest)


def rebuild_shards(
    dest: Path, job: CacheJob, shard_files: list[str], image_files: list[str], world: World
) -> list[str]:
    """Rebuild damaged shards of a complete cache.

    Args:
        dest: Folder of the cache.
        job: The job that created the cache.
        shard_files: File names of the shards to rebuild.
        image_files: File names of the shards whose images alone are rebuilt.
        world: All processes of this command.

    Returns:
        The file names of the shards that differ from those recorded in the manifest.

    Raises:
        UserError: If the settings of the job differ from those of the job that created the cache.
    """
    manifest = read_manifest(dest)
    changes = describe_differences(PLAN_DEFAULTS | manifest.encoding.get("plan", {}), job.plan)
    if changes:
        raise UserError(
            f"{dest} was created with other settings ({changes}); pass the original source, "
            "labels and VAE"
        )
    check_same_plan(job, world)
    old_entries = {entry["file"]: entry for entry in manifest.shards}
    with lock_destination(dest, world, lambda: None):
        new_entries = make_shards(dest, job, shard_files, world)
        new_entries |= make_shards(dest, job, image_files, world, old_entries)
        if world.rank == 0:
            entries = [
                new_entries.get(entry["file"], entry) for entry in list_all_entries(manifest)
            ]
            finish_cache(dest, make_manifest(job, entries))
        world.barrier()
    return sorted(
        file
        for file, entry in new_entries.items()
        if entry["sha256"] != old_entries.get(file, {}).get("sha256")
    )


def format_summary(dest: Path, manifest: Manifest) -> str:
    """Return a summary of a cache, with one line per kind of image."""
    shape = "x".join(map(str, manifest.latent_shape))
    std = ", ".join(f"{value:.2f}" for value in np.multiply(manifest.std, manifest.scale))
    count = f"{manifest.count:,} images"
    if manifest.flips:
        count += " and their flipped versions"
    if manifest.images:
        count += ", with the encoded images"
    lines = [
        f"{dest}: {count}, {manifest.num_classes} classes, latents {shape}, std per channel {std}"
    ]
    for kind, number in sorted(manifest.kinds.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {number:>9,} {kind}")
    if manifest.skipped:
        lines.append(f"  {manifest.skipped:>9,} skipped; see {dest / 'skipped.jsonl'}")
    return "\n".join(lines)
