"""The target of REPA: the patch tokens of a frozen image encoder."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from models.encoder import Encoder, canonical_name, describe_encoder, encoder_cost
from models.errors import FieldError
from models.sit import SiTConfig
from models.target import CacheInfo, Cost, Defaults, Plan, Target, TrainingInputs


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
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
        block = 8 if depth >= 24 else max(1, depth // 3)
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
