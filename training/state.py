"""Build the state of a training run, and restore it from a checkpoint."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpointing.storage import convert_errors, ema_filename, read_config
from checkpointing.tensor_file import StoredTensors, find_parts
from models.aligned_sit import AlignedSiT
from models.sit import SiT, SiTConfig
from training.alignment import build_aligned_network
from training.config import Settings
from training.coordination import wait_for_all
from training.optimizer import build_optimizer
from training.sharding import Rows, Sharding


@dataclass
class TrainState:
    """Everything that changes during a run.

    Args:
        model: The network without DDP's wrapper.
        emas: One EMA of the backbone per decay; the first is the primary one.
        optimizer: The optimizer.
        step: Number of updates so far.
        progress: Plain values that checkpoints keep: gradient scaler, buffered metrics.
        sharding: How the tensors are sharded; None if each process holds all of them.
    """

    model: AlignedSiT
    emas: list[SiT]
    optimizer: torch.optim.Optimizer
    step: int = 0
    progress: dict = field(default_factory=dict)
    sharding: Sharding | None = None

    def get_rows(self, tensor: Tensor) -> Rows:
        """Return the rows of a tensor that this process holds."""
        return self.sharding.get_rows(tensor) if self.sharding else Rows(tensor, 0)

    def get_moments(self) -> dict[str, Tensor]:
        """Return the state tensors of the optimizer by name: "INDEX.KEY" for each parameter."""
        return {
            f"{index}.{key}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }

    def load(self, checkpoint: Path, progress: dict, reads_tensors: bool = True) -> None:
        """Restore the state in place, without communication.

        Args:
            checkpoint: Folder of the checkpoint.
            progress: Return value of `verify_checkpoint`.
            reads_tensors: Whether to read the tensors. If False, only their memory is allocated,
                for `broadcast_from_first_process`.

        Raises:
            CheckpointError: A file cannot be loaded.
        """
        progress = dict(progress)
        moments = _open(checkpoint, "optimizer.safetensors")
        self._allocate_moments(moments, progress.pop("param_groups"))
        self.step = progress.pop("step")
        self.progress = progress
        if not reads_tensors:
            return
        config = read_config(checkpoint)
        for decay, ema in zip(config["ema_decay"], self.emas, strict=True):
            self._fill(ema.state_dict(), checkpoint, ema_filename(config, decay))
        self._fill(self.model.state_dict(), checkpoint, "model.safetensors")
        self._fill(self.get_moments(), checkpoint, "optimizer.safetensors")

    def _allocate_moments(self, stored: StoredTensors, param_groups: list[dict]) -> None:
        """Give the optimizer zero tensors for all state that is stored."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name in stored.parts:
            index, key = name.split(".", 1)
            moment = torch.zeros(())
            if stored.shape(name):
                moment = torch.zeros_like(parameters[int(index)])
            moments.setdefault(int(index), {})[key] = moment
        self.optimizer.load_state_dict({"state": moments, "param_groups": param_groups})

    @torch.no_grad()
    def _fill(self, tensors: dict[str, Tensor], checkpoint: Path, name: str) -> None:
        """Read this process's rows of tensors from a file of a checkpoint, one after the other."""
        stored = _open(checkpoint, name)
        with convert_errors(checkpoint / name):
            expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            if expected != {key: stored.shape(key) for key in stored.parts}:
                raise ValueError("names or shapes of tensors differ from those of this run")
            for key, tensor in tensors.items():
                rows = self.get_rows(tensor)
                stored.copy_rows(key, rows.first, rows.tensor)

    def broadcast_from_first_process(self) -> None:
        """Copy all tensors of the first process to the others. All processes must call this."""
        for tensor in self._list_tensors():
            dist.broadcast(tensor.data, src=0)

    def _list_tensors(self) -> Iterator[Tensor]:
        for ema in self.emas:
            yield from ema.state_dict().values()
        yield from self.model.state_dict().values()
        yield from self.get_moments().values()


def _open(checkpoint: Path, name: str) -> StoredTensors:
    with convert_errors(checkpoint / name):
        return StoredTensors(find_parts(checkpoint, name))


def build_state(
    network: SiTConfig,
    align: list[dict],
    settings: Settings,
    device: torch.device,
    sharding: Sharding | None = None,
) -> TrainState:
    """Build the networks and the optimizer at step 0.

    If the state is sharded, its weights are undefined until `initialize_sharded_state` is called.

    Args:
        network: Architecture of the backbone.
        align: The "align" list of config.json, which describes the heads.
        settings: Settings of the run.
        device: Device of the state.
        sharding: How the state is sharded; None if each process holds all of it.
    """
    optimizer = settings.optimizer
    options = settings.device
    seed = settings.run.seed
    if sharding is None:
        model = build_initial_network(network, align, seed).to(device)
    else:
        with torch.device("meta"):
            model = build_initial_network(network, align, seed)
    backbone = model.backbone
    emas = [copy.deepcopy(backbone).eval().requires_grad_(False) for _ in optimizer.ema_decay]
    if options.activation_checkpointing:
        backbone.num_recomputed_blocks = options.recomputed_blocks or network.depth
    if options.compile:
        # DDP's buckets would split the graph of a block; the blocks are reduced separately anyway.
        torch._dynamo.config.optimize_ddp = False
        backbone.compile_blocks()
        # Previews and evaluations run the EMAs with other batch shapes. If the state is sharded,
        # they use unsharded copies, and only a teacher runs the EMA itself.
        if sharding:
            emas[0].compile_blocks()
    if sharding:
        sharding.apply(model, emas)
    return TrainState(model, emas, build_optimizer(model, optimizer, sharding), sharding=sharding)


def build_initial_network(network: SiTConfig, align: list[dict], seed: int) -> AlignedSiT:
    """Build the network of a run with its initial weights.

    Args:
        network: Architecture of the backbone.
        align: The "align" list of config.json, which describes the heads.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    backbone = SiT(network)  # before the heads, so that its weights do not depend on them
    return build_aligned_network(backbone, align)


def initialize_sharded_state(state: TrainState, align: list[dict], seed: int) -> None:
    """Give a sharded state the initial weights of an unsharded one. All processes must call this.

    Only the first process builds the whole network, in host memory.
    """
    sharding = state.sharding
    assert sharding is not None
    network = None
    if sharding.rank == 0:
        network = build_initial_network(state.model.backbone.config, align, seed)
    wait_for_all("the first process to initialize the weights")
    sharding.copy_from_first_process(state.model, network)
    for ema in state.emas:
        ema.load_state_dict(state.model.backbone.state_dict())


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
