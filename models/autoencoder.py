"""The frozen VAE: images <-> latents. The only place that knows its scale and shift.

Moments are the posterior's mean and standard deviation as the VAE gives them; a latent is normalised, what the model sees:
latent = (sample - shift) * scale. B batch, C latent channels, h w latent side, H W image side.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
DECODE_AT_ONCE = 16


@lru_cache(
    maxsize=16
)  # a copy to a GPU waits for it, and there is one normalisation a training step
def _by_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


@dataclass(frozen=True)
class LatentScale:
    """latent = (x - shift) * scale, with x (B, C, h, w) in the VAE's own units. Each is one number, or one for each channel."""

    scale: float | Sequence[float]
    shift: float | Sequence[float] = 0.0

    def _both(self, x: Tensor) -> tuple[float | Tensor, float | Tensor]:
        scale, shift = (
            _by_channel(tuple(value), x.device, x.dtype) if isinstance(value, Sequence) else value
            for value in (self.scale, self.shift)
        )
        return scale, shift

    def normalize(self, x: Tensor) -> Tensor:
        """The VAE's units -> what the model sees."""
        scale, shift = self._both(x)
        return (x - shift) * scale

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of normalize."""
        scale, shift = self._both(latent)
        return latent / scale + shift

    def mean(self, moments: Tensor) -> Tensor:
        """The latent of the posterior's mean: moments (B, 2C, h, w) -> (B, C, h, w), float32."""
        return self.normalize(moments.float().chunk(2, 1)[0])

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A latent drawn from the posterior with the given standard normal noise (B, C, h, w), float32."""
        mean, std = moments.float().chunk(2, 1)
        return self.normalize(mean + std * noise)


def read_latent_scale(config: Mapping[str, Any]) -> LatentScale:
    """What an AutoencoderKL's config says: scaling_factor and shift_factor, or scaling_factor with latents_mean and latents_std
    by channel, which diffusers' SDXL pipelines read as latent = (x - mean) * scaling_factor / std; either of the two alone they
    ignore. Raises ValueError.
    """
    factor, shift, channels = (
        config["scaling_factor"],
        config.get("shift_factor"),
        config["latent_channels"],
    )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return LatentScale(factor, shift or 0.0)
    if shift:
        raise ValueError(
            "its config has both shift_factor and latents_mean, and which of them is meant is not known"
        )
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(
            f"latents_mean and latents_std of its config are no {channels} numbers each, or not above 0"
        )
    return LatentScale(tuple(factor / value for value in std), tuple(mean))


class Autoencoder:
    """A diffusers AutoencoderKL, frozen and in eval mode, by hub id or folder. Raises FileNotFoundError if it is neither,
    or not whole.
    """

    def __init__(self, name: str = DEFAULT_VAE, device: torch.device | str = "cpu"):
        from diffusers import (
            AutoencoderKL,
        )  # seconds to import, and training without previews never needs it

        folder = Path(name)
        if folder.exists() and not (folder / "config.json").exists():
            raise FileNotFoundError(f"--vae {name} is no diffusers folder: config.json is missing")
        if not folder.exists() and (
            folder.is_absolute() or name.startswith(".") or name.count("/") != 1
        ):
            raise FileNotFoundError(
                f"--vae {name}: there is no such folder, seen from {Path.cwd()}"
            )
        try:
            vae, loaded = AutoencoderKL.from_pretrained(name, output_loading_info=True)
            written_for = AutoencoderKL.load_config(name).get("_class_name", "AutoencoderKL")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"--vae {name} cannot be loaded ({reason}): fetch it where there is a network with 'hf download {name} "
                "--local-dir FOLDER', then pass --vae FOLDER"
            ) from None
        if written_for != "AutoencoderKL":  # of which diffusers would take what fits
            raise FileNotFoundError(
                f"--vae {name} is diffusers' {written_for}: an AutoencoderKL is needed"
            )
        if loaded["missing_keys"]:  # which diffusers would make up
            raise FileNotFoundError(
                f"--vae {name} lacks weights of its config, {min(loaded['missing_keys'])} for one"
            )
        try:
            self.scale = read_latent_scale(vae.config)
        except ValueError as error:
            raise FileNotFoundError(f"--vae {name}: {error}") from None
        self.name = name
        self.vae = vae.float().eval().requires_grad_(False).to(device)
        self.channels = vae.config.latent_channels
        self.downsampling_factor = 2 ** (
            len(vae.config.block_out_channels) - 1
        )  # image side / latent side

    def fingerprint(self) -> str:
        """sha256 over every parameter's name, shape and float32 bytes, and over scale and shift."""
        digest = hashlib.sha256(f"{self.scale.scale!r} {self.scale.shift!r}".encode())
        for key, value in sorted(self.vae.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> moments (B, 2C, h, w) float32. The VAE sees them in [-1, 1]."""
        assert images.dtype == torch.uint8, images.dtype
        posterior = self.vae.encode(images.to(self.vae.device).float() / 127.5 - 1).latent_dist
        return torch.cat((posterior.mean, posterior.std), 1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) uint8, rounded, not truncated. A few at a time: at 512 pixels one image
        takes a gigabyte of activations.
        """
        parts = [
            self.vae.decode(part).sample
            for part in self.scale.denormalize(latent.float()).split(DECODE_AT_ONCE)
        ]
        return (torch.cat(parts) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
