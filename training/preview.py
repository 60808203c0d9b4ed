"""Pictures of the averaged model while it trains."""

import argparse
from pathlib import Path

import torch

from common.cli import UserError
from common.image_grid import draw_labelled_grid, save_png
from common.keyed_random import Purpose, normal
from interpolant import INTERPOLANTS, time_interval
from latents.cache import Manifest
from models.autoencoder import Autoencoder
from models.sit import SiT
from samplers import GuidedVelocity, VelocityModel, denoise, euler, ode_times


class Preview:
    """The same noise and labels at every preview, sampled from the EMA: what changes between two pictures is the model."""

    rows, columns, num_steps = 10, 8, 50

    def __init__(
        self, args: argparse.Namespace, manifest: Manifest, folder: Path, vae: Autoencoder
    ):
        self.vae, self.folder, self.cfg_scale, device = (
            vae,
            folder,
            args.preview_cfg_scale,
            vae.vae.device,
        )
        self.path, self.prediction = INTERPOLANTS[args.path_type], args.prediction
        rows = min(self.rows, manifest.num_classes)
        classes = torch.linspace(0, manifest.num_classes - 1, rows).round().long()
        self.names = [manifest.class_names[k] for k in classes]
        self.labels = classes.repeat_interleave(self.columns).to(device)
        index = torch.arange(len(self.labels), device=device)
        self.start = normal(
            args.seed, Purpose.INITIAL_NOISE, index, tuple(manifest.latent_shape)
        ).float()

    @torch.no_grad()
    def draw(self, ema: SiT, step: int, name: str = "") -> Path:
        """Euler ODE, then the VAE; returns the picture's path."""
        network, ends = (
            VelocityModel(ema, self.path, self.prediction),
            time_interval(self.path, self.prediction),
        )
        velocity = GuidedVelocity(network, self.labels, ema.config.num_classes, self.cfg_scale)
        times = ode_times(self.num_steps, ends)
        latents = euler(velocity, self.start, times)
        latents = denoise(velocity, self.path, latents, times[-1])
        images = self.vae.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
        rows = list(
            zip(self.names, images.reshape(len(self.names), self.columns, *images.shape[1:]))
        )
        path = preview_path(self.folder, step, name)
        title = f"EMA{name.replace('-ema', ' ')} at step {step:,} · Euler {self.num_steps} · guidance {self.cfg_scale:g}"
        save_png(draw_labelled_grid(rows, title), path)
        return path


def preview_path(folder: Path, step: int, name: str = "") -> Path:
    """Where a run's picture of a step goes; `name` tells averages apart."""
    return folder / "samples" / f"{step:07d}{name}.png"


def load_vae(name: str, manifest: Manifest, device: torch.device) -> Autoencoder:
    """The VAE that decodes, which must be the one that made the cache. Raises UserError."""
    try:
        vae = Autoencoder(name, device)
    except FileNotFoundError as error:
        raise UserError(
            f"{error}; or train without previews and evaluation: --sampling-steps 0 --eval-every 0"
        ) from None
    if vae.fingerprint() != manifest.vae_fingerprint:
        raise UserError(
            f"--vae {name} is not the VAE that made the cache ({manifest.vae}): its weights differ, so would the colours"
        )
    return vae
