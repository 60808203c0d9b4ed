"""Settings of the image encoders that compute the target of REPA."""

from dataclasses import dataclass, field
from pathlib import Path

from models.encoder import canonical_name
from models.errors import FieldError

AUTO_WEIGHTS = "auto"  # value of `weights` that downloads the weights of one of several encoders


def parse_sides(text: str) -> int | str:
    """Parse an input size. Several sizes, separated by commas, remain a string."""
    return int(text) if text.lstrip("-").isdecimal() else text


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of REPA. With several encoders, `split_settings` returns the settings of each."""

    encoder: str = field(
        default="dinov2-b",
        metadata={
            "help": "image encoder: a timm model name, or a name that REPA uses; several encoders, "
            "separated by commas, have a head each, and the loss is the mean over the encoders"
        },
    )
    weights: Path | None = field(
        default=None,
        metadata={
            "help": "file with the encoder's weights in timm's format, or the published file of an "
            "encoder of REPA (default: download from the hub); for several encoders, one file per "
            f"encoder, separated by commas; {AUTO_WEIGHTS} downloads the weights of an encoder"
        },
    )
    side: int | str | None = field(
        default=None,
        metadata={
            "help": "encoder input size in pixels; for several encoders, one size for all, or one "
            "per encoder separated by commas (default: that of the stored features, otherwise as "
            "in REPA (224 for 256-pixel images), with a minimum of 224)",
            "type": parse_sides,
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


def split_settings(settings: EncoderSettings) -> list[EncoderSettings]:
    """Return the settings of each encoder.

    Raises:
        FieldError: If an encoder is repeated, or if a setting has another number of values than
            there are encoders.
    """
    names = settings.encoder.split(",")
    if len(names) == 1:
        if isinstance(settings.side, str):
            raise FieldError(
                "side", f"{settings.side}: pass one number of pixels for {settings.encoder}"
            )
        return [settings]
    if "" in names:
        raise FieldError(
            "encoder", f"{settings.encoder}: pass names that are separated by single commas"
        )
    canonical_names = [canonical_name(name) for name in names]
    for i, name in enumerate(names):
        if canonical_names[i] in canonical_names[:i]:
            raise FieldError(
                "encoder", f"{settings.encoder}: {name} is repeated; pass each encoder once"
            )
    files = _split_weights(settings, len(names))
    sides = _split_sides(settings, len(names))
    sources = settings.source.split(",")
    if len(sources) == 1:
        sources *= len(names)
    return [EncoderSettings(*values) for values in zip(names, files, sides, sources, strict=True)]


def _split_weights(settings: EncoderSettings, count: int) -> list[Path | None]:
    """Return the weights file of each of `count` encoders; None if timm downloads the weights."""
    if settings.weights is None:
        return [None] * count
    paths = str(settings.weights).split(",")
    if len(paths) != count:
        raise FieldError(
            "weights",
            f"{settings.weights}: pass {count} files separated by commas, in the order of "
            f"{settings.encoder}, not {len(paths)}; {AUTO_WEIGHTS} downloads the weights of an "
            "encoder",
        )
    return [None if path == AUTO_WEIGHTS else Path(path) for path in paths]


def _split_sides(settings: EncoderSettings, count: int) -> list[int | None]:
    """Return the input size of each of `count` encoders in pixels; None selects the default."""
    if settings.side is None:
        return [None] * count
    parts = [parse_sides(part) for part in str(settings.side).split(",")]
    sides: list[int | None] = [part for part in parts if isinstance(part, int)]
    if len(parts) == 1:
        sides *= count
    if len(sides) != count:
        raise FieldError(
            "side",
            f"{settings.side}: pass one number of pixels for all encoders, or {count} numbers "
            f"separated by commas, in the order of {settings.encoder}",
        )
    return sides
