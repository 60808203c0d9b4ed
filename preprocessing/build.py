"""Shards -> cache, whatever the shards are made of: each is made once, by one process, written whole, and never made again.

    DEST/partial/plan.json        what the shards of an unfinished cache have in common
    DEST/partial/00000.npy.json   shard 0 is whole: its entry for the manifest
    DEST/manifest.json            all are; written last

n images of a shard, C latent channels, h w latent side.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from preprocessing.shards import Shard, add_images, channel_statistics, shard_file_name, write_shard

IMAGES = {"keep_images": False}  # of a plan that does not say, as an older one
LAST_BIT = (
    "batch_size",
    "shard_size",
)  # of a plan: what may differ between two calls for a cache that is whole


class CacheJob(Protocol):
    """Something that makes shards."""

    plan: dict[str, Any]  # all that decides their bytes; caches of two plans are never mixed
    settings: dict[str, Any]  # how to set up the same job again; kept in the manifest
    manifest_fields: dict[str, Any]  # what of the manifest is known beforehand
    num_images: int
    shard_size: int
    description: str  # for the progress bar

    def iter_shards(
        self,
        dest: Path,
        shard_indices: list[int],
        progress: Callable[[int], None],
        only_images: bool,
    ) -> Iterator[tuple[int, Shard]]:
        """(number, shard) of each, in this order; progress(n) is called after every few images. only_images: as add_images
        takes them.
        """

    def make_preview(self) -> tuple[Image.Image, str]:
        """A picture that shows whether all is as it should be, and a line about it."""


def image_range(job: CacheJob, shard: int) -> range:
    """The images of a shard, by their number in the source."""
    return range(shard * job.shard_size, min((shard + 1) * job.shard_size, job.num_images))


def entries_of(manifest: Manifest) -> list[dict]:
    """Of all shards, also of those that hold nothing because all their images were bad, in their order."""
    return sorted(
        (*manifest.shards, *manifest.encoding.get("empty", [])), key=lambda entry: entry["file"]
    )


def make_manifest(job: CacheJob, entries: list[dict]) -> Manifest:
    """Joins the shards' entries, which are in their order. Raises UserError if there is no image in any."""
    skipped, kinds = (
        sum(len(entry["skipped"]) for entry in entries),
        sum((Counter(e["kinds"]) for e in entries), Counter()),
    )
    whole, empty = (
        [entry for entry in entries if entry["count"]],
        [entry for entry in entries if not entry["count"]],
    )
    if not whole:
        raise UserError(f"{job.settings['source']}: not one image could be used")
    mean, std = channel_statistics(
        whole, job.manifest_fields["latent_shape"], job.manifest_fields["flips"]
    )
    return Manifest(
        **job.manifest_fields,
        count=sum(entry["count"] for entry in whole),
        skipped=skipped,
        kinds=dict(sorted(kinds.items())),
        mean=mean.tolist(),
        std=std.tolist(),
        shards=whole,
        encoding=job.settings | {"plan": job.plan, "empty": empty},
    )


def with_images(manifest: Manifest, entries: list[dict]) -> Manifest:
    """Of a cache that has them now; the rest is what it was."""
    kept = {"keep_images": True}
    encoding = manifest.encoding | kept | {"plan": manifest.encoding["plan"] | kept}
    return replace(manifest, images=True, shards=entries, encoding=encoding)


def describe_differences(then: dict, now: dict) -> str:
    """What of two plans differs, in words."""

    def short(value: object) -> object:
        return (
            f"{value[:8]}..." if isinstance(value, str) and len(value) > 40 else value
        )  # a digest

    return ", ".join(
        f"{key} was {short(then.get(key))}, is {short(now[key])}"
        for key in now
        if then.get(key) != now[key]
    )


def whole_cache(dest: Path, plan: dict) -> Manifest | None:
    """The manifest, if DEST is the whole cache of this plan already. Raises UserError if it is another's, or damaged."""
    if not (dest / "manifest.json").exists():
        return None
    try:
        manifest = read_manifest(dest)
    except CacheError as error:
        raise UserError(
            f"--dest {dest} holds a cache that this code cannot read: choose another folder ({error})"
        ) from None
    then, now = (
        manifest.encoding.get("plan", {}),
        {k: v for k, v in plan.items() if k not in (*LAST_BIT, *IMAGES)},
    )
    changed = describe_differences(then, now)
    if changed:
        raise UserError(
            f"--dest {dest} holds a cache made otherwise ({changed}); choose another folder or remove it"
        )
    if plan["keep_images"] and not manifest.images and then["shard_size"] != plan["shard_size"]:
        raise UserError(
            f"--dest {dest} was made with --shard-size {then['shard_size']}: add the images with that"
        )
    return manifest


def check_or_record_plan(dest: Path, plan: dict) -> None:
    """Refuses to mix two caches in one folder; records a plan before a first shard is done. (What is done holds no bad images,
    so --skip-bad may come later.) Raises UserError.
    """
    path = dest / "partial" / "plan.json"
    if path.exists() and list(path.parent.glob("*.npy.json")):
        changed = describe_differences(IMAGES | json.loads(path.read_text()), plan)
        if changed:
            raise UserError(
                f"{dest} holds an unfinished encoding with other settings; finish it or remove it ({changed})"
            )
    else:
        write_file(path, json.dumps(plan).encode())
        if not (dest / "manifest.json").exists():
            (dest / "preview.png").unlink(missing_ok=True)  # of other settings, perhaps


def claim(dest: Path, held: ExitStack) -> None:
    """Holds DEST against a second command, also one whose first process was killed alone, and clears away what was left half
    written. Raises UserError.
    """
    try:
        (dest / "partial").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--dest {dest} cannot be made ({error.strerror}): name another place"
        ) from None
    try:
        for other in (dest / "partial").glob("lock.*"):
            with lock(other):
                pass
        held.enter_context(lock(dest / "partial" / "lock.0"))
    except BlockingIOError:
        raise UserError(f"--dest {dest}: another process is working on it") from None
    for folder in (
        dest,
        *(dest / name for name in ("partial", "moments", "mirrored", "labels", "images")),
    ):
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()


def lock_destination(world: World, held: ExitStack, dest: Path, begin: Callable[[], Any]) -> Any:
    """What `begin` gives on the first process, on all; each of them then holds DEST. Raises UserError."""

    def first() -> Any:
        claim(dest, held)
        return begin()

    found = world.run_on_first_rank(first)
    if world.rank:
        held.enter_context(lock(dest / "partial" / f"lock.{world.rank}"))
    return found


def same_plan(job: CacheJob, world: World) -> None:
    """Raises UserError if processes were given different things: another source on another machine, another flag."""
    for rank, plan in enumerate(world.all_gather(job.plan)):
        changed = describe_differences(job.plan, plan)
        if changed:
            raise UserError(
                f"process {rank} does not see what process {world.rank} sees ({changed}): same source, same flags?"
            )


def remove_partial_records(dest: Path) -> None:
    """Removes the records of an unfinished cache."""
    for file in (dest / "partial").iterdir():
        file.unlink()
    (dest / "partial").rmdir()


def make_shards(
    dest: Path,
    job: CacheJob,
    todo: list[int],
    world: World,
    done: Callable[[int, dict], None],
    whole: dict[str, dict] | None = None,
) -> None:
    """This process's share of the shards `todo`, dealt by number: makes each, and writes it while the next is made.
    done(number, entry) is called for each that is written, and also if one after it fails. whole: entries of shards that lack
    their images and nothing else.
    """
    mine = todo[world.rank :: world.num_processes]
    left = sum(len(image_range(job, k)) for k in mine) * world.num_processes

    def write(number: int, shard: Shard) -> None:
        with discard_on_error(shard.images):
            entry = (
                write_shard(dest, number, shard)
                if whole is None
                else add_images(dest, whole[shard_file_name(number)], shard)
            )
        done(number, entry)

    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=left, unit="img", desc=job.description, disable=world.rank > 0, smoothing=0.05
        ) as bar,
    ):
        before = None
        made = job.iter_shards(
            dest, mine, lambda images: bar.update(images * world.num_processes), whole is not None
        )
        for number, shard in made:
            with discard_on_error(shard.images):
                if before:
                    before.result()
            before = writer.submit(write, number, shard)
        if before:
            before.result()


def build_cache(dest: Path, job: CacheJob, world: World) -> Manifest:
    """Makes what is missing of a cache, on all processes of `world`: shards, or the images of all that it has. (Until those are
    there, it is the whole cache without them that it was.) Raises UserError.
    """
    same_plan(job, world)
    manifest = world.run_on_first_rank(lambda: whole_cache(dest, job.plan))
    if manifest and (manifest.images or not job.plan["keep_images"]):
        return manifest
    whole = {entry["file"]: entry for entry in manifest.shards} if manifest else None
    shards = [
        k
        for k in range(-(-job.num_images // job.shard_size))
        if whole is None or shard_file_name(k) in whole
    ]
    records = {k: dest / "partial" / f"{shard_file_name(k)}.json" for k in shards}

    def is_done(shard: int) -> bool:
        if not records[shard].exists():
            return False
        names = json.loads(records[shard].read_text())["sha256"]
        return all((dest / name / shard_file_name(shard)).exists() for name in names)

    def begin() -> list[int]:
        check_or_record_plan(dest, job.plan)
        todo = [k for k in shards if not is_done(k)]
        if todo and not whole and not (dest / "preview.png").exists():
            picture, line = job.make_preview()
            save_png(picture, dest / "preview.png")
            print(f"{dest / 'preview.png'}: {line}", flush=True)
        return todo

    made: dict[int, dict] = {}

    def done(number: int, entry: dict) -> None:
        write_file(records[number], json.dumps(entry).encode())
        made[number] = entry

    with ExitStack() as held:
        make_shards(dest, job, lock_destination(world, held, dest, begin), world, done, whole)
        made = {number: entry for part in world.all_gather(made) for number, entry in part.items()}
        if world.rank == 0:  # what others have just written, a network disk may not show here yet
            entries = [made.get(k) or json.loads(records[k].read_text()) for k in shards]
            manifest = with_images(manifest, entries) if manifest else make_manifest(job, entries)
            finish(dest, manifest)
        return world.broadcast(manifest)


def finish(dest: Path, manifest: Manifest) -> None:
    """Writes what is written last, and removes the records of the work."""
    skipped = [row for entry in entries_of(manifest) for row in entry["skipped"]]
    if skipped:
        write_file(
            dest / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped).encode()
        )
    else:
        (dest / "skipped.jsonl").unlink(missing_ok=True)
    write_manifest(dest, manifest)
    remove_partial_records(dest)


def rebuild_shards(
    dest: Path, job: CacheJob, shards: list[int], images: list[int], world: World
) -> list[str]:
    """Makes some shards of a whole cache again, and of others the images alone; returns the files that are not what they were.
    Raises UserError if the job is not the one that made the cache.
    """
    manifest = read_manifest(dest)
    changed = describe_differences(IMAGES | manifest.encoding.get("plan", {}), job.plan)
    if changed:
        raise UserError(
            f"{dest} was made otherwise than it would be now ({changed}): name what it was made of"
        )
    same_plan(job, world)
    whole = {entry["file"]: entry for entry in manifest.shards}
    with ExitStack() as held:
        lock_destination(world, held, dest, lambda: None)
        mine: dict[str, dict] = {}
        for numbers, lacking in ((shards, None), (images, whole)):
            make_shards(
                dest,
                job,
                numbers,
                world,
                lambda _, entry: mine.update({entry["file"]: entry}),
                lacking,
            )
        new = {file: entry for part in world.all_gather(mine) for file, entry in part.items()}
        if world.rank == 0:
            finish(
                dest,
                make_manifest(
                    job, [new.get(entry["file"], entry) for entry in entries_of(manifest)]
                ),
            )
        world.barrier()
    return sorted(
        file for file, entry in new.items() if entry["sha256"] != whole.get(file, {}).get("sha256")
    )


def format_summary(dest: Path, manifest: Manifest) -> str:
    """What the cache is, and what was met in the images, in a few lines."""
    shape = "x".join(map(str, manifest.latent_shape))
    std = ", ".join(f"{value:.2f}" for value in np.multiply(manifest.std, manifest.scale))
    mirrored = (" and as many mirrored" if manifest.flips else "") + (
        ", the images too" if manifest.images else ""
    )
    lines = [
        f"{dest}: {manifest.count:,} images{mirrored}, {manifest.num_classes} classes, latents {shape}, std per channel {std}"
    ]
    lines += [
        f"  {count:>9,} {kind}"
        for kind, count in sorted(manifest.kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    if manifest.skipped:
        lines.append(f"  {manifest.skipped:>9,} skipped: {dest / 'skipped.jsonl'} says why")
    return "\n".join(lines)
