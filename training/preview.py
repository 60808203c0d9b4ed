"""Draw sample grids of the EMA during training."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cli import UserError
from common.evenly_spaced import make_evenly_spaced_indices
from common.image_grid import draw_labelled_grid
from latents.cache import LatentCache
from latents.manifest import Manifest
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.labels import TrainedLabels
from models.sit import SiT
from sampling.recipe import Recipe
from training.config import ObjectiveConfig
from training.joint_work import exchange_status

Gather = Callable[[Tensor], Tensor]


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
        dtype: Dtype of the network's matrix products.
        rank: Rank of this process.
        num_processes: Number of processes, which share the images.

    Attributes:
        classes: The class of each row, (rows,) int64.
    """

    num_rows = 10
    num_columns = 8
    num_steps = 50
    max_batch_size = 16  # images per process, so that memory for training suffices

    def __init__(  # noqa: PLR0913 (a preview depends on all of these)
        self,
        vae: Autoencoder,
        class_names: list[str],
        trained_labels: TrainedLabels,
        cfg_scale: float,
        objective: ObjectiveConfig,
        seed: int,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        num_processes: int = 1,
    ):
        self.vae = vae
        self.dtype = dtype
        self.rank = rank
        self.num_processes = num_processes
        trained_classes = torch.tensor(trained_labels.list_classes(len(class_names)))
        rows = make_evenly_spaced_indices(len(trained_classes), self.num_rows)
        self.classes = trained_classes[rows]
        self.row_names = [class_names[k] for k in self.classes]
        self.recipe = Recipe(
            mode="ode",
            num_steps=self.num_steps,
            cfg_scale=cfg_scale if trained_labels.has_null_class else 1.0,
            seed=seed,
            path_type=objective.path_type,
            prediction=objective.prediction,
            explicit_labels=self.classes.repeat_interleave(self.num_columns),
        )

    def draw(self, ema: SiT, gather: Gather, title: str) -> Image.Image | None:
        """Return a grid of samples on the first process, else None. All processes must call this.

        Args:
            ema: The EMA of the network.
            gather: Concatenates a tensor of every process on the first one, in the order of the
                ranks.
            title: Start of the title; the sampler's settings are appended.

        Raises:
            JointWorkError: The work failed on another process.
        """
        return self._draw(ema, gather, self.recipe, title)

    def try_out(self, ema: SiT, gather: Gather) -> None:
        """Draw a grid with a single step and discard it, to detect errors.

        All processes must call this.
        """
        self._draw(ema, gather, replace(self.recipe, num_steps=1), "trial")

    def draw_real(self, cache: LatentCache, gather: Gather) -> Image.Image | None:
        """Return a grid of training images on the first process, else None.

        The images are decoded from the means of cached latents. The rows show the same classes as
        those of `draw`, with the first images of each class. All processes must call this.

        Args:
            cache: The latent cache.
            gather: The same as for `draw`.

        Raises:
            JointWorkError: The work failed on another process.
        """
        index_rows = [
            np.flatnonzero(cache.labels == k)[: self.num_columns] for k in self.classes.tolist()
        ]
        image_indices = np.concatenate(index_rows)

        def read_latents(index: Tensor) -> Tensor:
            # Indices that pad the last batch stand for the last image; `_decode` drops the results.
            padded = index.cpu().numpy().clip(max=len(image_indices) - 1)
            moments, _ = cache.gather(image_indices[padded])
            return self.vae.scale.mean(moments.to(index.device))

        images = self._decode(read_latents, len(image_indices), gather)
        if self.rank > 0:
            return None
        row_sizes = [len(indices) for indices in index_rows]
        return self._arrange(images, row_sizes, "training images, encoded and decoded by the VAE")

    def _draw(self, ema: SiT, gather: Gather, recipe: Recipe, title: str) -> Image.Image | None:
        images = self._sample(ema, gather, recipe)
        if self.rank > 0:
            return None
        subtitle = f"Euler {self.num_steps} · guidance {self.recipe.cfg_scale:g}"
        row_sizes = [self.num_columns] * len(self.row_names)
        return self._arrange(images, row_sizes, f"{title} · {subtitle}")

    def _sample(self, ema: SiT, gather: Gather, recipe: Recipe) -> Tensor:
        """Return all samples on the first process, (n, 3, H, W) uint8."""
        return self._decode(
            lambda index: recipe.sample_latents(ema, index, self.dtype),
            len(self.row_names) * self.num_columns,
            gather,
        )

    def _decode(
        self, make_latents: Callable[[Tensor], Tensor], num_images: int, gather: Gather
    ) -> Tensor:
        """Return all images on the first process, (n, 3, H, W) uint8.

        Each process makes and decodes one batch at a time.

        Args:
            make_latents: Returns the latents of images, given their indices.
            num_images: Number of images.
            gather: The same as for `draw`.
        """
        batch_size = min(self.max_batch_size, math.ceil(num_images / self.num_processes))
        parts = []
        for first in range(0, num_images, batch_size * self.num_processes):
            begin = first + self.rank * batch_size
            # The last batch may be padded with further images.
            index = torch.arange(begin, begin + batch_size, device=self.vae.vae.device)
            images = self.vae.decode(make_latents(index))
            exchange_status()
            parts.append(gather(images))
        return torch.cat(parts)[:num_images]

    def _arrange(self, images: Tensor, row_sizes: list[int], title: str) -> Image.Image:
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        rows = np.split(pixels, np.cumsum(row_sizes)[:-1])
        return draw_labelled_grid(list(zip(self.row_names, rows)), title)


def preview_path(folder: Path, step: int, suffix: str) -> Path:
    """Return the file of a run's preview; the suffix identifies the EMA."""
    return folder / "samples" / f"{step:07d}{suffix}.png"


def real_images_path(folder: Path) -> Path:
    """Return the file of the training images that previews are compared with."""
    return folder / "samples" / "real.png"


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
