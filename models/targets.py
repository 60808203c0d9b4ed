"""What a block is aligned to: one class a method. How to add one: docs/extending.md.

A target says what its head must give before anything is loaded (`plan`), and then what a batch's tokens are compared with.
B batch, C channels, H W latent side, p patch size, N = HW / p^2 tokens, D width, S image side.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.autoencoder import LatentScale
from models.encoder import Encoder, canonical_name, describe_encoder, encoder_cost
from models.errors import FieldError
from models.flops import backbone_flops
from models.sit import SiT, SiTConfig, default_align_block


class TargetError(ValueError):
    """A method that cannot be used on these data or with this network. The message names the flag."""


class Defaults(NamedTuple):
    """What `auto` stands for."""

    block: int
    weight: float
    layers: int  # of the head
    hidden: int  # width between them


@dataclass(frozen=True)
class Data:
    """What the cache holds, as far as a method may ask."""

    resolution: int
    scale: LatentScale
    mean: list[float]  # of the unscaled latents, per channel
    std: list[float]
    images: bool = False  # whether it keeps them
    features: dict[str, dict] | None = (
        None  # of encoders, stored ahead of time: folder -> what features.json says
    )


class Batch(NamedTuple):
    """A part of a global batch, on the device. All of it but `mean`, `u` and `extra` is what the network trains on."""

    latent: Tensor  # (B, C, H, W) the draw from the posterior that is noised
    labels: Tensor  # (B,) after label dropout
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    mean: Tensor  # (B, C, H, W) the latent of the posterior's mean
    u: Tensor  # (B,) uniform on (0, 1): a random number for the method's own use
    extra: Tensor | None = None  # (B, ...) what the method's `extra` asked of the cache

    def chunk(self, parts: int) -> list["Batch"]:
        """Cut along B."""
        split = [[None] * parts if tensor is None else tensor.chunk(parts) for tensor in self]
        return [Batch(*part) for part in zip(*split)]


class Parts(NamedTuple):
    """What of a run a method may use."""

    device: torch.device
    ema: SiT  # the run's first average
    noised: Callable[
        [Tensor, Tensor, Tensor], Tensor
    ]  # (latent, noise, t) -> x_t on the run's path
    autocast: Callable[[], AbstractContextManager]  # the run's mixed precision
    compile: bool  # whether networks are to be compiled


class Target:
    """A method. `entry` is its entry in config.json's "align": block, weight, loss, head, and what `plan` added of its own."""

    name: ClassVar[str]  # on the command line
    title: ClassVar[str]
    paper: ClassVar[str]
    flags: ClassVar[
        tuple[str, ...]
    ] = ()  # of its own, as argparse names them: refused without the method

    @staticmethod
    def add_flags(add: Callable[..., Any]) -> None:
        """Adds its own flags; their default is None, and stands in the help."""

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        """Of the paper, for a preset and the loss chosen."""
        raise NotImplementedError

    @staticmethod
    def plan(args: argparse.Namespace, config: SiTConfig, data: Data) -> dict:
        """What belongs into config.json, "out" among it: how many numbers a token of the target has. Nothing is loaded yet.
        Raises TargetError.
        """
        raise NotImplementedError

    @staticmethod
    def settle(args: argparse.Namespace, entry: dict) -> None:
        """When a run is continued: flags that were not given become what they amounted to when it began."""

    def __init__(
        self, entry: dict, args: argparse.Namespace, config: SiTConfig, data: Data, parts: Parts
    ):
        """Loads what it needs. Raises TargetError."""
        self.entry, self.config, self.data, self.parts = entry, config, data, parts

    def __call__(self, batch: Batch) -> Tensor:
        """(B, N, out) float32, without gradient."""
        raise NotImplementedError

    @property
    def extra(self) -> str | None:
        """What of the cache it needs beside latents: None, "images" (B, 3, S, S) uint8, or "features/NAME" (B, N, out)."""
        return None

    @property
    def identity(self) -> dict:
        """What must be the same when a run is continued; kept in config.json."""
        return {}

    @staticmethod
    def cost(entry: dict, config: SiTConfig, data: Data) -> tuple[int, int]:
        """Of what runs for the target alone, forward and without gradient: parameters, FLOPs for one image."""
        return 0, 0


def latent_tokens(latent: Tensor, patch: int) -> Tensor:
    """Cuts a latent into the backbone's patches: (B, C, H, W) -> (B, N, p * p * C), in the order SiT's output layer has."""
    b, c, h, w = latent.shape
    grid = latent.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


class Latents(Target):
    """SRA 2: the clean latents that the frozen VAE has already made."""

    name, title, paper = "sra2", "SRA 2", "arXiv:2601.17830"
    flags = ("align_target", "align_normalize")

    @staticmethod
    def add_flags(add: Callable[..., Any]) -> None:
        add(
            "--align-target",
            choices=("mean", "sample"),
            help="sra2: posterior mean, or the very sample that was noised (default: mean)",
        )
        add(
            "--align-normalize",
            choices=("none", "channel"),
            help="sra2: channel: each latent channel to mean 0 and std 1 over the cache (default: none)",
        )

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        return Defaults(default_align_block(model), 1.0, 5, 2 * width)

    @staticmethod
    def plan(args: argparse.Namespace, config: SiTConfig, data: Data) -> dict:
        out = config.patch**2 * config.channels
        return {
            "out": out,
            "target": args.align_target or "mean",
            "normalize": args.align_normalize or "none",
        }

    def __init__(
        self, entry: dict, args: argparse.Namespace, config: SiTConfig, data: Data, parts: Parts
    ):
        super().__init__(entry, args, config, data, parts)
        self.mean, self.std = (
            torch.tensor(value, device=parts.device)[:, None, None]
            for value in (data.mean, data.std)
        )

    def __call__(self, batch: Batch) -> Tensor:
        latent = batch.latent if self.entry["target"] == "sample" else batch.mean
        if self.entry["normalize"] == "channel":
            latent = (self.data.scale.denormalize(latent) - self.mean) / self.std
        return latent_tokens(latent, self.config.patch)


class EncoderTokens(Target):
    """REPA: the patch tokens of a frozen image encoder that others have trained."""

    name, title, paper = "repa", "REPA", "arXiv:2410.06940"
    flags = ("repa_encoder", "encoder_weights", "repa_side", "repa_from")

    @staticmethod
    def add_flags(add: Callable[..., Any]) -> None:
        add(
            "--repa-encoder",
            "--enc-type",
            metavar="NAME",
            help="repa: any of timm's, or REPA's spelling (default: dinov2-b)",
        )
        add(
            "--encoder-weights",
            type=Path,
            metavar="FILE",
            help="repa: weights of timm's form (default: the hub's)",
        )
        add(
            "--repa-side",
            type=int,
            metavar="N",
            help="repa: pixels a side that the encoder sees (default: as stored features, else REPA's, 224 for images of 256, "
            "never less than 224)",
        )
        add(
            "--repa-from",
            choices=("auto", "images", "features"),
            help="repa: encode the cache's images in every step, or read features stored ahead of time "
            "(default: auto: features where the cache has this encoder's)",
        )

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        return Defaults(min(8, max(1, 2 * depth // 3)), 0.5, 3, 2048)

    @staticmethod
    def plan(args: argparse.Namespace, config: SiTConfig, data: Data) -> dict:
        given = "dinov2-b" if args.repa_encoder is None else args.repa_encoder
        try:
            encoder, (width, side) = (
                canonical_name(given),
                describe_encoder(given, data.resolution, args.repa_side),
            )
        except FieldError as error:
            raise TargetError(f"--repa-encoder {error.reason}") from None
        grid = config.latent_size // config.patch
        stored = [
            folder
            for folder, told in (data.features or {}).items()
            if (told["encoder"], told["tokens_side"]) == (encoder, grid)
            and args.repa_side in (None, told["side"])
        ]
        if len(stored) > 1:
            sides = " ".join(str(data.features[folder]["side"]) for folder in stored)
            raise TargetError(
                f"--repa-side: the cache holds features of {encoder} at {sides} pixels: name one of them"
            )
        where = args.repa_from or "auto"
        if where == "features" and not stored:
            raise TargetError(
                f"--repa-from features: the cache holds none of {encoder} on a grid of {grid} x {grid}: make them with "
                f"python -m preprocessing.encode_features CACHE --encoder {given} --tokens-side {grid}"
                + f" --side {args.repa_side}"
                * (args.repa_side is not None)
            )
        source = f"features/{stored[0]}" if stored and where != "images" else "images"
        if source == "images" and not data.images:
            raise TargetError(
                "--align repa needs images and the cache keeps none: give the command that made it (encode_latents or "
                "import_repa) again, with --keep-images"
            )
        if source != "images":
            side = data.features[stored[0]]["side"]
        return {"out": width, "encoder": encoder, "side": side, "from": source}

    @staticmethod
    def settle(args: argparse.Namespace, entry: dict) -> None:
        args.repa_from = args.repa_from or ("images" if entry["from"] == "images" else "features")
        args.repa_side = entry["side"] if args.repa_side is None else args.repa_side

    def __init__(
        self, entry: dict, args: argparse.Namespace, config: SiTConfig, data: Data, parts: Parts
    ):
        super().__init__(entry, args, config, data, parts)
        self.encoder, grid = None, config.latent_size // config.patch
        if entry["from"] != "images" and not args.encoder_weights:
            return
        try:
            encoder = Encoder(
                entry["encoder"],
                data.resolution,
                grid,
                args.encoder_weights,
                device=parts.device,
                side=entry["side"],
            )
        except FieldError as error:
            flag = "--encoder-weights" if error.field == "weights" else "--repa-encoder"
            raise TargetError(f"{flag} {error.reason}") from None
        if entry["from"] == "images":
            self.encoder = encoder
            if parts.compile:
                self.encoder.compile()
        elif encoder.fingerprint != self.identity["fingerprint"]:
            raise TargetError(
                f"--encoder-weights {args.encoder_weights}: the cache's {entry['from']} were made with other weights of "
                f"{entry['encoder']}; --repa-from images takes these"
            )

    def __call__(self, batch: Batch) -> Tensor:
        return batch.extra.float() if self.encoder is None else self.encoder(batch.extra)

    @property
    def extra(self) -> str | None:
        return self.entry["from"]

    @property
    def identity(self) -> dict:
        stored = self.data.features or {}
        folder = self.entry["from"].removeprefix("features/")
        return {
            "fingerprint": self.encoder.fingerprint
            if self.encoder
            else stored[folder]["fingerprint"]
        }

    @staticmethod
    def cost(entry: dict, config: SiTConfig, data: Data) -> tuple[int, int]:
        return (
            encoder_cost(entry["encoder"], data.resolution, entry["side"])
            if entry["from"] == "images"
            else (0, 0)
        )


class Teacher(Target):
    """SRA: a later block of the run's own average, which sees less noise (arXiv:2505.02831, sec. 3)."""

    name, title, paper = "sra", "SRA", "arXiv:2505.02831"
    flags = ("sra_teacher_block", "sra_t_max")

    @staticmethod
    def add_flags(add: Callable[..., Any]) -> None:
        add(
            "--sra-teacher-block",
            type=int,
            metavar="K",
            help="sra: block of the average, counted from 1 (default: three quarters of the depth, 20 for XL)",
        )
        add(
            "--sra-t-max",
            type=float,
            metavar="X",
            help="sra: the average sees t - X u, u uniform on [0, 1], not below 0 (default: 0.2)",
        )

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str) -> Defaults:
        block = 8 if "-XL/" in model else max(1, round(depth / 4))
        return Defaults(block, 0.5 if loss == "cosine" else 0.2, 2, 2 * width)

    @staticmethod
    def plan(args: argparse.Namespace, config: SiTConfig, data: Data) -> dict:
        usual = 20 if "-XL/" in args.model else round(3 * config.depth / 4)
        block = usual if args.sra_teacher_block is None else args.sra_teacher_block
        t_max = 0.2 if args.sra_t_max is None else args.sra_t_max
        if not 1 <= block <= config.depth:
            raise TargetError(
                f"--sra-teacher-block {block}: {args.model} has blocks 1 to {config.depth}"
            )
        if not 0 <= t_max <= 1:
            raise TargetError(f"--sra-t-max {t_max} is not a number from 0 to 1")
        return {"out": config.width, "teacher_block": block, "t_max": t_max}

    def __init__(
        self, entry: dict, args: argparse.Namespace, config: SiTConfig, data: Data, parts: Parts
    ):
        super().__init__(entry, args, config, data, parts)
        self.features = torch.compile(parts.ema.features) if parts.compile else parts.ema.features

    def __call__(self, batch: Batch) -> Tensor:
        block = self.entry["teacher_block"]
        t = (batch.t - self.entry["t_max"] * batch.u).clamp(0, 1)
        with self.parts.autocast():
            tokens = self.features(
                self.parts.noised(batch.latent, batch.noise, t), t, batch.labels, (block,)
            )[block]
        return tokens.float()

    @staticmethod
    def cost(entry: dict, config: SiTConfig, data: Data) -> tuple[int, int]:
        return 0, backbone_flops(config, entry["teacher_block"])


TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (Latents, EncoderTokens, Teacher)
}
