"""Checkpoints on the disk: what is in one, how it is found, trusted, read, and whose a run is.

    exps/NAME/checkpoints/0050000/
      config.json         rebuilds the network; what sampling and evaluation need to know
      ema.safetensors     the averaged backbone alone: all that sampling needs
      ema-0.999.safetensors  likewise for each further --ema-decay
      model.safetensors   backbone and head as trained
      optimizer.safetensors  AdamW's moments; no file of a checkpoint is unpickled
      progress.json       step, optimizer's settings, gradient scaler, running averages of the log, sha256 of the other files

A checkpoint appears whole or not at all: it is written in a folder beside its place, fsynced and renamed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.files import fsync, lock, sha256


class CheckpointError(ValueError):
    """No checkpoint where one was asked for, or one that cannot be read."""


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("[0-9]*")
    return sorted(
        (folder for folder in folders if folder.name.isdigit()), key=lambda folder: int(folder.name)
    )


def find_checkpoint(path: Path) -> Path:
    """A run's newest checkpoint, or `path` itself if it is one. Raises CheckpointError."""
    if (path / "config.json").exists() and (path / "ema.safetensors").exists():
        return path
    found = list_checkpoints(path)
    if not found:
        what = (
            "does not exist"
            if not path.exists()
            else "has no checkpoints yet"
            if (path / "args.json").exists()
            else "is neither a run (exps/NAME) nor a checkpoint (exps/NAME/checkpoints/STEP)"
        )
        raise CheckpointError(f"{path} {what}")
    return found[-1]


def read_config(checkpoint: Path) -> dict:
    """config.json of a checkpoint. Raises CheckpointError."""
    try:
        return json.loads((checkpoint / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / 'config.json'} cannot be read ({_first_line(error)})"
        ) from None


def ema_filename(config: dict, decay: float | None = None) -> str:
    """The file of the average with this decay; None is the run's first. Raises CheckpointError if the run keeps no such one."""
    decays = config["ema_decay"]
    if decay is None or decay == decays[0]:
        return "ema.safetensors"
    if decay not in decays:
        raise CheckpointError(
            f"has no average of --ema-decay {decay}; it has {' '.join(f'{each}' for each in decays)}"
        )
    return f"ema-{decay}.safetensors"


def verify_checkpoint(checkpoint: Path) -> dict:
    """progress.json without the hashes, once every file agrees with its own. Raises CheckpointError otherwise."""
    before = [
        folder
        for folder in list_checkpoints(checkpoint.parent.parent)
        if int(folder.name) < int(checkpoint.name)
    ]
    then = f"continue from {before[-1].name}" if before else "start anew"
    path = checkpoint / "progress.json"
    try:
        progress: dict[str, Any] = json.loads(path.read_text())
        if progress.pop("digest") != progress_digest(progress):
            raise CheckpointError(f"{path} is not what was saved: remove {checkpoint} to {then}")
        hashes = progress.pop("sha256")
        for name, expected in hashes.items():
            path = checkpoint / name
            if sha256(path) != expected:
                raise CheckpointError(
                    f"{path} is not what was saved: remove {checkpoint} to {then}"
                )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_first_line(error)}): remove {checkpoint} to {then}"
        ) from None
    return progress


def progress_digest(progress: dict) -> str:
    """What progress.json says of itself."""
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


@contextmanager
def lock_run(run: Path, saved: list[Path]) -> Iterator[None]:
    """Keeps other processes from a run, and first removes what a killed save, or a killed removal, left behind. Raises
    CheckpointError if another process has it, or had it until now: its checkpoints are no longer those in `saved`.
    """
    with ExitStack() as held:
        try:
            held.enter_context(lock(run / ".lock"))
        except BlockingIOError:
            raise CheckpointError(
                f"{run} is being trained by another process: stop it, or name another --exp-name"
            ) from None
        if list_checkpoints(run) != saved:
            raise CheckpointError(
                f"{run} was trained by another process until now: run the command again"
            )
        for pattern in (".*.partial", ".*.removed"):
            for folder in (run / "checkpoints").glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)
        yield


def remove_checkpoint(folder: Path) -> None:
    """Renames first, so that a half-removed checkpoint is never taken for one."""
    removed = hidden_path(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def hidden_path(folder: Path, suffix: str) -> Path:
    """Where a checkpoint is while it is not whole, and never taken for one."""
    return folder.with_name(f".{folder.name}.{suffix}")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes and fsyncs a .safetensors file without holding the interpreter. On a full disk raises OSError."""
    try:
        safetensors.torch.save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    fsync(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A .safetensors file. Raises CheckpointError."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be loaded ({_first_line(error)})") from None


def load_weights(module: nn.Module, path: Path) -> None:
    """Strictly loads a .safetensors file into a module. Raises CheckpointError."""
    tensors = load_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be loaded ({_first_line(error)})") from None


def format_error(error: Exception) -> str:
    """An error in one line."""
    return (
        f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else _first_line(error)
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
