"""What a run must remember, how it is saved, and how it is found again.

    exps/NAME/checkpoints/0050000/
      config.json         rebuilds the network; what sampling and evaluation need to know
      ema.safetensors     the averaged backbone alone: all that sampling needs
      model.safetensors   backbone and head as trained
      optimizer.pt        its state dict (loaded with weights_only=True)
      progress.json       step, gradient scaler, running averages of the log

A checkpoint appears whole or not at all."""

import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from files import fsync_folder, write_file


class CheckpointError(ValueError):
    """No checkpoint where one was asked for, or one that cannot be read."""


@dataclass
class TrainState:
    """Everything that changes while a run goes on. `model` is the bare module, outside any wrapper."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    extra: dict = field(default_factory=dict)  # plain numbers: the scaler's state, the log's running sums

    def save(self, run: Path, config: dict) -> Path:
        """Writes run/checkpoints/STEP and returns it."""
        final = run / "checkpoints" / f"{self.step:07d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        optimizer = io.BytesIO()
        torch.save(self.optimizer.state_dict(), optimizer)
        try:
            write_file(partial / "config.json", json.dumps(config, indent=2).encode())
            write_file(partial / "ema.safetensors", _pack(self.ema))
            write_file(partial / "model.safetensors", _pack(self.model))
            write_file(partial / "optimizer.pt", optimizer.getvalue())
            write_file(partial / "progress.json", json.dumps({"step": self.step, **self.extra}).encode())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync_folder(final.parent)
        return final

    def load(self, checkpoint: Path) -> None:
        """Restores everything in place. Raises CheckpointError naming the file that cannot be read."""
        load_weights(self.ema, checkpoint / "ema.safetensors")
        load_weights(self.model, checkpoint / "model.safetensors")
        path = checkpoint / "optimizer.pt"
        try:
            self.optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            path = checkpoint / "progress.json"
            self.extra = json.loads(path.read_text())
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read ({_first_line(error)}): remove its folder to continue from the one before"
            ) from None
        self.step = self.extra.pop("step")


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


def _pack(module: nn.Module) -> bytes:
    return safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_weights(module: nn.Module, path: Path) -> None:
    """Strictly loads a .safetensors file. Raises CheckpointError."""
    try:
        module.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
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
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'} cannot be read ({_first_line(error)})") from None
