"""Save checkpoints of a run in a background thread.

checkpointing/storage.py describes the files of a checkpoint. If the state is sharded, each process
writes its rows, and the first process completes the checkpoint when all of them are written.
"""

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from checkpointing.storage import (
    ema_filename,
    format_error,
    hash_settings,
    hidden_path,
    list_checkpoints,
    progress_digest,
    remove_checkpoint,
    save_tensors,
)
from checkpointing.tensor_file import FIRST_ROWS, part_name
from common.cli import UserError
from common.files import fsync, sha256, write_file
from common.processes import create_gloo_group
from common.watchdog import waiting_for
from training.sharding import Sharding, gather_tensor
from training.shared_files import wait_for_files
from training.state import TrainState

SAVE_TIMEOUT = timedelta(hours=2)  # fast processes wait for slow ones to write their files
Exchange = Callable[[object], list]  # returns the values of all processes, ordered by rank


class SaveError(UserError):
    """Another process could not write its share of a checkpoint."""


class WrittenFile(NamedTuple):
    """A file that a process has written."""

    size: int
    sha256: str


class FileContent(NamedTuple):
    """The tensors and the metadata of a .safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A copy of what this process writes to a checkpoint, independent of further training."""

    step: int
    config: dict
    files: dict[str, FileContent]  # in host memory, by file name
    progress: dict  # contents of progress.json, without hashes


def take_snapshot(state: TrainState, config: dict) -> Snapshot:
    """Copy a state to host memory. Training waits only for this part of saving.

    If the state is sharded, all processes must call this.

    Args:
        state: The state.
        config: Contents of config.json.
    """
    config = config | {"step": state.step}
    ema_metadata = {"config": hash_settings(config)}
    files = {}
    for decay, ema in zip(config["ema_decay"], state.emas, strict=True):
        tensors = _copy_whole(ema.state_dict(), state.sharding)
        if tensors:
            files[ema_filename(config, decay)] = FileContent(tensors, ema_metadata)
    tensors_by_file = {
        "model.safetensors": state.model.state_dict(),
        "optimizer.safetensors": state.get_moments(),
    }
    for name, tensors in tensors_by_file.items():
        if state.sharding is None:
            files[name] = FileContent(_copy_whole(tensors))
        elif content := _copy_rows(tensors, state.sharding):
            index, count = state.sharding.shard_index, state.sharding.num_shards
            files[part_name(name, index, count)] = content
    param_groups = state.optimizer.state_dict()["param_groups"]
    progress = {"step": state.step, "param_groups": param_groups} | state.progress
    return Snapshot(state.step, config, files, progress)


def _copy_whole(tensors: dict[str, Tensor], sharding: Sharding | None = None) -> dict[str, Tensor]:
    """Copy whole tensors to host memory, only on the first process if they are sharded."""
    copies = {}
    for name, tensor in tensors.items():
        whole = gather_tensor(tensor)
        if sharding is None or sharding.rank == 0:
            copies[name] = _copy_to_host(whole)
    return copies


def _copy_rows(tensors: dict[str, Tensor], sharding: Sharding) -> FileContent | None:
    """Copy the rows that this process stores to host memory, or return None if there are none."""
    copies = {}
    first_rows = {}
    for name, tensor in tensors.items():
        if sharding.stores(tensor):
            rows = sharding.get_rows(tensor)
            copies[name] = _copy_to_host(rows.tensor)
            first_rows[name] = rows.first
    return FileContent(copies, {FIRST_ROWS: json.dumps(first_rows)}) if copies else None


def _copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_checkpoint(
    snapshot: Snapshot, run: Path, rank: int = 0, exchange: Exchange = lambda value: [value]
) -> Path:
    """Write run/checkpoints/STEP and return it.

    Args:
        snapshot: What this process writes.
        run: The run folder.
        rank: Rank of this process. The first one creates and completes the checkpoint.
        exchange: Returns the values of all processes that write, ordered by rank.

    Raises:
        OSError: The disk is full or fails. No partial checkpoint remains.
        UserError: The first process does not see the files of another one.
        SaveError: Another process failed.
    """
    final = run / "checkpoints" / f"{snapshot.step:07d}"
    partial = hidden_path(final, "partial")
    written: dict[str, WrittenFile] = {}
    try:
        with _fail_together(exchange):
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                write_file(partial / "config.json", json.dumps(snapshot.config, indent=2).encode())
                written["config.json"] = _describe_file(partial / "config.json")
        with _fail_together(exchange):
            # On a network disk, the folder may become visible to other processes later.
            partial.mkdir(parents=True, exist_ok=True)
            for name, content in snapshot.files.items():
                save_tensors(content.tensors, partial / name, content.metadata)
                written[name] = _describe_file(partial / name)
        all_written = exchange(written)
        with _fail_together(exchange):
            if rank == 0:
                files = {name: file for part in all_written for name, file in part.items()}
                wait_for_files(partial, {name: file.size for name, file in files.items()})
                _complete(snapshot.progress, files, partial, final)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


@contextmanager
def _fail_together(exchange: Exchange) -> Iterator[None]:
    """Raise an exception on all processes if the block fails on one of them."""
    error: Exception | None = None
    try:
        yield
    except Exception as block_error:  # any failure must be reported to the other processes
        error = block_error
    problems = exchange(format_error(error) if error else "")
    if error:
        raise error
    for rank, problem in enumerate(problems):
        if problem:
            raise SaveError(f"process {rank}: {problem}")


def _describe_file(path: Path) -> WrittenFile:
    return WrittenFile(path.stat().st_size, sha256(path))


def _complete(progress: dict, files: dict[str, WrittenFile], partial: Path, final: Path) -> None:
    """Write progress.json and give the checkpoint its final name."""
    progress = progress | {"sha256": {name: files[name].sha256 for name in sorted(files)}}
    progress["digest"] = progress_digest(progress)
    write_file(partial / "progress.json", json.dumps(progress).encode())
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    fsync(final.parent)


@dataclass
class CheckpointWriter:
    """Writes checkpoints in a background thread and removes old ones.

    A failed save leaves existing checkpoints unchanged. As a context manager it waits, at the end
    of the block, until the current save is complete. If the state is sharded, all processes must
    construct a writer.

    Args:
        run: The run folder.
        config: Contents of config.json.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        milestone_steps: Checkpoints at multiples of this many steps are never removed.
        sharding: How the state is sharded; None if this process writes the whole state.
    """

    run: Path
    config: dict
    keep_last: int = 0
    milestone_steps: int = 0
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.messages: list[str] = []
        self.problem = ""  # reason for the last failed save
        self.rank = self.sharding.rank if self.sharding else 0
        self.group = create_gloo_group(SAVE_TIMEOUT) if self.sharding else None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def submit(self, state: TrainState) -> None:
        """Copy the state and start writing it, after the previous save is complete.

        If the state is sharded, all processes must call this.
        """
        self.wait()
        self.problem = ""
        with waiting_for("the copy of the state in host memory", is_joint=self.group is not None):
            snapshot = take_snapshot(state, self.config)
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the current save is complete. A stop signal does not end this wait."""
        if self.thread:
            is_joint = self.group is not None
            with waiting_for(
                "the previous checkpoint to be written",
                stop_seconds=math.inf,
                is_joint=is_joint,
                is_slow=is_joint,
            ):
                self.thread.join()
            self.thread = None

    def take_messages(self) -> list[str]:
        """Return and clear queued log messages."""
        count = len(self.messages)  # the thread may append another one at the same time
        messages = self.messages[:count]
        del self.messages[:count]
        return messages

    def _write(self, snapshot: Snapshot) -> None:
        try:
            saved = write_checkpoint(snapshot, self.run, self.rank, self._exchange)
        except Exception as error:  # any failure must be reported, not lost with the thread
            self.problem = format_error(error)
            self.messages.append(
                f"could not save step {snapshot.step:,}: {self.problem}; training continues and "
                "will retry"
            )
            return
        self.messages.append(f"saved {saved}")
        if self.keep_last and self.rank == 0:
            for folder in list_checkpoints(self.run)[: -self.keep_last]:
                self._remove(folder)

    def _exchange(self, value: object) -> list:
        """Return the values of all processes that write, ordered by rank."""
        if self.group is None:
            return [value]
        values: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _remove(self, folder: Path) -> None:
        if self.milestone_steps and int(folder.name) % self.milestone_steps == 0:
            return
        try:
            remove_checkpoint(folder)
        except OSError as error:  # for example, another process reads it on a network disk
            self.messages.append(f"could not remove {folder}: {format_error(error)}")
