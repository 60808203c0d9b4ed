"""The target of REPA: the patch tokens of one or several frozen image encoders."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from models.encoder import Encoder, canonical_name, describe_encoder, encoder_cost
from models.encoder_settings import EncoderSettings, parse_sides, split_settings
from models.errors import FieldError
from models.sit import SiTConfig
from models.target import CacheInfo, Cost, Defaults, Plan, Target, TrainingInputs


def split_record(record: dict) -> list[dict]:
    """Return the recorded keys of each encoder.

    An entry in config.json has one value per key for a single encoder, and a list of values for
    several encoders.
    """
    keys = ("encoder", "side", "from", "fingerprint")
    if isinstance(record["encoder"], str):
        return [{key: record[key] for key in keys if key in record}]
    return [
        {key: record[key][i] for key in keys if key in record}
        for i in range(len(record["encoder"]))
    ]


def join_records(records: list[dict]) -> dict:
    """Return the keys of an entry in config.json; the inverse of `split_record`."""
    if len(records) == 1:
        return records[0]
    return {key: [record[key] for record in records] for key in records[0]}


class EncoderTokens(Target):
    """The target of REPA: the patch tokens of frozen, pretrained image encoders.

    As in REPA, each of several encoders has a head, and the loss is the mean over the encoders.
    Each head is named by the position of its encoder, such as "0".
    """

    name = "repa"
    title = "REPA"
    paper = "arXiv:2410.06940"
    Settings = EncoderSettings

    def __post_init__(self) -> None:
        self.records = split_record(self.record)
        all_settings = split_settings(self.settings)
        # An encoder whose tokens are stored is None.
        self.encoders = [
            self._load_encoder(record, settings.weights)
            for record, settings in zip(self.records, all_settings, strict=True)
        ]

    def _load_encoder(self, record: dict, weights: Path | None) -> Encoder | None:
        """Return an encoder, or None if its tokens are stored."""
        reads_images = record["from"] == "images"
        if not reads_images and not weights:
            return None
        encoder = Encoder(
            record["encoder"],
            self.cache.resolution,
            self.network.grid_size,
            weights,
            device=self.context.device,
            side=record["side"],
        )
        if reads_images:
            if self.context.compile:
                encoder.compile_blocks()
            return encoder
        if encoder.fingerprint != self._stored_fingerprint(record):
            raise FieldError(
                "weights",
                f"{weights} differs from the weights of {record['encoder']} with which "
                f"{record['from']} was computed; pass --repa-from images to use these weights",
            )
        return None

    def _stored_fingerprint(self, record: dict) -> str:
        folder = record["from"].removeprefix("features/")
        return self.cache.features[folder]["fingerprint"]

    @staticmethod
    def defaults(model: str, depth: int, width: int, loss: str | None) -> Defaults:
        block = 8 if depth >= 24 else max(1, depth // 3)
        return Defaults(block, weight=0.5, layers=3, hidden=2048)

    @staticmethod
    def plan(settings: EncoderSettings, network: SiTConfig, cache: CacheInfo) -> Plan:
        plans = [
            _plan_encoder(encoder_settings, network, cache)
            for encoder_settings in split_settings(settings)
        ]
        record = join_records([record for _, record in plans])
        if len(plans) == 1:
            return Plan(plans[0][0], record)
        return Plan({str(i): width for i, (width, _) in enumerate(plans)}, record)

    @staticmethod
    def restore(settings: EncoderSettings, record: dict) -> EncoderSettings:
        records = split_record(record)
        names = [canonical_name(name) for name in settings.encoder.split(",")]
        if names != [encoder["encoder"] for encoder in records]:
            return settings  # these settings cannot resume the run
        if settings.source == "auto":
            sources = [
                "images" if encoder["from"] == "images" else "features" for encoder in records
            ]
            settings = replace(settings, source=",".join(sources))
        if settings.side is None:
            sides = ",".join(str(encoder["side"]) for encoder in records)
            settings = replace(settings, side=parse_sides(sides))
        return settings

    @staticmethod
    def cost(record: dict, network: SiTConfig, cache: CacheInfo) -> Cost:
        costs = [
            encoder_cost(encoder["encoder"], cache.resolution, encoder["side"])
            for encoder in split_record(record)
            if encoder["from"] == "images"
        ]
        return Cost(sum(parameters for parameters, _ in costs), sum(flops for _, flops in costs))

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record["from"] for record in self.records))

    @property
    def identity(self) -> dict:
        fingerprints = [
            encoder.fingerprint if encoder else self._stored_fingerprint(record)
            for encoder, record in zip(self.encoders, self.records)
        ]
        return join_records([{"fingerprint": fingerprint} for fingerprint in fingerprints])

    def __call__(
        self, inputs: TrainingInputs, student_tokens: dict[int, Tensor]
    ) -> Tensor | dict[str, Tensor]:
        tokens = []
        for encoder, record in zip(self.encoders, self.records):
            images_or_features = inputs.cache_inputs[record["from"]]
            if encoder:
                tokens.append(encoder(images_or_features))
            else:
                tokens.append(images_or_features.float())
        if len(tokens) == 1:
            return tokens[0]
        return {str(i): encoder_tokens for i, encoder_tokens in enumerate(tokens)}


def _plan_encoder(
    settings: EncoderSettings, network: SiTConfig, cache: CacheInfo
) -> tuple[int, dict]:
    """Return the dimension of the tokens of one encoder, and its keys in config.json.

    Raises:
        FieldError: If a setting does not fit the network or the cache.
    """
    assert not isinstance(settings.side, str), settings.side
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
    return width, {"encoder": encoder_name, "side": side, "from": source}


def _find_features(
    settings: EncoderSettings, encoder_name: str, tokens_side: int, cache: CacheInfo
) -> str | None:
    """Return the folder of the stored features that fit the settings, or None.

    Raises:
        FieldError: If several folders fit, or if the settings require stored features and no folder
            fits.
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
