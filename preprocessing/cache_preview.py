"""Draw preview.png, which shows images, their reconstructions and their latents."""

import math
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from common.image_grid import draw_labelled_grid
from models.autoencoder import Autoencoder

NUM_IMAGES = 8
MIN_PSNR = 20.0  # in dB; a VAE that was trained on similar images has a higher PSNR


class PreviewRow(NamedTuple):
    """The data of one row of the preview.

    Attributes:
        name: The label of the row.
        image: (3, S, S) uint8, or None if the original image is not available.
        moments: Moments of the image, (1, 2C, h, w). The posterior mean is decoded.
    """

    name: str
    image: Tensor | None
    moments: Tensor


def compute_psnr(image: Tensor, reconstruction: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images, in dB."""
    error = (image.double() - reconstruction.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def draw_latent(latent: Tensor, factor: int) -> Tensor:
    """Return an RGB image of the first three channels of a latent.

    Args:
        latent: Normalized latent, (C, h, w). Values from -3 to 3 are mapped to 0 to 255.
        factor: Number of image pixels per latent pixel along each axis.

    Returns:
        (3, factor * h, factor * w) uint8. With fewer than three channels, channels are repeated.
    """
    channels = [k % len(latent) for k in range(3)]
    colors = ((latent[channels] + 3) / 6 * 255).round().clamp(0, 255).to(torch.uint8)
    return colors.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def draw_preview(rows: list[PreviewRow], vae: Autoencoder) -> tuple[Image.Image, str]:
    """Draw one row per image, with the image, its reconstruction and its latent.

    Args:
        rows: The images.
        vae: The VAE that is recorded in the cache.

    Returns:
        The preview, and a one-line summary with the PSNR and the standard deviation of the latents.
    """
    if not rows:
        return Image.new("RGB", (8, 8)), "none of the sampled images could be used"
    drawn_rows = []
    psnr_values = []
    latents = []
    for row in rows:
        latent = vae.scale.mean(row.moments.to(vae.vae.device))
        reconstruction = vae.decode(latent)[0].cpu()
        latents.append(latent[0].cpu())
        label = row.name[:24]
        columns = [reconstruction, draw_latent(latents[-1], vae.downsampling_factor)]
        if row.image is not None:
            columns.insert(0, row.image)
            psnr_values.append(compute_psnr(row.image, reconstruction))
            label += f"  {psnr_values[-1]:.1f} dB"
        drawn_rows.append((label, torch.stack(columns).permute(0, 2, 3, 1).numpy()))

    summary = f"{len(rows)} images"
    if psnr_values:
        mean = sum(psnr_values) / len(psnr_values)
        title = f"Image, reconstruction, latent -3 to 3 · {mean:.1f} dB"
        summary += f", PSNR {mean:.1f} dB ({min(psnr_values):.1f} to {max(psnr_values):.1f})"
    else:
        title = "Reconstruction, latent -3 to 3"
        summary += " decoded; there are no original images for comparison"
    summary += f", standard deviation of the latents {torch.stack(latents).std().item():.2f}"
    if psnr_values and sorted(psnr_values)[len(psnr_values) // 2] < MIN_PSNR:
        summary += f"; poor reconstructions: check that --vae {vae.name} fits these images"
    return draw_labelled_grid(drawn_rows, title, 128), summary
