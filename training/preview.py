"""Draw sample grids of the EMA during training."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from common.cli import UserError
from common.image_grid import draw_labelled_grid, save_png
from latents.manifest import Manifest
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.labels import TrainedLabels
from models.sit import SiT
from sampling.recipe import Recipe
from training.config import ObjectiveConfig


class Preview:
    """Draws samples with the same noise and labels at every step, so that only the model changes.

    Args:
        vae: Decodes the samples.
        class_names: Names of all classes.
        trained_labels: Labels that the network is trained on. Up to `num_rows` of the trained
            classes are shown, evenly spaced. Without the null class, guidance is disabled.
        cfg_scale: Guidance scale.
        objective: The denoising objective that the network is trained on.
        seed: Seed of the initial noise.
    """

    num_rows = 10
    num_columns = 8
    num_steps = 50

    def __init__(
        self,
        vae: Autoencoder,
        class_names: list[str],
        trained_labels: TrainedLabels,
        cfg_scale: float,
        objective: ObjectiveConfig,
        seed: int,
    ):
        self.vae = vae
        trained_classes = torch.tensor(trained_labels.list_classes(len(class_names)))
        num_rows = min(self.num_rows, len(trained_classes))
        rows = torch.linspace(0, len(trained_classes) - 1, num_rows).round().long()
        classes = trained_classes[rows]
        self.row_names = [class_names[k] for k in classes]
        self.recipe = Recipe(
            mode="ode",
            num_steps=self.num_steps,
            cfg_scale=cfg_scale if trained_labels.has_null_class else 1.0,
            seed=seed,
            path_type=objective.path_type,
            prediction=objective.prediction,
            explicit_labels=classes.repeat_interleave(self.num_columns),
        )

    def draw(self, ema: SiT, path: Path, title: str) -> None:
        """Sample a grid and write it as a PNG.

        Args:
            ema: The EMA of the network.
            path: File to write.
            title: Start of the title; the sampler's settings are appended.
        """
        save_png(self._render(ema, self.recipe, title), path)

    def try_out(self, ema: SiT) -> None:
        """Sample a grid with a single step and discard it, to detect errors."""
        self._render(ema, replace(self.recipe, num_steps=1), "trial")

    def _render(self, ema: SiT, recipe: Recipe, title: str) -> Image.Image:
        num_images = len(self.row_names) * self.num_columns
        index = torch.arange(num_images, device=self.vae.vae.device)
        images = self.vae.decode(recipe.sample_latents(ema, index))
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        rows = pixels.reshape(len(self.row_names), self.num_columns, *pixels.shape[1:])
        subtitle = f"Euler {recipe.num_steps} · guidance {recipe.cfg_scale:g}"
        return draw_labelled_grid(list(zip(self.row_names, rows)), f"{title} · {subtitle}")


def preview_path(folder: Path, step: int, suffix: str) -> Path:
    """Return the file of a run's preview; the suffix identifies the EMA."""
    return folder / "samples" / f"{step:07d}{suffix}.png"


def load_vae(name: str | None, manifest: Manifest, device: torch.device) -> Autoencoder:
    """Load the VAE that decodes samples: `name`, or the one that created the cache.

    Raises:
        UserError: The VAE cannot be loaded, or is not the one that created the cache.
    """
    name = name or manifest.vae
    try:
        vae = Autoencoder(name, device)
    except FieldError as error:
        raise UserError(
            f"--vae {error.reason}; or disable previews and evaluation: --sampling-steps 0 "
            "--eval-every 0"
        ) from None
    if vae.fingerprint() != manifest.vae_fingerprint:
        raise UserError(
            f"--vae {name} is not the VAE that created the cache ({manifest.vae}): the weights "
            "differ and colours would be wrong; pass that VAE"
        )
    return vae
