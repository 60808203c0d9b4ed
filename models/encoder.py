"""A frozen image encoder of timm's as REPA uses it (Yu et al. 2024, arXiv:2410.06940): images -> patch tokens.

The side rule. REPA gives a network of patch 14 224 pixels where the image has 256, so that 16 pixels are one token, and any
other network the image as it is. Here S = 224 R / 256 or R, but at least 224, as a network trained on photographs sees nothing
in a thumbnail; rounded to whole patches (to the stride of a convolutional network). A network that takes one size gets that.

B batch, R image side, S the network's side in pixels, G side of its grid of tokens, T of the grid asked for, D width.
"""

import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_ALIASES = {
    f"dinov2-{size[0]}": f"vit_{size}_patch14_dinov2.lvd142m"
    for size in ("small", "base", "large", "giant")
}
REPA = {
    **{
        f"dinov2-vit-{size[0]}": f"vit_{size}_patch14_dinov2.lvd142m"
        for size in ("small", "base", "large", "giant")
    },
    **{
        f"dinov2reg-vit-{size[0]}": f"vit_{size}_patch14_reg4_dinov2.lvd142m"
        for size in ("small", "base", "large", "giant")
    },
    "dinov1-vit-b": "vit_base_patch16_224.dino",
    "clip-vit-L": "vit_large_patch14_clip_quickgelu_224.openai",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "jepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
}  # REPA's spelling -> timm's network with the weights that REPA downloads
BEFORE_NORM = ("clip-vit-L", "mae-vit-l")  # REPA takes these two without their last layer norm
SMALLEST = 224
ON_CPU = 4  # images at once there: of more, the maps leave its caches, and a convolutional network takes twice as long


class EncoderError(ValueError):
    """A mistake in the choice of an encoder: one line, to be put after the flag that chose it."""


class Encoder(nn.Module):
    """Images (B, 3, R, R) uint8 -> tokens (B, T * T, D) float32, row by row; class, register and distillation tokens dropped.

    Images are normalised with the network's own mean and deviation and resized as REPA does, bicubic without antialiasing.
    `dtype` is autocast's, whatever surrounds it: bf16 on GPUs and float32 on the CPU unless told. It stays in eval mode.
    """

    def __init__(
        self,
        name: str,
        resolution: int,
        tokens_side: int,
        weights: Path | None = None,
        pretrained: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        side: int | None = None,
    ):
        """name: of SHORT, of REPA or timm's; resolution R; tokens_side T; weights: a file of timm's, else from the hub;
        side: S where the rule is not wanted. Raises EncoderError.
        """
        import timm

        super().__init__()
        self.width, self.side = describe_encoder(
            name, resolution, side
        )  # before anything is downloaded
        network = load_network(name, weights, pretrained)
        self.name = canonical_name(name)
        self.tokens_side = tokens_side
        self.dtype = dtype or (
            torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        )
        set_side(network, self.side)
        if name in BEFORE_NORM:
            network.norm = nn.Identity()
        config = timm.data.resolve_data_config(model=network)
        self._settings = [
            timm_name(name),
            self.side,
            tokens_side,
            name in BEFORE_NORM,
            config["mean"],
            config["std"],
        ]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key])[:, None, None], persistent=False)
        self.network = network
        self.eval().requires_grad_(False).to(device)

    def train(self, mode: bool = True) -> "Encoder":
        """Nothing changes: whoever holds it may call train() on everything it holds."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8, images.dtype
        few = len(images) if images.is_cuda else ON_CPU
        return torch.cat([self._encode(part) for part in images.split(few)])

    def _encode(self, images: Tensor) -> Tensor:
        x = (images / 255 - self.mean) / self.std
        if x.shape[-1] != self.side:
            x = F.interpolate(x, self.side, mode="bicubic")
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = patch_tokens(self.network, x)
        return resample(tokens.float(), self.tokens_side)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the weights and over all that decides about the tokens but the image and the dtype."""
        return hashlib.sha256(
            (json.dumps(self._settings) + weights_fingerprint(self.network)).encode()
        ).hexdigest()


def describe_encoder(name: str, resolution: int, side: int | None = None) -> tuple[int, int]:
    """(D, S) of the Encoder of this name, for images of `resolution` pixels, without weights: the network is made and run on
    the meta device, in a fraction of a second. Raises EncoderError for whatever is wrong with it but its weights.
    """
    import timm

    wanted = timm_name(name)
    try:
        with torch.device("meta"), torch.no_grad():
            network = timm.create_model(wanted, pretrained=False, num_classes=0)
            side = check_side(
                network, name, side_rule(network, resolution) if side is None else side
            )
            set_side(network, side)
            return patch_tokens(network.eval(), torch.empty(1, 3, side, side)).shape[-1], side
    except EncoderError:
        raise
    except NotSquare as error:
        raise EncoderError(f"{name} gives no square of patch tokens: {error}") from None
    except Exception as error:  # each family of timm's has its own
        raise EncoderError(
            f"{name}: timm cannot run {wanted} without weights ({first_line(error)})"
        ) from None


def encoder_cost(name: str, resolution: int, side: int | None = None) -> tuple[int, int]:
    """Parameters, and forward FLOPs of one image (matrix products and convolutions, as PyTorch's counter has them), without
    weights.
    """
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        network = (
            timm.create_model(timm_name(name), pretrained=False, num_classes=0)
            .eval()
            .requires_grad_(False)
        )
        side = describe_encoder(name, resolution, side)[1]
        set_side(network, side)
        with FlopCounterMode(display=False) as counter:
            patch_tokens(network, torch.empty(1, 3, side, side))
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()


def timm_name(name: str, others: Iterable[str] = ()) -> str:
    """timm's name of a network called by that name, by one of SHORT or of REPA. `others` are names that the caller knows, to be
    proposed. Raises EncoderError.
    """
    import timm

    if name.startswith("mocov3-"):
        raise EncoderError(
            f"{name}: timm has no MoCo v3 weights; of REPA's encoders it has {', '.join(REPA)}"
        )
    wanted = ENCODER_ALIASES.get(name) or REPA.get(name) or name
    stem, _, tag = wanted.partition(".")
    if not timm.is_model(stem) or (tag and not timm.is_model_pretrained(wanted)):
        known = [
            *ENCODER_ALIASES,
            *REPA,
            *others,
            *timm.list_models(),
            *(timm.list_models(f"{stem}.*", pretrained=True) if tag else ()),
        ]
        near = difflib.get_close_matches(name, known) or [*ENCODER_ALIASES, *others]
        raise EncoderError(f"{name} is no network that timm knows; near it: {', '.join(near)}")
    return wanted


def canonical_name(name: str) -> str:
    """One name for all spellings of an encoder. Raises EncoderError."""
    return name if name in BEFORE_NORM else timm_name(name)


def load_network(
    name: str, weights: Path | None = None, pretrained: bool = True, others: Iterable[str] = ()
) -> nn.Module:
    """timm's network without its classifier, in eval mode and frozen; weights: a file of timm's, else from the hub. Raises
    EncoderError, with `others` as in `architecture`.
    """
    import timm

    wanted = timm_name(name, others)
    if weights and not weights.exists():
        raise EncoderError(f"{name}: --encoder-weights {weights} does not exist")
    overlay = {"pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    try:
        with complete(), quiet_hub():
            network = timm.create_model(wanted, pretrained=pretrained, num_classes=0, **overlay)
    except Exception as error:  # the hub's client, safetensors and torch each have their own
        if weights:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise EncoderError(
                f"{name}: --encoder-weights {weights} does not fit {wanted} ({reason})"
            ) from None
        hub = timm.get_pretrained_cfg(wanted).hf_hub_id or wanted
        hub = hub if "/" in hub else f"timm/{hub}"
        raise EncoderError(
            f"{name}: timm cannot load {wanted} ({first_line(error)}): where there is a network, fetch it with "
            f"'hf download {hub} model.safetensors', then pass --encoder-weights and the path that it prints"
        ) from None
    return network.eval().requires_grad_(False)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub client's lines about its retries: what they end in is told."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def complete() -> Iterator[None]:
    """Raises ValueError at its end if timm has loaded a file that lacked weights of the network: without a classifier timm is
    not strict, leaves them random, and says so in its log only, where nobody looks.
    """
    messages, log = [], logging.getLogger("timm.models._builder")
    level, handler = log.level, logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    missing = [re.match(r"Missing keys \((.*?)[,)]", message) for message in messages]
    if any(missing):
        raise ValueError(
            f"the file is of another network, {next(filter(None, missing))[1]} is missing"
        )


def side_rule(network: nn.Module, resolution: int) -> int:
    """S for images of `resolution` pixels: see the module's docstring."""
    if one_size(network):
        return network.pretrained_cfg["input_size"][-1]
    stride = network.feature_info[-1]["reduction"]
    side = max(resolution * 224 / 256 if stride == 14 else resolution, SMALLEST)
    return stride * round(side / stride)


def check_side(network: nn.Module, name: str, side: int) -> int:
    """The side, if the network can have it. Raises EncoderError."""
    own, stride = network.pretrained_cfg["input_size"][-1], network.feature_info[-1]["reduction"]
    if side < stride:
        raise EncoderError(f"{name} takes images of {stride} pixels and more, not of {side}")
    if one_size(network) and side != own:
        raise EncoderError(f"{name} takes images of {own} pixels only, not of {side}")
    if hasattr(network, "set_input_size") and side % stride:
        raise EncoderError(f"{name} takes images of a multiple of {stride} pixels, not of {side}")
    return side


def one_size(network: nn.Module) -> bool:
    """Whether it has position embeddings, or the like, that timm cannot stretch."""
    return network.pretrained_cfg["fixed_input_size"] and not hasattr(network, "set_input_size")


def set_side(network: nn.Module, side: int) -> None:
    """In place; position embeddings are stretched as timm does (bicubic, antialiased), and REPA with timm's function."""
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(side, side))


class NotSquare(ValueError):
    """What a network gives is no square grid of tokens; the message says what it is."""


def patch_tokens(network: nn.Module, x: Tensor) -> Tensor:
    """What timm's forward_features gives, (B, N, D), (B, D, G, G) or (B, G, G, D), as (B, G * G, D) without the tokens that
    stand for no place. Raises NotSquare if there are no such.
    """
    features = network.forward_features(x)
    if not isinstance(features, Tensor):
        raise NotSquare(f"it gives a {type(features).__name__}")
    if features.ndim == 4:
        last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        features = features.flatten(1, 2) if last else features.flatten(2).mT
    else:
        features = features[:, getattr(network, "num_prefix_tokens", 0) :]
        if features.shape[1] == 1:  # a class token, whatever it is called
            raise NotSquare("an image becomes a single token")
    if features.ndim != 3 or math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
        raise NotSquare(f"an image becomes an array of {' x '.join(map(str, features.shape[1:]))}")
    return features


def resample(tokens: Tensor, side: int) -> Tensor:
    """(B, G * G, D) -> (B, side * side, D): as they are if the grids agree, else bilinear, with antialiasing, so that every
    token has its share where there are fewer after it than before it.
    """
    grid = math.isqrt(tokens.shape[1])
    if grid == side:
        return tokens
    maps = tokens.mT.unflatten(2, (grid, grid))
    return F.interpolate(maps, (side, side), mode="bilinear", antialias=True).flatten(2).mT


def weights_fingerprint(network: nn.Module) -> str:
    """sha256 over every parameter's and buffer's name, shape and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        if math.prod(value.shape):
            digest.update(value.cpu().contiguous().float().numpy())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
