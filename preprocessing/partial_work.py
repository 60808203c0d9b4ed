"""Lock and record the unfinished work of a command that writes shards, so that it can resume.

DEST/partial/plan.json        settings that all shards share
DEST/partial/00000.npy.json   entry of shard 0; exists when the shard is complete
DEST/partial/lock.0           locked by rank 0 while it runs

DEST is the folder of a cache or of features.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import lock, write_file
from common.processes import World
from common.progress import ProgressBar
from preprocessing.cache_job import Plan
from preprocessing.shards import ShardEntry

# Default values of settings that older versions did not record in their plans.
PLAN_DEFAULTS = {"keep_images": False}


def describe_differences(old: Plan, new: Plan) -> str:
    """Describe the values of `new` that differ from `old`. Return "" if all values are equal."""

    def shorten(value: object) -> object:
        if isinstance(value, str) and len(value) > 40:  # a hash
            return f"{value[:8]}..."
        return value

    return ", ".join(
        f"{key} was {shorten(old.get(key))}, is {shorten(value)}"
        for key, value in new.items()
        if old.get(key) != value
    )


def check_or_record_plan(dest: Path, plan: Plan) -> None:
    """Compare the plan with that of the complete shards, or record it if there are none.

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
            # The preview of an earlier run may show images that were encoded with other settings.
            (dest / "preview.png").unlink(missing_ok=True)


def lock_and_clean(dest: Path, resources: ExitStack) -> None:
    """Lock DEST for the first process, and remove incomplete files of earlier runs.

    The function also tests the locks of the other ranks, because the first process of another
    command may have been killed while its other processes are still running.

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
    busy = UserError(f"{dest} is in use by another process; wait until it ends, or stop it")
    for path in partial.glob("lock.*"):
        with lock(path, busy):
            pass
    resources.enter_context(lock(partial / "lock.0", busy))
    for name in (".", "partial", "moments", "mirrored", "labels", "images"):
        for incomplete in (dest / name).glob(".*.partial"):
            incomplete.unlink()


@contextmanager
def lock_destination(dest: Path, world: World, prepare: Callable[[], Any]) -> Iterator[Any]:
    """Lock DEST on all processes, and yield the result of `prepare` on all processes.

    Args:
        dest: Folder of a cache or of features.
        world: All processes of this command.
        prepare: Function that the first process calls after it has locked DEST.

    Raises:
        UserError: If another command uses DEST, or DEST cannot be created.
    """
    with ExitStack() as resources:

        def lock_and_prepare() -> Any:
            lock_and_clean(dest, resources)
            return prepare()

        result = world.run_on_first_rank(lock_and_prepare)
        if world.rank:
            resources.enter_context(lock(dest / "partial" / f"lock.{world.rank}"))
        yield result


@contextmanager
def show_progress_bar(
    world: World, description: str, num_local_images: int
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on the first process, assuming that all processes are equally fast.

    Args:
        world: All processes of this command.
        description: Label of the progress bar.
        num_local_images: Number of images that this process will process.

    Yields:
        A function to call with the number of images that this process has just processed.
    """
    with ProgressBar(
        total=num_local_images * world.num_processes,
        unit="img",
        desc=description,
        disable=world.rank > 0,
        smoothing=0.05,
    ) as bar:
        yield lambda num_images: bar.update(num_images * world.num_processes)


def read_record(dest: Path, file: str) -> ShardEntry:
    """Return the entry that `write_record` has stored for a shard, or {} if there is none."""
    path = dest / "partial" / f"{file}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(dest: Path, entry: ShardEntry) -> None:
    """Record that a shard is complete, and store its entry."""
    write_file(dest / "partial" / f"{entry['file']}.json", json.dumps(entry).encode())


def remove_partial_folder(dest: Path) -> None:
    """Remove the plan, the records and the lock files, because the work is complete."""
    for file in (dest / "partial").iterdir():
        file.unlink()
    (dest / "partial").rmdir()
