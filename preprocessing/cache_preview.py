"""A picture to look at before a week of training: images, what the VAE makes of them, and the latents that are learned."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.image_grid import draw_labelled_grid
from models.autoencoder import Autoencoder

IMAGES = 8
POOR = 20.0  # dB; a VAE made for such images does better


def spread_indices(count: int) -> list[int]:
    """A few numbers from 0 to count - 1."""
    return np.unique(np.linspace(0, count - 1, IMAGES).round().astype(int)).tolist()


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, of two uint8 images."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def make_preview(
    names: list[str], images: list[Tensor | None], moments: list[Tensor], vae: Autoencoder
) -> tuple[Image.Image, str]:
    """images (3, S, S) uint8, or None, and their moments (1, 2C, h, w) -> a row each: the image, the reconstruction of the
    posterior's mean, the latent's first three channels from -3 to 3; and a line with the PSNR.
    """
    rows, decibels, latents = [], [], []
    for name, image, stored in zip(names, images, moments):
        latent = vae.scale.mean(stored.to(vae.vae.device))
        pictures, label = [vae.decode(latent)[0].permute(1, 2, 0).cpu()], name[:24]
        if image is not None:
            pictures.insert(0, image.permute(1, 2, 0))
            decibels.append(psnr(*pictures))
            label += f"  {decibels[-1]:.1f} dB"
        latents.append(latent.cpu().flatten())
        colours = ((latent[0, :3].cpu() + 3) / 6 * 255).round().clamp(0, 255).to(torch.uint8)
        colours = colours[[0, 1 % len(colours), 2 % len(colours)]].permute(1, 2, 0).numpy()
        side = pictures[0].shape[:2]
        enlarged = Image.fromarray(colours).resize(side, Image.Resampling.NEAREST)
        rows.append(
            (label, np.stack([*(picture.numpy() for picture in pictures), np.asarray(enlarged)]))
        )
    if not rows:
        return Image.new("RGB", (8, 8)), "none of the images tried could be used"
    line = f"{len(rows)} images"
    title = (
        "Image, reconstruction, latent -3 to 3" if decibels else "Reconstruction, latent -3 to 3"
    )
    std = torch.cat(latents).std().item()
    if decibels:
        mean = sum(decibels) / len(decibels)
        title += f" · {mean:.1f} dB"
        line += f", PSNR {mean:.1f} dB ({min(decibels):.1f} to {max(decibels):.1f})"
    else:
        line += " decoded, without others to compare them with"
    line += f", latents' std {std:.2f}"
    if decibels and sorted(decibels)[len(decibels) // 2] < POOR:
        line += f": poor; is {vae.name} the VAE for these?"
    return draw_labelled_grid(rows, title, 128), line
