"""Alignment targets. One class per method computes the tokens that a block is aligned to.

`Target` in models/target.py is the base class; docs/extending.md shows how to add a method. Shapes:
B batch, C channels, H and W latent height and width, p patch size, N = HW / p^2 tokens, D width.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from models.encoder_target import EncoderTokens
from models.errors import FieldError
from models.flops import backbone_flops
from models.projector import latent_tokens
from models.sit import SiT, SiTConfig, default_align_block
from models.target import CacheInfo, Cost, Defaults, Plan, Target, TrainingInputs


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
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
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
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
        block = 8 if "-XL/" in model else max(1, round(depth / 4))
        weight = 0.5 if loss in (None, "cosine") else 0.2
        return Defaults(block, weight, layers=2, hidden=2 * width)

    @staticmethod
    def plan(settings: TeacherSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        depth = network.depth
        block = settings.teacher_block
        if block is None:
            block = 20 if depth == 28 else round(3 * depth / 4)  # only XL has 28 blocks
        _check_block(network, "teacher_block", block)
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


@dataclass(frozen=True)
class LayerSyncSettings:
    """Settings of LayerSync."""

    target_block: int | None = field(
        default=None,
        metadata={
            "help": "block whose tokens are the target, counted from 1 (default: four sevenths of "
            "the depth, 16 for XL)"
        },
    )


class LayerSync(Target):
    """The target of LayerSync: the tokens of a later block of the same forward pass.

    There is no head and no other cost. The paper's blocks for XL are 8 and 16 of 28; for other
    networks, the same fractions of the depth are used. Source: arXiv:2510.12581.
    """

    name = "layersync"
    title = "LayerSync"
    paper = "arXiv:2510.12581"
    head = None
    Settings = LayerSyncSettings

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
        return Defaults(max(1, round(2 * depth / 7)), weight=0.2, layers=2, hidden=2 * width)

    @staticmethod
    def plan(settings: LayerSyncSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        block = settings.target_block
        if block is None:
            block = round(4 * network.depth / 7)
        _check_block(network, "target_block", block)
        return Plan(network.width, {"target_block": block})

    @property
    def student_blocks(self) -> tuple[int, ...]:
        return (self.record["target_block"],)

    def __call__(self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]) -> Tensor:
        return student_tokens[self.record["target_block"]]


@dataclass(frozen=True)
class SelfTranscendenceSettings:
    """Settings of the second stage of Self-Transcendence."""

    checkpoint: Path | None = field(
        default=None,
        metadata={
            "help": "run, checkpoint or export whose EMA is the frozen network; it must have the "
            "architecture and the latents of this run"
        },
    )
    teacher_block: int | None = field(
        default=None,
        metadata={
            "help": "block of the frozen network whose tokens are the target, counted from 1 "
            "(default: two thirds of the depth, 8 for B)"
        },
    )
    guidance: float = field(
        default=30.0,
        metadata={
            "help": "scale s of the guidance of the tokens, null + s (class - null); 1 disables it"
        },
    )


class SelfTranscendence(Target):
    """The target of the second stage of Self-Transcendence: the tokens of a frozen network.

    The frozen network is the result of an earlier run. It receives the same noisy latents and
    timesteps as the student. It is evaluated with the class, which is never dropped, and with the
    null class, and classifier-free guidance is applied to the tokens. Source: arXiv:2601.07773 and
    selftrans_Loss in its code.
    """

    name = "selftrans"
    title = "Self-Transcendence, stage 2"
    paper = "arXiv:2601.07773"
    Settings = SelfTranscendenceSettings

    def __post_init__(self) -> None:
        needs_null_class = self.record["guidance"] != 1
        frozen = self.context.load_network(self.settings.checkpoint, needs_null_class)
        self.frozen_network = frozen.network
        self.ema_sha256 = frozen.ema_sha256
        del self.frozen_network.blocks[self.record["teacher_block"] :]
        if self.context.compile:
            self.frozen_network.compile_blocks()

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
        block = max(1, depth // 2)
        return Defaults(block, weight=0.5, layers=3, hidden=2048, loss="l2", t_range=(0.4, 0.7))

    @staticmethod
    def plan(settings: SelfTranscendenceSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        if settings.checkpoint is None:
            raise FieldError(
                "checkpoint",
                "is required by --align selftrans: pass a run of the first stage, which is "
                "--align sra2 with --align-stop-step",
            )
        block = settings.teacher_block
        if block is None:
            block = round(2 * network.depth / 3)
        _check_block(network, "teacher_block", block)
        if not math.isfinite(settings.guidance):
            raise FieldError("guidance", f"{settings.guidance} is not finite; pass a number")
        return Plan(network.width, {"teacher_block": block, "guidance": settings.guidance})

    @staticmethod
    def cost(record: dict, network: SiTConfig, cache: CacheInfo) -> Cost:
        depth = record["teacher_block"]
        with torch.device("meta"):
            frozen = SiT(replace(network, depth=depth))
        used = [*frozen.blocks, frozen.x_embedder, frozen.t_embedder, frozen.y_embedder]
        num_parameters = sum(p.numel() for module in used for p in module.parameters())
        num_passes = 1 if record["guidance"] == 1 else 2
        return Cost(num_parameters, num_passes * backbone_flops(network, depth))

    @property
    def identity(self) -> dict:
        return {"ema_sha256": self.ema_sha256}

    def __call__(self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]) -> Tensor:
        scale = self.record["guidance"]
        with self.context.autocast():
            x_t = self.context.add_noise(inputs.latents, inputs.noise, inputs.t)
            if scale == 1:
                return self._compute_tokens(x_t, inputs.t, inputs.classes)
            null_class = torch.full_like(inputs.classes, self.network.num_classes)
            labels = torch.cat((inputs.classes, null_class))
            tokens = self._compute_tokens(x_t.repeat(2, 1, 1, 1), inputs.t.repeat(2), labels)
        with_class, with_null_class = tokens.chunk(2)
        return with_null_class + scale * (with_class - with_null_class)

    def _compute_tokens(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        block = self.record["teacher_block"]
        tokens = self.frozen_network.compute_block_tokens(x_t, t, labels, (block,))
        return tokens[block].float()


def _check_block(network: SiTConfig, setting: str, block: int) -> None:
    """Raise FieldError unless the network has a block of this number."""
    if not 1 <= block <= network.depth:
        raise FieldError(setting, f"{block}: the model has blocks 1 to {network.depth}")


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (Latents, EncoderTokens, Teacher, LayerSync, SelfTranscendence)
}
