"""What a run must remember, and the thread that saves it. What is in a checkpoint: checkpoint.py."""

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpointing.storage import (
    ema_filename,
    format_error,
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


@dataclass
class TrainState:
    """Everything that changes while a run goes on. `model` is the bare module, outside any wrapper."""

    model: nn.Module
    emas: list[nn.Module]  # one for each --ema-decay; the first is the run's own
    optimizer: torch.optim.Optimizer
    step: int = 0
    extra: dict = field(
        default_factory=dict
    )  # plain numbers: the scaler's state, the log's running sums

    def snapshot(self, config: dict) -> "Snapshot":
        """Copies all of it to host memory; this is the only part of saving that training waits for."""
        *emas, model, optimizer = (
            _to_host(part.state_dict()) for part in (*self.emas, self.model, self.optimizer)
        )
        return Snapshot(self.step, config, emas, model, optimizer, dict(self.extra))

    def load(self, checkpoint: Path, progress: dict) -> None:
        """Restores everything in place; progress is what `verify` gave. Raises CheckpointError naming the file that is bad."""
        config = read_config(checkpoint)
        for decay, ema in zip(config["ema_decay"], self.emas, strict=True):
            load_weights(ema, checkpoint / ema_filename(config, decay))
        load_weights(self.model, checkpoint / "model.safetensors")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_tensors(checkpoint / "optimizer.safetensors").items():
            i, key = name.split(".", 1)
            moments.setdefault(int(i), {})[key] = (
                tensor.clone()
            )  # the optimizer keeps what it is given
        self.extra = dict(progress)
        self.optimizer.load_state_dict(
            {"state": moments, "param_groups": self.extra.pop("param_groups")}
        )
        self.step = self.extra.pop("step")


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
        partial = hidden_path(final, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        emas = {
            ema_filename(self.config, decay): ema
            for decay, ema in zip(self.config["ema_decay"], self.emas, strict=True)
        }
        moments = {
            f"{i}.{key}": value
            for i, state in self.optimizer["state"].items()
            for key, value in state.items()
        }
        try:
            write_file(partial / "config.json", json.dumps(self.config, indent=2).encode())
            for name, tensors in {
                **emas,
                "model.safetensors": self.model,
                "optimizer.safetensors": moments,
            }.items():
                save_tensors(tensors, partial / name)
            progress = {
                "step": self.step,
                "param_groups": self.optimizer["param_groups"],
                **self.extra,
            }
            progress["sha256"] = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            write_file(
                partial / "progress.json",
                json.dumps(progress | {"digest": progress_digest(progress)}).encode(),
            )
            if final.exists():
                remove_checkpoint(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync(final.parent)
        return final


class Writer:
    """Writes checkpoints in a thread of its own and clears away old ones. A failed save leaves those there are alone.

    As a context manager it waits, however the block ends, for what is being written.
    """

    def __init__(self, run: Path, config: dict, keep_last: int = 0, milestone_steps: int = 0):
        """config goes into config.json; keep_last 0 keeps all; a multiple of milestone_steps is never removed."""
        self.run, self.config, self.keep_last, self.milestone_steps = (
            run,
            config,
            keep_last,
            milestone_steps,
        )
        self.thread: threading.Thread | None = None
        self.messages: list[str] = []
        self.problem = ""  # what went wrong with the last save

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def submit(self, state: TrainState) -> None:
        """Waits for the save before, if it is still under way, copies the state and begins to write it."""
        self.wait()
        self.problem = ""
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
            self.problem = format_error(error)
            self.messages.append(
                f"could not save step {snapshot.step:,}: {self.problem}; training goes on and tries again"
            )
            return
        self.messages.append(f"saved {saved}")
        for folder in list_checkpoints(self.run)[: -self.keep_last] if self.keep_last else []:
            if not (self.milestone_steps and int(folder.name) % self.milestone_steps == 0):
                try:
                    remove_checkpoint(folder)
                except OSError as error:  # as on network disks, while somebody samples from it
                    self.messages.append(f"could not remove {folder}: {format_error(error)}")


class EMA:
    """Exponential moving average of a module's trained parameters: one multi-tensor update, in the parameters' float32."""

    def __init__(self, ema: nn.Module, model: nn.Module, decay: float):
        pairs = [
            (e, p)
            for e, p in zip(ema.parameters(), model.parameters(), strict=True)
            if p.requires_grad
        ]
        self.ema, self.model = ([e for e, _ in pairs], [p for _, p in pairs])
        self.average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay ema + (1 - decay) model."""
        self.average(self.ema, self.model, None)


def _to_host(value: Any) -> Any:
    """Deep copy with every tensor in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(item) for item in value)
    return value
