"""Alignment targets. One class per method computes the tokens that a block is aligned to.

docs/extending.md shows how to add a method. Shapes: B batch, C channels, H and W latent height and
width, p patch size, N = HW / p^2 tokens, D width, S image size, T side of an encoder's token grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.autoencoder import LatentScale
from models.encoder import Encoder, canonical_name, describe_encoder, encoder_cost
from models.errors import FieldError
from models.flops import backbone_flops
from models.projector import latent_tokens
from models.sit import SiT, SiTConfig, default_align_block


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


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that a target may use."""

    device: torch.device
    ema: SiT  # the first EMA of the run; its blocks are compiled if `compile` is set
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, noise, t) -> x_t
    autocast: Callable[[], AbstractContextManager]  # enables the mixed precision of the run
    compile: bool  # whether to compile networks


class Defaults(NamedTuple):
    """Default values of the shared settings."""

    block: int  # counted from 1
    weight: float
    layers: int  # number of linear layers of the head
    hidden: int  # width of the hidden layers of the head


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
    head: ClassVar[str | None] = "mlp"  # key of models.projector.HEADS
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
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        """Return the settings of the paper for a preset and an alignment loss."""

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


@dataclass(frozen=True)
class LatentSettings:
    """Settings of SRA 2."""

    target: str = field(
        default="mean",
        metadata={
            "help": "target latent: posterior mean, or the posterior sample that noise is added to",
            "choices": ("mean", "sample"),
        },
    )
    normalize: str = field(
        default="none",
        metadata={
            "help": "normalization of the target; channel: each latent channel has mean 0 and "
            "standard deviation 1 over the cache",
            "choices": ("none", "channel"),
        },
    )


class Latents(Target):
    """The target of SRA 2: the clean latents, which the cache contains."""

    name = "sra2"
    title = "SRA 2"
    paper = "arXiv:2601.17830"
    Settings = LatentSettings

    def __post_init__(self) -> None:
        device = self.context.device
        self.mean = torch.tensor(self.cache.mean, device=device)[:, None, None]
        self.std = torch.tensor(self.cache.std, device=device)[:, None, None]

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        return Defaults(default_align_block(model), weight=1.0, layers=5, hidden=2 * width)

    @staticmethod
    def plan(settings: LatentSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        record = {"target": settings.target, "normalize": settings.normalize}
        return Plan(network.patch**2 * network.channels, record)

    def __call__(self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]) -> Tensor:
        latents = inputs.posterior_mean
        if self.record["target"] == "sample":
            latents = inputs.latents
        if self.record["normalize"] == "channel":
            latents = (self.cache.scale.denormalize(latents) - self.mean) / self.std
        return latent_tokens(latents, self.network.patch)


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of REPA."""

    encoder: str = field(
        default="dinov2-b",
        metadata={"help": "image encoder: a timm model name, or a name that REPA uses"},
    )
    weights: Path | None = field(
        default=None,
        metadata={
            "help": "file with the encoder's weights in timm's format (default: download from the "
            "hub)"
        },
    )
    side: int | None = field(
        default=None,
        metadata={
            "help": "encoder input size in pixels (default: that of the stored features, otherwise "
            "as in REPA (224 for 256-pixel images), with a minimum of 224)"
        },
    )
    source: str = field(
        default="auto",
        metadata={
            "help": "source of the encoder tokens; images: encode the images of the cache in every "
            "step; features: read features stored by preprocessing.encode_features; auto: "
            "features if the cache contains them, otherwise images",
            "choices": ("auto", "images", "features"),
        },
    )


class EncoderTokens(Target):
    """The target of REPA: the patch tokens of a frozen, pretrained image encoder."""

    name = "repa"
    title = "REPA"
    paper = "arXiv:2410.06940"
    Settings = EncoderSettings

    def __post_init__(self) -> None:
        self.encoder: Encoder | None = None
        record = self.record
        weights = self.settings.weights
        reads_images = record["from"] == "images"
        if not reads_images and not weights:
            return
        encoder = Encoder(
            record["encoder"],
            self.cache.resolution,
            self.network.grid_size,
            weights,
            device=self.context.device,
            side=record["side"],
        )
        if reads_images:
            self.encoder = encoder
            if self.context.compile:
                self.encoder.compile_blocks()
        elif encoder.fingerprint != self.identity["fingerprint"]:
            raise FieldError(
                "weights",
                f"{weights} differs from the weights of {record['encoder']} with which "
                f"{record['from']} was computed; pass --repa-from images to use these weights",
            )

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        block = min(8, max(1, 2 * depth // 3))
        return Defaults(block, weight=0.5, layers=3, hidden=2048)

    @staticmethod
    def plan(settings: EncoderSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        encoder_name = canonical_name(settings.encoder)
        width, side = describe_encoder(settings.encoder, cache.resolution, settings.side)
        source = "images"
        folder = None
        if settings.source != "images":
            folder = _find_features(settings, encoder_name, network.grid_size, cache)
        if folder:
            source = f"features/{folder}"
            side = cache.features[folder]["side"]
        elif not cache.has_images:
            raise FieldError(
                "method",
                "needs images, but the cache has none: rerun the command that created it "
                "(encode_latents or import_repa) with --keep-images",
            )
        return Plan(width, {"encoder": encoder_name, "side": side, "from": source})

    @staticmethod
    def restore(settings: EncoderSettings, record: dict) -> EncoderSettings:
        if settings.source == "auto":
            source = "images" if record["from"] == "images" else "features"
            settings = replace(settings, source=source)
        if settings.side is None:
            settings = replace(settings, side=record["side"])
        return settings

    @staticmethod
    def cost(record: dict, network: SiTConfig, cache: CacheInfo) -> Cost:
        if record["from"] != "images":
            return Cost()
        return Cost(*encoder_cost(record["encoder"], cache.resolution, record["side"]))

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        return (self.record["from"],)

    @property
    def identity(self) -> dict:
        if self.encoder:
            return {"fingerprint": self.encoder.fingerprint}
        folder = self.record["from"].removeprefix("features/")
        return {"fingerprint": self.cache.features[folder]["fingerprint"]}

    def __call__(self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]) -> Tensor:
        images_or_features = inputs.cache_inputs[self.record["from"]]
        if self.encoder:
            return self.encoder(images_or_features)
        return images_or_features.float()


def _find_features(
    settings: EncoderSettings, encoder_name: str, tokens_side: int, cache: CacheInfo
) -> str | None:
    """Return the folder of the stored features that fit the settings, or None.

    Raises:
        FieldError: If there are several, or if the settings require stored features and there are
            none.
    """
    folders = [
        folder
        for folder, info in cache.features.items()
        if (info["encoder"], info["tokens_side"]) == (encoder_name, tokens_side)
        and settings.side in (None, info["side"])
    ]
    if len(folders) > 1:
        sides = " ".join(str(cache.features[folder]["side"]) for folder in folders)
        raise FieldError(
            "side",
            f"is ambiguous: the cache contains features of {encoder_name} for input sizes {sides}; "
            "pass one of these sizes",
        )
    if not folders and settings.source == "features":
        side = "" if settings.side is None else f" --side {settings.side}"
        raise FieldError(
            "source",
            f"features: the cache has no features of {encoder_name} on a {tokens_side} x "
            f"{tokens_side} grid: create them with python -m preprocessing.encode_features CACHE "
            f"--encoder {settings.encoder} --tokens-side {tokens_side}{side}",
        )
    return folders[0] if folders else None


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of SRA."""

    teacher_block: int | None = field(
        default=None,
        metadata={
            "help": "block of the EMA teacher, counted from 1 (default: three quarters of the "
            "depth, 20 for XL)"
        },
    )
    t_max: float = field(
        default=0.2,
        metadata={
            "help": "largest reduction X of the teacher's timestep, which is max(t - X u, 0) with "
            "u uniform on [0, 1]"
        },
    )


class Teacher(Target):
    """The target of SRA: the tokens of a later block of the EMA at a smaller timestep.

    Source: arXiv:2505.02831, sec. 3.
    """

    name = "sra"
    title = "SRA"
    paper = "arXiv:2505.02831"
    Settings = TeacherSettings

    def __post_init__(self) -> None:
        self.teacher = self.context.ema

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        block = 8 if "-XL/" in model else max(1, round(depth / 4))
        weight = 0.5 if loss == "cosine" else 0.2
        return Defaults(block, weight, layers=2, hidden=2 * width)

    @staticmethod
    def plan(settings: TeacherSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        depth = network.depth
        block = settings.teacher_block
        if block is None:
            block = 20 if depth == 28 else round(3 * depth / 4)  # only XL has 28 blocks
        if not 1 <= block <= depth:
            raise FieldError("teacher_block", f"{block}: the model has blocks 1 to {depth}")
        if not 0 <= settings.t_max <= 1:
            raise FieldError("t_max", f"{settings.t_max} is not a number in [0, 1]")
        return Plan(network.width, {"teacher_block": block, "t_max": settings.t_max})

    @staticmethod
    def cost(record: dict, network: SiTConfig, cache: CacheInfo) -> Cost:
        return Cost(flops=backbone_flops(network, record["teacher_block"]))

    def __call__(self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]) -> Tensor:
        block = self.record["teacher_block"]
        t = (inputs.t - self.record["t_max"] * inputs.target_uniform).clamp(0, 1)
        with self.context.autocast():
            x_t = self.context.add_noise(inputs.latents, inputs.noise, t)
            tokens = self.teacher.compute_block_tokens(x_t, t, inputs.labels, (block,))[block]
        return tokens.float()


TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (Latents, EncoderTokens, Teacher)
}
