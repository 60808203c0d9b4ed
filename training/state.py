"""Hold the state of a training run, and save it in a background thread.

checkpointing/storage.py describes the files of a checkpoint.
"""

import json
import math
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpointing.storage import (
    ema_filename,
    format_error,
    hash_settings,
    hidden_path,
    list_checkpoints,
    load_tensors,
    load_weights,
    progress_digest,
    read_config,
    remove_checkpoint,
    save_tensors,
)
from common.files import fsync, sha256, write_file
from common.watchdog import waiting_for
from models.projector import AlignedSiT
from models.sit import SiT


@dataclass
class TrainState:
    """Everything that changes during a run.

    Args:
        model: The network without DDP's wrapper.
        emas: One EMA of the backbone per decay; the first is the primary one.
        optimizer: The optimizer.
        step: Number of updates so far.
        progress: Plain values that checkpoints keep: gradient scaler, buffered metrics.
    """

    model: AlignedSiT
    emas: list[SiT]
    optimizer: torch.optim.Optimizer
    step: int = 0
    progress: dict = field(default_factory=dict)

    def snapshot(self, config: dict) -> "Snapshot":
        """Copy the state to host memory. Training waits only for this part of saving."""
        emas, model, optimizer = recursively_apply(
            lambda tensor: tensor.detach().to("cpu", copy=True).contiguous(),
            (
                [ema.state_dict() for ema in self.emas],
                self.model.state_dict(),
                self.optimizer.state_dict(),
            ),
        )
        return Snapshot(self.step, config, emas, model, optimizer, dict(self.progress))

    def load(self, checkpoint: Path, progress: dict) -> None:
        """Restore the state in place.

        Args:
            checkpoint: Folder of the checkpoint.
            progress: Return value of `verify_checkpoint`.

        Raises:
            CheckpointError: A file cannot be loaded.
        """
        config = read_config(checkpoint)
        for decay, ema in zip(config["ema_decay"], self.emas, strict=True):
            load_weights(ema, checkpoint / ema_filename(config, decay))
        load_weights(self.model, checkpoint / "model.safetensors")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_tensors(checkpoint / "optimizer.safetensors").items():
            index, key = name.split(".", 1)
            # The optimizer keeps this tensor: clone it, because the loaded one is a memory map.
            moments.setdefault(int(index), {})[key] = tensor.clone()
        progress = dict(progress)
        param_groups = progress.pop("param_groups")
        self.optimizer.load_state_dict({"state": moments, "param_groups": param_groups})
        self.step = progress.pop("step")
        self.progress = progress


@dataclass(frozen=True)
class Snapshot:
    """A copy of a `TrainState` in host memory, independent of further training."""

    step: int
    config: dict
    emas: list[dict[str, Tensor]]  # in the order of config["ema_decay"]
    model: dict[str, Tensor]
    optimizer: dict
    progress: dict

    def write(self, run: Path) -> Path:
        """Write run/checkpoints/STEP and return it.

        Raises:
            OSError: The disk is full or fails. No partial checkpoint remains.
        """
        final = run / "checkpoints" / f"{self.step:07d}"
        partial = hidden_path(final, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write_files(partial)
            if final.exists():
                remove_checkpoint(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync(final.parent)
        return final

    def _write_files(self, folder: Path) -> None:
        write_file(folder / "config.json", json.dumps(self.config, indent=2).encode())
        metadata = {"config": hash_settings(self.config)}
        for decay, ema in zip(self.config["ema_decay"], self.emas, strict=True):
            save_tensors(ema, folder / ema_filename(self.config, decay), metadata)
        save_tensors(self.model, folder / "model.safetensors")
        moments = {
            f"{index}.{key}": value
            for index, values in self.optimizer["state"].items()
            for key, value in values.items()
        }
        save_tensors(moments, folder / "optimizer.safetensors")
        progress = {"step": self.step, "param_groups": self.optimizer["param_groups"]}
        progress |= self.progress
        progress["sha256"] = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        progress["digest"] = progress_digest(progress)
        write_file(folder / "progress.json", json.dumps(progress).encode())


@dataclass
class CheckpointWriter:
    """Writes checkpoints in a background thread and removes old ones.

    A failed save leaves existing checkpoints unchanged. As a context manager it waits, at the end
    of the block, until the current save is complete.

    Args:
        run: The run folder.
        config: Contents of config.json.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        milestone_steps: Checkpoints at multiples of this many steps are never removed.
    """

    run: Path
    config: dict
    keep_last: int = 0
    milestone_steps: int = 0

    def __post_init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.messages: list[str] = []
        self.problem = ""  # reason for the last failed save

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def submit(self, state: TrainState) -> None:
        """Copy the state and start writing it, after the previous save is complete."""
        self.wait()
        self.problem = ""
        snapshot = state.snapshot(self.config | {"step": state.step})
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the current save is complete. A stop signal does not end this wait."""
        if self.thread:
            with waiting_for("the previous checkpoint to be written", stop_seconds=math.inf):
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
            saved = snapshot.write(self.run)
        except Exception as error:  # any failure must be reported, not lost with the thread
            self.problem = format_error(error)
            self.messages.append(
                f"could not save step {snapshot.step:,}: {self.problem}; training continues and "
                "will retry"
            )
            return
        self.messages.append(f"saved {saved}")
        if self.keep_last:
            for folder in list_checkpoints(self.run)[: -self.keep_last]:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        if self.milestone_steps and int(folder.name) % self.milestone_steps == 0:
            return
        try:
            remove_checkpoint(folder)
        except OSError as error:  # for example, another process reads it on a network disk
            self.messages.append(f"could not remove {folder}: {format_error(error)}")


class EMA:
    """Exponential moving average of a module's trainable parameters.

    All parameters are updated by one multi-tensor operation in their dtype (float32).

    Args:
        ema: The module that holds the averages.
        model: The trained module.
        decay: Decay per step.
    """

    def __init__(self, ema: nn.Module, model: nn.Module, decay: float):
        pairs = zip(ema.parameters(), model.parameters(), strict=True)
        trained = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        self.averages, self.parameters = zip(*trained)
        self.update_averages = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Set ema = decay * ema + (1 - decay) * model."""
        self.update_averages(self.averages, self.parameters, None)
