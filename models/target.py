"""Base class of the alignment methods, and the objects that it receives from a run.

docs/extending.md shows how to add a method. Shapes: B batch, C channels, H and W latent height and
width, p patch size, N = HW / p^2 tokens, D width, S image size, T side of an encoder's token grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.autoencoder import LatentScale
from models.sit import SiT, SiTConfig


@dataclass(frozen=True)
class CacheInfo:
    """The properties of a latent cache that a method may depend on."""

    resolution: int  # image size in pixels
    scale: LatentScale
    mean: list[float]  # mean of the unscaled latents, per channel
    std: list[float]  # standard deviation of the unscaled latents, per channel
    has_images: bool = False
    features: dict[str, dict] = field(default_factory=dict)  # folder -> contents of features.json


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of one process in a training step, or a micro-batch of these inputs."""

    latents: Tensor  # (B, C, H, W), the normalized posterior sample that noise is added to
    labels: Tensor  # (B,), after label dropout
    classes: Tensor  # (B,), the labels before label dropout
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    posterior_mean: Tensor  # (B, C, H, W), the normalized mean of the posterior
    target_uniform: Tensor  # (B,), uniform on (0, 1), for random choices of a method
    # Name -> input that `Target.cache_inputs` requests.
    cache_inputs: dict[str, Tensor] = field(default_factory=dict)

    def split(self, count: int) -> list["TrainingInputs"]:
        """Return `count` micro-batches of equal size."""
        size = len(self.t) // count
        micro_batches = []
        for start in range(0, count * size, size):
            rows = slice(start, start + size)
            tensors = {
                name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)
            }
            cache_inputs = {name: value[rows] for name, value in self.cache_inputs.items()}
            micro_batches.append(TrainingInputs(**tensors, cache_inputs=cache_inputs))
        return micro_batches


class FrozenNetwork(NamedTuple):
    """A trained network that computes targets."""

    network: SiT  # on the device, without gradients
    ema_sha256: str  # sha256 of the file of the weights


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that a target may use."""

    device: torch.device
    ema: SiT  # the first EMA of the run; its blocks are compiled if `compile` is set
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, noise, t) -> x_t
    autocast: Callable[[], AbstractContextManager]  # enables the mixed precision of the run
    compile: bool  # whether to compile networks
    # Loads the EMA of a checkpoint with the architecture, the latents and the interpolant of the
    # run. Arguments: the path, and whether the null class must have been trained. Raises a
    # FieldError for the field "checkpoint".
    load_network: Callable[[Path, bool], FrozenNetwork]


class Defaults(NamedTuple):
    """Default values of the shared settings."""

    block: int  # counted from 1
    weight: float
    layers: int  # number of linear layers of an MLP head
    hidden: int  # width of the hidden layers of an MLP head
    loss: str = "cosine"
    t_range: tuple[float, float] = (0.0, 1.0)


class Plan(NamedTuple):
    """The properties of a target that are known before weights are loaded."""

    token_dim: int | dict[str, int]  # dimension of a target token, by name if there are several
    record: dict[str, Any] | None = None  # keys that the method adds to config.json


class Cost(NamedTuple):
    """Cost of the networks that are run only to compute the target."""

    parameters: int = 0
    flops: int = 0  # of the forward pass, per image


@dataclass(frozen=True)
class NoSettings:
    """Empty settings, for methods without settings."""


@dataclass(eq=False)
class Target(ABC):
    """Base class of the alignment methods.

    A method may compare tokens without a head (`head = None`), use the tokens of other blocks of
    the student (`student_blocks`), read images or stored features from the cache (`cache_inputs`),
    and have several targets with one head each. In the last case, `Plan.token_dim` and the result
    of `__call__` are dicts.

    Args:
        record: Entry of the method in config.json: the shared settings and `Plan.record`.
        settings: An instance of `Settings`.
        network: The architecture of the backbone.
        cache: Properties of the latent cache.
        context: Parts of the run that a target may use.

    Raises:
        FieldError: If a network or file that the settings name cannot be loaded.
    """

    name: ClassVar[str]  # value of --align
    title: ClassVar[str]  # name in model cards
    paper: ClassVar[str]  # source in model cards
    head: ClassVar[str | None] = "mlp"  # default: a key of models.projector.HEADS
    Settings: ClassVar[type] = NoSettings  # frozen dataclass; each field is a flag --NAME-FIELD

    record: dict
    settings: Any
    network: SiTConfig
    cache: CacheInfo
    context: RunContext

    def __post_init__(self) -> None:  # noqa: B027 - optional in subclasses
        """Load the resources of the target, such as a frozen network."""

    @staticmethod
    @abstractmethod
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
        """Return the settings of the paper for a preset and an alignment loss (None: unset)."""

    @staticmethod
    @abstractmethod
    def plan(settings: Any, network: SiTConfig, cache: CacheInfo) -> Plan:
        """Validate the settings and derive the properties of the target, without loading weights.

        Raises:
            FieldError: If a setting does not fit the network or the cache.
        """

    @staticmethod
    def restore(settings: Any, record: dict) -> Any:
        """Return the settings of a resumed run. Unset settings are replaced by recorded values."""
        return settings

    @staticmethod
    def cost(record: dict, network: SiTConfig, cache: CacheInfo) -> Cost:
        """Return the cost of the networks that are run only to compute the target."""
        return Cost()

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        """Names of the inputs to read from the cache: "images" or "features/FOLDER".

        Images are (B, 3, S, S) uint8. Features are encoder tokens, (B, T * T, width) float16.
        """
        return ()

    @property
    def student_blocks(self) -> tuple[int, ...]:
        """Blocks, counted from 1, whose tokens are passed to `__call__`."""
        return ()

    @property
    def identity(self) -> dict:
        """Values in config.json that must be the same when the run is resumed."""
        return {}

    @abstractmethod
    def __call__(
        self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]
    ) -> Tensor | dict[str, Tensor]:
        """Return the target tokens.

        The training step calls this method with gradients disabled. Implementations must not
        synchronize with the device.

        Args:
            inputs: A micro-batch.
            student_tokens: Tokens of `student_blocks`, (B, N, D), keyed by block.

        Returns:
            Target tokens, (B, N, token_dim). If there are several targets, a dict of their tokens.
        """
