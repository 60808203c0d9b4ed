"""The frozen VAE: images <-> latents. The only place that knows its scale and shift.

Moments are the posterior's mean and standard deviation as the VAE gives them; a latent is normalised, what the model sees:
latent = (sample - shift) * scale. B batch, C latent channels, h w latent side, H W image side."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
DECODE_AT_ONCE = 16


@dataclass(frozen=True)
class LatentScale:
    """latent = (x - shift) * scale, with x in the VAE's own units."""

    scale: float
    shift: float = 0.0

    def normalize(self, x: Tensor) -> Tensor:
        """The VAE's units -> what the model sees."""
        return (x - self.shift) * self.scale

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of normalize."""
        return latent / self.scale + self.shift

    def mean(self, moments: Tensor) -> Tensor:
        """The latent of the posterior's mean: moments (B, 2C, h, w) -> (B, C, h, w), float32."""
        return self.normalize(moments.float().chunk(2, 1)[0])

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A latent drawn from the posterior with the given standard normal noise (B, C, h, w), float32."""
        mean, std = moments.float().chunk(2, 1)
        return self.normalize(mean + std * noise)


class Autoencoder:
    """A diffusers AutoencoderKL, frozen and in eval mode, by hub id or folder. Raises FileNotFoundError if it is neither."""

    def __init__(self, name: str = DEFAULT_VAE, device: torch.device | str = "cpu"):
        from diffusers import AutoencoderKL  # seconds to import, and training without previews never needs it

        folder = Path(name)
        if folder.exists() and not (folder / "config.json").exists():
            raise FileNotFoundError(f"--vae {name} is no diffusers folder: config.json is missing")
        if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") != 1):
            raise FileNotFoundError(f"--vae {name}: there is no such folder, seen from {Path.cwd()}")
        try:
            vae = AutoencoderKL.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"--vae {name} cannot be loaded ({reason}): fetch it where there is a network with 'hf download {name} "
                "--local-dir FOLDER', then pass --vae FOLDER"
            ) from None
        self.name = name
        self.vae = vae.float().eval().requires_grad_(False).to(device)
        self.scale = LatentScale(vae.config.scaling_factor, vae.config.shift_factor or 0.0)
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # image side / latent side

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
        """Latents (B, C, h, w) -> images (B, H, W, 3) uint8, rounded, not truncated. A few at a time: at 512 pixels one image
        takes a gigabyte of activations."""
        parts = [self.vae.decode(part).sample for part in self.scale.denormalize(latent.float()).split(DECODE_AT_ONCE)]
        return (torch.cat(parts) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
