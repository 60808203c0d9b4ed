"""A frozen timm image encoder, used as in REPA (Yu et al. 2024, arXiv:2410.06940).

Input size: For a network with patch size 14, REPA resizes images of 256 pixels to 224, so that one
token covers 16 pixels of the image. For other networks, REPA does not resize images. Here, the
input side S is 224 R / 256 with patch size 14 and R otherwise, but at least 224, because networks
that were trained on photographs perform poorly on thumbnails. S is rounded to a multiple of the
patch size, or of the stride of a convolutional network. A network with a fixed input size uses that
size.

Shapes: B batch, R image side, S input side of the network in pixels, G side of the network's token
grid, T side of the requested token grid, D width.
"""

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import FieldError
from models.repa_encoders import REPA_ENCODERS
from models.weights import (
    TimmNetwork,
    create_network,
    format_exception,
    load_network,
    timm_name,
    weights_fingerprint,
)

MIN_SIDE = 224
# Activations of larger batches exceed the CPU caches, which doubles the time of a convolutional
# network.
CPU_BATCH_SIZE = 4


class TokenGridError(ValueError):
    """The output of a network is not a square grid of tokens."""


class EncoderShape(NamedTuple):
    """Sizes of an encoder."""

    width: int  # D
    side: int  # S


class Encoder(nn.Module):
    """Maps images (B, 3, R, R) uint8 to patch tokens (B, T * T, D) float32 in row-major order.

    Class, register and distillation tokens are dropped. Images are normalized with the mean and
    standard deviation of the network, and resized bicubically without antialiasing as in REPA. The
    encoder is frozen and always in eval mode.

    Args:
        name: A key of ENCODER_ALIASES or REPA_ENCODERS, or a timm model name.
        resolution: Image side R.
        tokens_side: Side T of the token grid.
        weights: File with weights in timm's format, or the published file of an encoder of REPA.
            By default, timm downloads the weights.
        pretrained: Whether to load pretrained weights instead of random weights.
        device: Device of the network.
        dtype: Autocast dtype, regardless of any surrounding autocast. The default is bfloat16 on
            GPUs and float32 on the CPU.
        side: Input side S. The module docstring describes the default.

    Raises:
        FieldError: If the name, the side or the weights cannot be used.
    """

    mean: Tensor
    std: Tensor

    def __init__(  # noqa: PLR0913 - independent options, all but three optional
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
        import timm

        super().__init__()
        # Validate the options before downloading weights.
        self.width, self.side = describe_encoder(name, resolution, side)
        network = load_network(name, weights, pretrained)
        self.name = canonical_name(name)
        self.tokens_side = tokens_side
        is_on_cpu = torch.device(device).type == "cpu"
        self.dtype = dtype or (torch.float32 if is_on_cpu else torch.bfloat16)
        set_input_side(network, self.side)
        omits_final_norm = name in REPA_ENCODERS and not REPA_ENCODERS[name].has_final_norm
        if omits_final_norm:
            network.norm = nn.Identity()
        config = timm.data.resolve_data_config(model=network)
        mean = config["mean"]
        std = config["std"]
        self._settings = [timm_name(name), self.side, tokens_side, omits_final_norm, mean, std]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.network = network
        self.eval().requires_grad_(False).to(device)

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode, even if a module that contains the encoder switches to train mode."""
        return super().train(False)

    def compile_blocks(self) -> None:
        """Compile the repeated block once, or everything if the network does not repeat a block."""
        blocks = list(getattr(self.network, "blocks", ()))
        # The blocks of convolutional networks are stages, which differ from each other.
        is_repeated = len({type(block) for block in blocks}) == 1 and not isinstance(
            blocks[0], nn.Sequential
        )
        for module in blocks if is_repeated else [self]:
            module.compile(dynamic=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, R, R) uint8 to tokens (B, T * T, D) float32."""
        assert images.dtype == torch.uint8, images.dtype
        batch_size = len(images) if images.is_cuda else CPU_BATCH_SIZE
        return torch.cat([self._encode(batch) for batch in images.split(batch_size)])

    def _encode(self, images: Tensor) -> Tensor:
        x = (images / 255 - self.mean) / self.std
        if x.shape[-1] != self.side:
            x = F.interpolate(x, self.side, mode="bicubic")
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = patch_tokens(self.network, x)
        return resample_tokens(tokens.float(), self.tokens_side)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the weights and all settings that affect the tokens, except the dtype."""
        identity = json.dumps(self._settings) + weights_fingerprint(self.network)
        return hashlib.sha256(identity.encode()).hexdigest()


def describe_encoder(name: str, resolution: int, side: int | None = None) -> EncoderShape:
    """Return the sizes of an encoder without loading weights, in a fraction of a second.

    Arguments and errors are the same as for `Encoder`.
    """
    _, side, tokens = _run_without_weights(name, resolution, side)
    return EncoderShape(tokens.shape[-1], side)


def encoder_cost(name: str, resolution: int, side: int | None = None) -> tuple[int, int]:
    """Return the number of parameters and the forward FLOPs per image of an encoder.

    PyTorch counts the FLOPs of matrix products and convolutions, without loading weights.
    Arguments and errors are the same as for `Encoder`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network, _, _ = _run_without_weights(name, resolution, side)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return num_parameters, counter.get_total_flops()


def _run_without_weights(
    name: str, resolution: int, side: int | None
) -> tuple[TimmNetwork, int, Tensor]:
    """Build a network on the meta device, and run the network.

    Returns:
        The network, the input side S, and the patch tokens of one image (meta tensors).

    Raises:
        FieldError: If the network is unknown or does not support these options.
    """
    architecture = timm_name(name)
    try:
        with torch.device("meta"), torch.no_grad():
            network = create_network(name)
            network.eval().requires_grad_(False)
            side = choose_side(network, name, resolution, side)
            set_input_side(network, side)
            return network, side, patch_tokens(network, torch.empty(1, 3, side, side))
    except FieldError:
        raise
    except TokenGridError as error:
        reason = f"{name} does not output a square grid of patch tokens: {error}"
    except Exception as error:  # timm's model families raise exceptions of many types
        cause = format_exception(error)
        reason = f"{name}: timm cannot run {architecture} without weights ({cause})"
    raise FieldError("encoder", reason)


def canonical_name(name: str) -> str:
    """Return the name that all aliases of an encoder share.

    This is timm's name, or REPA's name if REPA's tokens differ from those of the timm network.

    Raises:
        FieldError: If timm has no such model.
    """
    if name in REPA_ENCODERS and REPA_ENCODERS[name].differs_from_timm:
        return name
    return timm_name(name)


def choose_side(network: TimmNetwork, name: str, resolution: int, side: int | None) -> int:
    """Return the input side S, which is `side`, or the default if `side` is None.

    Raises:
        FieldError: If the network cannot process inputs of this side.
    """
    pretrained_side = network.pretrained_cfg["input_size"][-1]
    stride = network.feature_info[-1]["reduction"]
    can_be_resized = hasattr(network, "set_input_size")
    is_fixed = network.pretrained_cfg["fixed_input_size"] and not can_be_resized
    if side is None and is_fixed:
        return pretrained_side
    if side is None:
        side_like_repa = resolution * 224 / 256 if stride == 14 else resolution
        return stride * round(max(side_like_repa, MIN_SIDE) / stride)
    if side < stride:
        requirement = f"inputs of at least {stride} pixels"
    elif is_fixed and side != pretrained_side:
        requirement = f"inputs of exactly {pretrained_side} pixels"
    elif can_be_resized and side % stride:
        requirement = f"an input side that is a multiple of {stride} pixels"
    else:
        return side
    raise FieldError("encoder", f"{name} requires {requirement}, not {side}")


def set_input_side(network: TimmNetwork, side: int) -> None:
    """Resize position embeddings in place with the timm function that REPA also uses."""
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(side, side))


def patch_tokens(network: TimmNetwork, x: Tensor) -> Tensor:
    """Return the patch tokens (B, G * G, D) of inputs (B, 3, S, S).

    timm's `forward_features` returns (B, N, D), (B, D, G, G) or (B, G, G, D), depending on the
    network. Tokens without a position in the image are dropped.

    Raises:
        TokenGridError: If the tokens are not a square grid.
    """
    features = network.forward_features(x)
    if not isinstance(features, Tensor):
        raise TokenGridError(f"the output is a {type(features).__name__}")
    if features.ndim == 4:
        is_channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        features = features.flatten(1, 2) if is_channels_last else features.flatten(2).mT
    else:
        features = features[:, getattr(network, "num_prefix_tokens", 0) :]
        if features.shape[1] == 1:  # a class token that timm does not report as a prefix
            raise TokenGridError("an image yields a single token")
    if features.ndim != 3 or math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
        shape = " x ".join(map(str, features.shape[1:]))
        raise TokenGridError(f"an image yields an array of {shape}")
    return features


def resample_tokens(tokens: Tensor, side: int) -> Tensor:
    """Resample a token grid (B, G * G, D) to (B, side * side, D), bilinearly.

    With antialiasing, every token contributes to a smaller grid. A grid of the requested size is
    returned unchanged.
    """
    grid = math.isqrt(tokens.shape[1])
    if grid == side:
        return tokens
    maps = tokens.mT.unflatten(2, (grid, grid))
    return F.interpolate(maps, (side, side), mode="bilinear", antialias=True).flatten(2).mT
