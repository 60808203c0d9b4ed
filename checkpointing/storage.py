"""Find, verify, read and write checkpoints, and lock runs.

    exps/NAME/checkpoints/0050000/
      config.json            settings required to rebuild, sample from and evaluate the network
      ema.safetensors        EMA of the backbone, sufficient for sampling; its metadata hold a
                             hash of the settings in config.json
      ema-0.999.safetensors  EMA of the backbone for a further --ema-decay, here 0.999
      model.safetensors      weights of the backbone and the alignment heads (no EMA)
      optimizer.safetensors  moments of AdamW
                             With --shard, these two files are split by rows into files such as
                             model-00000-of-00008.safetensors, whose metadata hold the first rows.
      progress.json          step, optimizer settings, state of the gradient scaler, running
                             means of the logged metrics, flags of the run, number of failed
                             previews and evaluations, sha256 of the other files

Checkpoints are saved atomically: they are written to a hidden folder, fsynced and renamed. Loading
a checkpoint never unpickles a file.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.cli import UserError, describe_read_error, first_line
from common.files import fsync, lock, read_json_if_valid, sha256, write_file
from common.lfs import describe_lfs_pointer


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or in use."""


@contextmanager
def convert_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Raise a CheckpointError if the file at `path` cannot be read or has invalid contents."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if problem := describe_lfs_pointer(path):
            raise CheckpointError(problem) from None
        reason = describe_read_error(error)
        raise CheckpointError(f"{path} cannot be loaded ({reason}){remedy}") from None


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("[0-9]*")
    return sorted((folder for folder in folders if folder.name.isdigit()), key=_parse_step)


def _parse_step(checkpoint: Path) -> int:
    return int(checkpoint.name)


def find_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a run, or `path` if it is a checkpoint.

    Raises:
        CheckpointError: If there is no checkpoint.
    """
    if (path / "config.json").exists() and (path / "ema.safetensors").exists():
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        return checkpoints[-1]
    if not path.exists():
        problem = "does not exist"
    elif (path / "args.json").exists():
        problem = "has no checkpoints yet"
    else:
        problem = "is neither a run (exps/NAME) nor a checkpoint (exps/NAME/checkpoints/STEP)"
    raise CheckpointError(f"{path} {problem}")


def read_config(checkpoint: Path) -> dict:
    """Read the config.json of a checkpoint.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    path = checkpoint / "config.json"
    with convert_errors(path):
        return json.loads(path.read_text())


def hash_settings(config: dict) -> str:
    """Return a hash of the settings in a config.json, without paths and values that exports change.

    The metadata of an EMA contain it under "config", so that a config.json of another run is found.
    """
    data = {key: value for key, value in config["data"].items() if key not in ("source", "vae")}
    changing = ("step", "ema_decay", "exported")
    settings = {key: value for key, value in config.items() if key not in changing}
    return hashlib.sha256(
        json.dumps(settings | {"data": data}, sort_keys=True).encode()
    ).hexdigest()


def ema_filename(config: dict, decay: float) -> str:
    """Return the name of the EMA file for a decay.

    Args:
        config: The config.json of the checkpoint.
        decay: Decay of the EMA.

    Raises:
        CheckpointError: If the checkpoint has no EMA with this decay.
    """
    decays = config["ema_decay"]
    if decay == decays[0]:
        return "ema.safetensors"
    if decay not in decays:
        raise CheckpointError(
            f"has no EMA of --ema-decay {decay}; choose one of {' '.join(map(str, decays))}"
        )
    return f"ema-{decay}.safetensors"


def verify_checkpoint(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> dict:
    """Compare the sha256 of the files of a checkpoint with the recorded values.

    Args:
        checkpoint: Folder of the checkpoint.
        share: Rank of this process and number of processes, which share the files.

    Returns:
        The content of progress.json without the hashes.

    Raises:
        CheckpointError: If a file is damaged or cannot be read.
    """
    remedy = _format_remedy(checkpoint)
    progress = read_progress(checkpoint)
    hashes: dict[str, str] = progress.pop("sha256")
    rank, num_processes = share
    for index, (name, expected) in enumerate(hashes.items()):
        if index % num_processes != rank:
            continue
        with convert_errors(checkpoint / name, remedy):
            actual = sha256(checkpoint / name)
        if actual != expected:
            raise CheckpointError(f"{checkpoint / name} has changed since it was saved{remedy}")
    return progress


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Read the progress.json of a checkpoint, including the hashes of the other files.

    Raises:
        CheckpointError: If the file is damaged or cannot be read.
    """
    remedy = _format_remedy(checkpoint)
    path = checkpoint / "progress.json"
    with convert_errors(path, remedy):
        progress: dict[str, Any] = json.loads(path.read_text())
        is_intact = progress.pop("digest") == progress_digest(progress)
    if not is_intact:
        raise CheckpointError(f"{path} has changed since it was saved{remedy}")
    return progress


def _format_remedy(checkpoint: Path) -> str:
    """Return the end of an error message that explains what to do about a damaged checkpoint."""
    run = checkpoint.parent.parent
    step = _parse_step(checkpoint)
    older = [folder for folder in list_checkpoints(run) if _parse_step(folder) < step]
    effect = f"continue from {older[-1].name}" if older else "start from the beginning"
    return f": remove {checkpoint} to {effect}"


def progress_digest(progress: dict) -> str:
    """Return the sha256 of the contents of progress.json, except "digest"."""
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


class RunOwner:
    """Detects a second trainer of a run on a file system without locks.

    Each trainer writes an unconfirmed token to the file .owner when it starts, and confirms it
    before each write to the run. The trainer that confirms its token first continues. A running
    trainer replaces an unconfirmed token by its own, so a trainer that starts later stops before
    its first write.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path):
        self.run = run
        self.path = run / ".owner"
        self.token = uuid.uuid4().hex
        self._write(is_confirmed=False)

    def confirm(self) -> None:
        """Confirm that this process trains the run.

        Raises:
            CheckpointError: If another process has confirmed its token.
        """
        current = read_json_if_valid(self.path)
        if not current.get("is_confirmed"):
            with suppress(OSError):  # for example, the disk is full
                self._write(is_confirmed=True)
        elif current["token"] != self.token:
            raise CheckpointError(
                f"{self.run} is being trained by another process: stop that process or choose "
                "another --exp-name"
            )

    def remove_unused_folder(self) -> None:
        """Remove the folder of the run if nothing has been written to it."""
        with suppress(OSError):
            is_own = read_json_if_valid(self.path).get("token") == self.token
            if is_own and {path.name for path in self.run.iterdir()} <= {".lock", self.path.name}:
                shutil.rmtree(self.run)

    def _write(self, is_confirmed: bool) -> None:
        content = {"token": self.token, "is_confirmed": is_confirmed}
        write_file(self.path, json.dumps(content).encode())


@contextmanager
def lock_run(run: Path, expected_checkpoints: list[Path]) -> Iterator[RunOwner]:
    """Lock a run, and remove incomplete folders that an interruption left behind.

    If the caller fails before it has written to the folder of a new run, the folder is removed.

    Args:
        run: Folder of the run.
        expected_checkpoints: Checkpoints of the run that the caller listed before this call.

    Yields:
        An object that confirms the ownership before each write.

    Raises:
        CheckpointError: If another process is training the run, or has saved a checkpoint since the
            caller listed `expected_checkpoints`.
    """
    busy = CheckpointError(
        f"{run} is being trained by another process: stop that process or choose another --exp-name"
    )
    is_new = not run.exists()
    with lock(run / ".lock", busy):
        if list_checkpoints(run) != expected_checkpoints:
            raise CheckpointError(
                f"another process has just saved a checkpoint of {run}: rerun the same command"
            )
        for pattern in (".*.partial", ".*.removed"):
            for folder in (run / "checkpoints").glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)
        owner = RunOwner(run)
        try:
            yield owner
        except BaseException:
            if is_new:
                owner.remove_unused_folder()
            raise


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, after renaming it so that no incomplete checkpoint is visible."""
    removed = hidden_path(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def hidden_path(folder: Path, suffix: str) -> Path:
    """Return a path next to a checkpoint that `list_checkpoints` ignores."""
    return folder.with_name(f".{folder.name}.{suffix}")


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write and fsync a .safetensors file without holding the GIL.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        # safetensors reports the errno only in the message.
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise
        errno = int(match[1])
        raise OSError(errno, os.strerror(errno), str(path)) from None
    fsync(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    with convert_errors(path):
        return safetensors.torch.load_file(path)


def load_weights(module: nn.Module, path: Path, remedy: str = "") -> None:
    """Load a .safetensors file into a module. The names and shapes of all weights must match.

    Args:
        module: The module.
        path: The file.
        remedy: End of the error message if the file does not fit the module.

    Raises:
        CheckpointError: If the file cannot be read or does not fit the module.
    """
    tensors = load_tensors(path)
    with convert_errors(path, remedy):
        module.load_state_dict(tensors)


def format_error(error: Exception) -> str:
    """Format an error in one line. For an OSError, include the name of the file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})"
    return first_line(error)
