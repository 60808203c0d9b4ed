"""The frozen VAE that encodes images and decodes latents, and the normalization of latents.

Moments are the mean and standard deviation of the posterior of the VAE, without normalization. The
diffusion model uses normalized latents: latent = (sample - shift) * scale.
Shapes: B batch, C latent channels, h and w latent height and width, H and W image size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.lfs import describe_lfs_pointer
from models.errors import FieldError
from models.weights import weights_fingerprint

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
# Names that SiT, REPA and SRA use for their flag --vae.
VAE_ALIASES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": DEFAULT_VAE}
# Files of float32 weights that diffusers reads from a folder.
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_FILES = (
    WEIGHTS,
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin.index.json",
)
DECODE_BATCH_SIZE = 16  # decoding an image of 512 pixels takes about 1 GB of activations


# The cache avoids a copy to the GPU, which synchronizes with the device, in every training step.
@lru_cache(maxsize=16)
def _channel_tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


def _broadcastable(value: float | Sequence[float], x: Tensor) -> float | Tensor:
    """Convert a sequence with one number per channel to a tensor. Return a scalar unchanged."""
    if isinstance(value, Sequence):
        return _channel_tensor(tuple(value), x.device, x.dtype)
    return value


@dataclass(frozen=True)
class LatentScale:
    """Normalization of latents: latent = (x - shift) * scale for x (B, C, h, w) from the VAE.

    Args:
        scale: A scalar or one number per channel.
        shift: A scalar or one number per channel.
    """

    scale: float | Sequence[float]
    shift: float | Sequence[float] = 0.0

    def normalize(self, x: Tensor) -> Tensor:
        """Convert unscaled VAE latents to latents of the diffusion model."""
        return (x - _broadcastable(self.shift, x)) * _broadcastable(self.scale, x)

    def denormalize(self, latent: Tensor) -> Tensor:
        """Convert latents of the diffusion model to unscaled VAE latents."""
        return latent / _broadcastable(self.scale, latent) + _broadcastable(self.shift, latent)

    def mean(self, moments: Tensor) -> Tensor:
        """Return the normalized mean, (B, C, h, w) float32, given the moments, (B, 2C, h, w)."""
        mean, _ = moments.float().chunk(2, 1)
        return self.normalize(mean)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw a normalized latent from the posterior.

        Args:
            moments: Posterior means and standard deviations, (B, 2C, h, w).
            noise: Standard normal noise, (B, C, h, w).

        Returns:
            Latents, (B, C, h, w) float32.
        """
        mean, std = moments.float().chunk(2, 1)
        return self.normalize(mean + std * noise)


def read_latent_scale(config: Mapping[str, Any], name: str) -> LatentScale:
    """Return the normalization that the config of the AutoencoderKL `name` specifies.

    The config contains `scaling_factor`, and optionally either `shift_factor` or both
    `latents_mean` and `latents_std` per channel. If it contains both,
    latent = (x - mean) * scaling_factor / std, as in the SDXL pipelines of diffusers. These
    pipelines ignore one of the two if the other is missing.

    Raises:
        FieldError: If the config is ambiguous or contains invalid values.
    """
    factor = config["scaling_factor"]
    shift = config.get("shift_factor")
    mean = config.get("latents_mean")
    std = config.get("latents_std")
    channels = config["latent_channels"]
    if mean is None or std is None:
        return LatentScale(factor, shift or 0.0)
    if shift:
        raise FieldError(
            "vae", f"{name}: the config has both shift_factor and latents_mean; remove one of them"
        )
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise FieldError(
            "vae",
            f"{name}: latents_mean and latents_std in the config must each have {channels} "
            "numbers, and latents_std must be positive",
        )
    return LatentScale(tuple(factor / value for value in std), tuple(mean))


def is_hub_id(name: str) -> bool:
    """Return whether the name of a VAE is a hub id, such as DEFAULT_VAE, and not a folder."""
    path = Path(name)
    is_path = path.exists() or path.is_absolute() or name.startswith(".")
    return not is_path and name.count("/") == 1


def check_vae_folder(folder: Path) -> None:
    """Check that a folder contains the files of a VAE in the format of diffusers.

    Raises:
        FieldError: If a file is missing or is a Git LFS pointer.
    """
    if not folder.exists():
        raise FieldError("vae", f"{folder} does not exist (the working directory is {Path.cwd()})")
    if not folder.is_dir():
        raise FieldError(
            "vae", f"{folder} is a file; choose a diffusers folder with config.json and {WEIGHTS}"
        )
    if not (folder / "config.json").exists():
        if (folder / "vae" / "config.json").exists():
            raise FieldError(
                "vae", f"{folder} is a diffusers pipeline; choose its VAE, {folder / 'vae'}"
            )
        raise FieldError("vae", f"{folder} is not a diffusers folder: config.json is missing")
    for path in sorted(folder.iterdir()):
        if problem := describe_lfs_pointer(path):
            raise FieldError("vae", problem)
    if not any((folder / name).exists() for name in WEIGHTS_FILES):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise FieldError(
            "vae",
            f"{folder} contains {names} but not {WEIGHTS}, the float32 weights; add this file",
        )


class Autoencoder:
    """A frozen diffusers AutoencoderKL in eval mode.

    Args:
        name: Hub id, folder or key of VAE_ALIASES.
        device: Device of the weights.

    Raises:
        FieldError: If the VAE cannot be found, is incomplete, or is of another class.
    """

    def __init__(self, name: str = DEFAULT_VAE, device: torch.device | str = "cpu"):
        # Importing diffusers takes seconds, and training without previews does not need it.
        from diffusers import AutoencoderKL

        if not Path(name).exists():
            name = VAE_ALIASES.get(name, name)
        remedy = "download its files again"
        if is_hub_id(name):
            remedy = (
                "the working directory contains no such folder; with network access, run "
                f"'hf download {name} --local-dir FOLDER', then pass FOLDER"
            )
        else:
            check_vae_folder(Path(name))
        try:
            # With low_cpu_mem_usage, old versions of diffusers do not name the missing weights.
            vae, loading_info = AutoencoderKL.from_pretrained(
                name, output_loading_info=True, low_cpu_mem_usage=False
            )
            class_name = AutoencoderKL.load_config(name).get("_class_name", "AutoencoderKL")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FieldError("vae", f"{name} cannot be loaded ({reason}): {remedy}") from None
        # diffusers does not raise an error if the folder contains another class or if weights are
        # missing. It loads the matching weights and initializes the others at random.
        if class_name != "AutoencoderKL":
            raise FieldError("vae", f"{name} is of class {class_name}; choose an AutoencoderKL")
        if missing := loading_info["missing_keys"]:
            raise FieldError(
                "vae", f"{name} lacks weights that its config requires, for example {min(missing)}"
            )
        self.name = name
        self.scale = read_latent_scale(vae.config, name)
        self.vae = vae.float().eval().requires_grad_(False).to(device)
        self.channels = vae.config.latent_channels
        # Ratio of image size to latent size.
        self.downsampling_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def fingerprint(self) -> str:
        """Return the sha256 of all weights (names, shapes, values) and of the scale and shift."""
        return weights_fingerprint(self.vae, f"{self.scale.scale!r} {self.scale.shift!r}")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images, (B, 3, H, W) uint8, to moments, (B, 2C, h, w) float32."""
        assert images.dtype == torch.uint8, images.dtype
        pixels = images.to(self.vae.device).float() / 127.5 - 1
        posterior = self.vae.encode(pixels).latent_dist
        return torch.cat((posterior.mean, posterior.std), 1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents, (B, C, h, w), to images, (B, 3, H, W) uint8, rounded to nearest."""
        batches = self.scale.denormalize(latent.float()).split(DECODE_BATCH_SIZE)
        pixels = torch.cat([self.vae.decode(batch).sample for batch in batches])
        images = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        # Feature networks round differently with the channels_last strides that the VAE returns.
        return images.contiguous()
