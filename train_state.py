"""What a run must remember, how it is saved, and how it is found again.

    exps/NAME/checkpoints/0050000/
      config.json         rebuilds the network; what sampling and evaluation need to know
      ema.safetensors     the averaged backbone alone: all that sampling needs
      ema-0.999.safetensors  likewise for each further --ema-decay
      model.safetensors   backbone and head as trained
      optimizer.safetensors  AdamW's moments; no file of a checkpoint is unpickled
      progress.json       step, optimizer's settings, gradient scaler, running averages of the log, sha256 of the other files

A checkpoint appears whole or not at all: it is written in a folder beside its place, fsynced and renamed."""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from files import fsync, lock, sha256, write_file


class CheckpointError(ValueError):
    """No checkpoint where one was asked for, or one that cannot be read."""


@dataclass(frozen=True)
class Snapshot:
    """A TrainState in host memory, cut off from the training that goes on."""

    step: int
    config: dict
    emas: list[dict[str, Tensor]]  # in the order of config["ema_decay"]
    model: dict[str, Tensor]
    optimizer: dict
    extra: dict

    def write(self, run: Path) -> Path:
        """Makes run/checkpoints/STEP and returns it. On a full disk raises OSError and leaves nothing."""
        final = run / "checkpoints" / f"{self.step:07d}"
        partial = _hidden(final, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        emas = {ema_name(self.config, decay): ema for decay, ema in zip(self.config["ema_decay"], self.emas, strict=True)}
        moments = {f"{i}.{key}": value for i, state in self.optimizer["state"].items() for key, value in state.items()}
        try:
            write_file(partial / "config.json", json.dumps(self.config, indent=2).encode())
            for name, tensors in {**emas, "model.safetensors": self.model, "optimizer.safetensors": moments}.items():
                save_tensors(tensors, partial / name)
            progress = {"step": self.step, "param_groups": self.optimizer["param_groups"], **self.extra}
            progress["sha256"] = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            write_file(partial / "progress.json", json.dumps(progress | {"digest": _digest(progress)}).encode())
            if final.exists():
                remove_checkpoint(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync(final.parent)
        return final


@dataclass
class TrainState:
    """Everything that changes while a run goes on. `model` is the bare module, outside any wrapper."""

    model: nn.Module
    emas: list[nn.Module]  # one for each --ema-decay; the first is the run's own
    optimizer: torch.optim.Optimizer
    step: int = 0
    extra: dict = field(default_factory=dict)  # plain numbers: the scaler's state, the log's running sums

    def snapshot(self, config: dict) -> Snapshot:
        """Copies all of it to host memory; this is the only part of saving that training waits for."""
        *emas, model, optimizer = (_to_host(part.state_dict()) for part in (*self.emas, self.model, self.optimizer))
        return Snapshot(self.step, config, emas, model, optimizer, dict(self.extra))

    def load(self, checkpoint: Path, progress: dict) -> None:
        """Restores everything in place; progress is what `verify` gave. Raises CheckpointError naming the file that is bad."""
        config = read_config(checkpoint)
        for decay, ema in zip(config["ema_decay"], self.emas, strict=True):
            load_weights(ema, checkpoint / ema_name(config, decay))
        load_weights(self.model, checkpoint / "model.safetensors")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_tensors(checkpoint / "optimizer.safetensors").items():
            i, key = name.split(".", 1)
            moments.setdefault(int(i), {})[key] = tensor.clone()  # the optimizer keeps what it is given
        self.extra = dict(progress)
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.extra.pop("param_groups")})
        self.step = self.extra.pop("step")


class Writer:
    """Writes checkpoints in a thread of its own and clears away old ones. A failed save leaves those there are alone.

    As a context manager it waits, however the block ends, for what is being written."""

    def __init__(self, run: Path, config: dict, keep_last: int = 0, milestone_steps: int = 0):
        """config goes into config.json; keep_last 0 keeps all; a multiple of milestone_steps is never removed."""
        self.run, self.config, self.keep_last, self.milestone_steps = run, config, keep_last, milestone_steps
        self.thread: threading.Thread | None = None
        self.messages: list[str] = []
        self.failed = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def submit(self, state: TrainState) -> None:
        """Waits for the save before, if it is still under way, copies the state and begins to write it."""
        self.wait()
        self.failed = False
        snapshot = state.snapshot(self.config | {"step": state.step})
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def take_messages(self) -> list[str]:
        """What there is to tell since the last call."""
        count = len(self.messages)  # the thread may add one meanwhile
        messages, self.messages[:count] = self.messages[:count], []
        return messages

    def _write(self, snapshot: Snapshot) -> None:
        try:
            saved = snapshot.write(self.run)
        except Exception as error:  # whatever it is, the training thread must hear of it
            self.failed = True
            self.messages.append(f"could not save step {snapshot.step:,}: {_reason(error)}; training goes on and tries again")
            return
        self.messages.append(f"saved {saved}")
        for folder in checkpoints(self.run)[: -self.keep_last] if self.keep_last else []:
            if not (self.milestone_steps and int(folder.name) % self.milestone_steps == 0):
                try:
                    remove_checkpoint(folder)
                except OSError as error:  # as on network disks, while somebody samples from it
                    self.messages.append(f"could not remove {folder}: {_reason(error)}")


def verify(checkpoint: Path) -> dict:
    """progress.json without the hashes, once every file agrees with its own. Raises CheckpointError otherwise."""
    before = [folder for folder in checkpoints(checkpoint.parent.parent) if int(folder.name) < int(checkpoint.name)]
    then = f"continue from {before[-1].name}" if before else "start anew"
    path = checkpoint / "progress.json"
    try:
        progress: dict[str, Any] = json.loads(path.read_text())
        if progress.pop("digest") != _digest(progress):
            raise CheckpointError(f"{path} is not what was saved: remove {checkpoint} to {then}")
        hashes = progress.pop("sha256")
        for name, expected in hashes.items():
            path = checkpoint / name
            if sha256(path) != expected:
                raise CheckpointError(f"{path} is not what was saved: remove {checkpoint} to {then}")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)}): remove {checkpoint} to {then}") from None
    return progress


def _digest(progress: dict) -> str:
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


@contextmanager
def claim(run: Path, saved: list[Path]) -> Iterator[None]:
    """Keeps other processes from a run, and first removes what a killed save, or a killed removal, left behind. Raises
    CheckpointError if another process has it, or had it until now: its checkpoints are no longer those in `saved`."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(run / ".lock"))
        except BlockingIOError:
            raise CheckpointError(f"{run} is being trained by another process: stop it, or name another --exp-name") from None
        if checkpoints(run) != saved:
            raise CheckpointError(f"{run} was trained by another process until now: run the command again")
        for pattern in (".*.partial", ".*.removed"):
            for folder in (run / "checkpoints").glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)
        yield


def remove_checkpoint(folder: Path) -> None:
    """Renames first, so that a half-removed checkpoint is never taken for one."""
    hidden = _hidden(folder, "removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _to_host(value: Any) -> Any:
    """Deep copy with every tensor in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(item) for item in value)
    return value


def ema_name(config: dict, decay: float | None = None) -> str:
    """The file of the average with this decay; None is the run's first. Raises CheckpointError if the run keeps no such one."""
    decays = config["ema_decay"]
    if decay is None or decay == decays[0]:
        return "ema.safetensors"
    if decay not in decays:
        raise CheckpointError(f"has no average of --ema-decay {decay}; it has {' '.join(f'{each}' for each in decays)}")
    return f"ema-{decay}.safetensors"


class EMA:
    """Exponential moving average of a module's trained parameters: one multi-tensor update, in the parameters' float32."""

    def __init__(self, ema: nn.Module, model: nn.Module, decay: float):
        pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
        self.ema, self.model = ([e for e, _ in pairs], [p for _, p in pairs])
        self.average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay ema + (1 - decay) model."""
        self.average(self.ema, self.model, None)


def _reason(error: Exception) -> str:
    return f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("[0-9]*")
    return sorted((folder for folder in folders if folder.name.isdigit()), key=lambda folder: int(folder.name))


def find_checkpoint(path: Path) -> Path:
    """A run's newest checkpoint, or `path` itself if it is one. Raises CheckpointError."""
    if (path / "config.json").exists() and (path / "ema.safetensors").exists():
        return path
    found = checkpoints(path)
    if not found:
        what = (
            "has no checkpoints yet"
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
        raise CheckpointError(f"{checkpoint / 'config.json'} cannot be read ({_first_line(error)})") from None
