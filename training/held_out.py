"""Measure the denoising loss on held-out images, at fixed timesteps and with fixed noise.

Two runs, or two steps of one run, are therefore compared on the same inputs.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.cli import UserError
from common.keyed_random import KeyedRandom, Purpose, normal
from interpolant import INTERPOLANTS, interpolate, regression_target
from latents.cache import CacheError, LatentCache
from latents.manifest import Manifest
from loss import denoising_loss
from models.autoencoder import LatentScale
from models.sit import SiT
from sampling.recipe import Recipe

# Midpoints of five equal intervals: their mean loss approximates that of uniform timesteps.
TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
CHUNK_SIZE = 256  # number of images whose moments are checked at a time
SEED = 0  # seed of the noise and the posterior samples, in every run
COMPARED_FIELDS = (
    "class_names",
    "num_classes",
    "resolution",
    "latent_shape",
    "vae_fingerprint",
    "scale",
    "shift",
)


class HeldOutLoss:
    """Measures the denoising loss on the images of a latent cache.

    Args:
        root: Folder or URL of the latent cache.
        num_images: Number of images to use, evenly spaced; all of them if the cache has fewer.

    Raises:
        UserError: The cache cannot be read, or an image to use has moments that are not finite.
    """

    def __init__(self, root: Path | str, num_images: int):
        try:
            self.cache = LatentCache(root)
        except CacheError as error:
            raise UserError(f"--eval-latents: {error}") from None
        self.root = root
        self.num_images = min(num_images, len(self.cache))
        self.image_index = torch.arange(self.num_images) * len(self.cache) // self.num_images
        for image_index in self.image_index.split(CHUNK_SIZE):
            if problem := self.cache.describe_non_finite_moments(image_index.numpy()):
                raise UserError(f"--eval-latents: {problem}")
        self.scale = LatentScale(self.cache.manifest.scale, self.cache.manifest.shift)

    def check_compatible(self, manifest: Manifest) -> None:
        """Raise UserError unless the cache was created like the training cache."""
        differing = [
            key
            for key in COMPARED_FIELDS
            if getattr(self.cache.manifest, key) != getattr(manifest, key)
        ]
        if differing:
            raise UserError(
                f"--eval-latents {self.root} differs from --data-dir in {', '.join(differing)}: "
                "encode both caches with the same settings"
            )

    @property
    def identity(self) -> dict:
        """Everything besides the network that determines the loss."""
        shards = json.dumps(self.cache.manifest.shards, sort_keys=True).encode()
        return {
            "latents_sha256": hashlib.sha256(shards).hexdigest(),
            "images": self.num_images,
            "times": list(TIMESTEPS),
        }

    @torch.no_grad()
    def measure(
        self,
        model: SiT,
        recipe: Recipe,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        share: tuple[int, int] = (0, 1),
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        check_stop: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Return the mean loss over images and timesteps, and the mean at each timestep.

        With several processes, the result is valid on the first one.

        The network is conditioned on the true classes of the images.

        Args:
            model: The network.
            recipe: Names the interpolant and the quantity that the network predicts.
            dtype: Autocast dtype.
            batch_size: Images per process and forward pass.
            share: Rank of this process and number of processes.
            gather: Concatenates a tensor of every process on the first one.
            check_stop: Called by all processes after each batch; an exception ends the work.

        Returns:
            {"held_out": ..., "held_out_0.1": ..., ...}.
        """
        rank, num_processes = share
        device = model.pos_embed.device
        sums = torch.zeros(1, len(TIMESTEPS), dtype=torch.float64, device=device)
        for first in range(0, self.num_images, batch_size * num_processes):
            begin = first + rank * batch_size
            image_index = self.image_index[begin : begin + batch_size]
            if len(image_index):
                sums += self._batch_sums(model, recipe, image_index, dtype)
            check_stop()
        means = (gather(sums).sum(0) / self.num_images).tolist()
        per_timestep = {f"held_out_{t}": mean for t, mean in zip(TIMESTEPS, means)}
        return {"held_out": sum(means) / len(means), **per_timestep}

    def _batch_sums(
        self, model: SiT, recipe: Recipe, image_index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return the sums of the losses of a batch, (1, number of timesteps), float64."""
        device = model.pos_embed.device
        shape = tuple(self.cache.manifest.latent_shape)
        path = INTERPOLANTS[recipe.path_type]
        moments, labels = (t.to(device) for t in self.cache.gather(image_index.numpy()))
        image_index = image_index.to(device)
        posterior_noise = normal(SEED, Purpose.POSTERIOR, image_index, shape)
        latents = self.scale.sample(moments, posterior_noise.float())
        random = KeyedRandom(SEED, device, normal={Purpose.NOISE: shape})
        sums = []
        for draw, timestep in enumerate(TIMESTEPS):
            noise = random.draw(image_index, draw)[Purpose.NOISE].float()
            t = torch.full((len(image_index),), timestep, device=device)
            x_t, velocity = interpolate(path, latents, noise, t)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                prediction = model(x_t, t, labels)
            target = regression_target(recipe.prediction, latents, noise, velocity)
            sums.append(denoising_loss(prediction, target).double().sum())
        return torch.stack(sums)[None]
