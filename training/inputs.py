"""Draw the random inputs of a training step: posterior samples, noise, timesteps, labels."""

import torch
from torch import Tensor

from common.keyed_random import KeyedRandom, Purpose
from dataset import CachedBatch
from interpolant import INTERPOLANTS, WEIGHTINGS, time_interval
from latents.manifest import Manifest
from models.autoencoder import LatentScale
from models.target import TrainingInputs
from training.config import ObjectiveConfig


class InputSampler:
    """Draws inputs that depend only on the seed and the position of an image in the stream.

    Args:
        seed: Seed of all training randomness.
        objective: The denoising objective.
        manifest: Manifest of the latent cache.
        device: Device of the step.
        compile: Whether to compile the computation, which otherwise dispatches about 110 small
            operations per step.
    """

    def __init__(
        self,
        seed: int,
        objective: ObjectiveConfig,
        manifest: Manifest,
        device: torch.device,
        compile: bool = False,
    ):
        self.interpolant = INTERPOLANTS[objective.path_type]
        self.weighting = WEIGHTINGS[objective.weighting]
        self.interval = time_interval(self.interpolant, objective.prediction)
        self.cfg_prob = objective.cfg_prob
        self.scale = LatentScale(manifest.scale, manifest.shift)
        self.null_class = manifest.num_classes
        latent_shape = tuple(manifest.latent_shape)
        self.random = KeyedRandom(
            seed,
            device,
            uniform={Purpose.TIMESTEP: (), Purpose.LABEL_DROP: (), Purpose.TARGET: ()},
            normal={Purpose.POSTERIOR: latent_shape, Purpose.NOISE: latent_shape},
        )
        self.compute = self._compute
        if compile:
            self.compute = torch.compile(self._compute, fullgraph=True, dynamic=False)

    def __call__(self, batch: CachedBatch) -> TrainingInputs:
        """Draw the inputs of a batch on the device."""
        tensors = self.compute(batch.stream_position, batch.moments, batch.labels)
        return TrainingInputs(**tensors, cache_inputs=batch.inputs)

    def _compute(self, position: Tensor, moments: Tensor, labels: Tensor) -> dict[str, Tensor]:
        values = self.random.draw(position)
        times = self.weighting(self.interpolant, values[Purpose.TIMESTEP], *self.interval)
        is_dropped = values[Purpose.LABEL_DROP] < self.cfg_prob
        return {
            "latents": self.scale.sample(moments, values[Purpose.POSTERIOR].float()),
            "labels": torch.where(is_dropped, self.null_class, labels),
            "classes": labels,
            "noise": values[Purpose.NOISE].float(),
            "t": times.float(),
            "posterior_mean": self.scale.mean(moments),
            "target_uniform": values[Purpose.TARGET].float(),
        }
