"""Draw preview.png: images, their reconstructions and latents, to check a cache before training."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.image_grid import draw_labelled_grid
from models.autoencoder import Autoencoder

NUM_IMAGES = 8
MIN_PSNR = 20.0  # dB; a VAE that was trained on similar images exceeds it


class PreviewRow(NamedTuple):
    """An image of a cache.

    Attributes:
        name: The label of the row.
        image: (3, S, S) uint8, or None if the original image is not available.
        moments: Moments of the image, (1, 2C, h, w). The posterior mean is decoded.
    """

    name: str
    image: Tensor | None
    moments: Tensor


def spread_indices(count: int) -> list[int]:
    """Return up to NUM_IMAGES different indices, evenly spaced from 0 to count - 1."""
    return np.unique(np.linspace(0, count - 1, NUM_IMAGES).round().astype(int)).tolist()


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images, in dB."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def draw_latent(latent: Tensor, factor: int) -> Tensor:
    """Return an RGB image of the first three channels of a latent.

    Args:
        latent: Normalized latent, (C, h, w). Values from -3 to 3 are mapped to 0 to 255.
        factor: Pixels of the image per latent pixel.

    Returns:
        (3, factor * h, factor * w) uint8. With fewer than three channels, channels are repeated.
    """
    channels = [k % len(latent) for k in range(3)]
    colors = ((latent[channels] + 3) / 6 * 255).round().clamp(0, 255).to(torch.uint8)
    return colors.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def draw_preview(rows: list[PreviewRow], vae: Autoencoder) -> tuple[Image.Image, str]:
    """Draw one row per image: the image, its reconstruction, and its latent.

    Args:
        rows: The images.
        vae: The VAE that is recorded in the cache.

    Returns:
        The preview, and one line of text with the PSNR and the standard deviation of the latents.
    """
    if not rows:
        return Image.new("RGB", (8, 8)), "none of the sampled images could be used"
    drawn_rows = []
    decibels = []
    latents = []
    for row in rows:
        latent = vae.scale.mean(row.moments.to(vae.vae.device))
        reconstruction = vae.decode(latent)[0].cpu()
        latents.append(latent[0].cpu())
        label = row.name[:24]
        columns = [reconstruction, draw_latent(latents[-1], vae.downsampling_factor)]
        if row.image is not None:
            columns.insert(0, row.image)
            decibels.append(psnr(row.image, reconstruction))
            label += f"  {decibels[-1]:.1f} dB"
        drawn_rows.append((label, torch.stack(columns).permute(0, 2, 3, 1).numpy()))

    summary = f"{len(rows)} images"
    if decibels:
        mean = sum(decibels) / len(decibels)
        title = f"Image, reconstruction, latent -3 to 3 · {mean:.1f} dB"
        summary += f", PSNR {mean:.1f} dB ({min(decibels):.1f} to {max(decibels):.1f})"
    else:
        title = "Reconstruction, latent -3 to 3"
        summary += " decoded, but no original images to compare with"
    summary += f", standard deviation of the latents {torch.stack(latents).std().item():.2f}"
    if decibels and sorted(decibels)[len(decibels) // 2] < MIN_PSNR:
        summary += f"; poor reconstructions: check that --vae {vae.name} fits these images"
    return draw_labelled_grid(drawn_rows, title, 128), summary
