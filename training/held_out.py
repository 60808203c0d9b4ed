"""The denoising loss on images held out: at fixed times and with fixed noise, so that two runs, or two steps of one, are asked
the same questions.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.cli import UserError
from common.keyed_random import Purpose, normal
from interpolant import INTERPOLANTS
from latents.cache import CacheError, LatentCache, Manifest
from loss import training_losses
from models.autoencoder import LatentScale
from models.sit import SiT

TIMES = (
    0.1,
    0.3,
    0.5,
    0.7,
    0.9,
)  # the middles of five equal parts: their mean stands for a uniform t
SAME = (
    "class_names",
    "num_classes",
    "resolution",
    "latent_shape",
    "vae_fingerprint",
    "scale",
    "shift",
)
SEED = 0  # of noise and of the draw from the posterior, whatever the run's


class HeldOut:
    """The images of a latent cache, `count` of them, evenly spread, or all there are. Each process measures its share."""

    def __init__(self, root: Path, count: int, flag: str = "--eval-latents"):
        """Raises UserError."""
        try:
            self.cache = LatentCache(root)
        except CacheError as error:
            raise UserError(f"{flag}: {error}") from None
        self.root, self.count = root, min(count, len(self.cache))
        self.index = torch.arange(self.count) * len(self.cache) // self.count
        self.scale = LatentScale(self.cache.manifest.scale, self.cache.manifest.shift)

    def check(self, manifest: Manifest, flag: str = "--eval-latents") -> None:
        """Against that of what is trained on. Raises UserError."""
        different = [
            key for key in SAME if getattr(self.cache.manifest, key) != getattr(manifest, key)
        ]
        if different:
            raise UserError(
                f"{flag} {self.root} is not made as --data-dir was: {', '.join(different)} differ; encode it in the same way"
            )

    @property
    def identity(self) -> dict:
        """What decides the numbers besides the network."""
        digest = hashlib.sha256(
            json.dumps(self.cache.manifest.shards, sort_keys=True).encode()
        ).hexdigest()
        return {"latents_sha256": digest, "images": self.count, "times": list(TIMES)}

    @torch.no_grad()
    def measure(
        self,
        model: SiT,
        path_type: str,
        prediction: str,
        dtype: torch.dtype,
        size: int,
        rank: int,
        processes: int,
        gather_all: Callable[[Tensor], Tensor],
        look: Callable[[], None],
    ) -> dict[str, float]:
        """Mean over images and TIMES, and that of each time: {"held_out": ..., "held_out_0.1": ...}.

        The average is asked with the images' own classes, and its products are of `dtype`; `size` images at a time.
        gather_all stacks a tensor of every process; look is called by all between batches, and what it raises ends the work.
        """
        device, shape = model.pos_embed.device, tuple(self.cache.manifest.latent_shape)
        sums = torch.zeros(1, len(TIMES), dtype=torch.float64, device=device)

        def network(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict, dict]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return model(x, t, y), {}, {}

        for first in range(0, self.count, size * processes):
            begin = first + rank * size
            index = self.index[begin : begin + size]
            if len(index):
                moments, labels = (tensor.to(device) for tensor in self.cache.gather(index.numpy()))
                number = index.to(device)
                latent = self.scale.sample(
                    moments, normal(SEED, Purpose.POSTERIOR, number, shape).float()
                )
                for k, t in enumerate(TIMES):
                    noise = normal(SEED, Purpose.NOISE, number, shape, draw=k).float()
                    at = torch.full((len(index),), t, device=device)
                    terms = training_losses(
                        network, INTERPOLANTS[path_type], prediction, latent, labels, noise, at
                    )
                    sums[0, k] += terms.denoising.double().sum()
            look()
        means = (gather_all(sums).sum(0) / self.count).tolist()
        return {"held_out": sum(means) / len(means)} | {
            f"held_out_{t}": mean for t, mean in zip(TIMES, means)
        }
