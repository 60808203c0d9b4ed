"""From a network to latents: what sample_ddp.py, and evaluation while training, both do to a batch of image numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from cli import UserError
from interpolant import PATHS
from keyed_random import Purpose, normal, uniform
from models.sit import SiT
from samplers import guided, ode, sde

LABELS = ("random", "balanced")


class Recipe(NamedTuple):
    """With a network and a number, all that decides a latent."""

    mode: str = "sde"
    heun: bool = False
    num_steps: int = 250
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    labels: str = "random"
    seed: int = 0
    path_type: str = "linear"

    @property
    def solver(self) -> str:
        """Its name in records and file names."""
        return "euler-maruyama" if self.mode == "sde" else "heun" if self.heun else "euler"

    def check(self, flag: str = "--") -> None:
        """Raises UserError, with `flag` before the names of the flags at fault."""
        if self.cfg_scale < 1:
            raise UserError(f"{flag}cfg-scale {self.cfg_scale} is below 1; 1 is no guidance")
        if self.guidance_low > self.guidance_high:
            raise UserError(f"{flag}guidance-low {self.guidance_low} lies above {flag}guidance-high {self.guidance_high}")
        if self.heun and self.mode == "sde":
            raise UserError(f"{flag}heun is an ODE solver: add {flag}mode ode")
        if self.mode == "sde" and self.num_steps < 2:
            raise UserError(
                f"{flag}num-steps 1 is too few for {flag}mode sde, "
                "which ends with one deterministic step after at least one other"
            )

    def classes(self, index: Tensor, num_classes: int) -> Tensor:
        """The class of each image: numbers (B,) -> (B,)."""
        if self.labels == "balanced":
            return index % num_classes
        return (uniform(self.seed, Purpose.CLASS, index) * num_classes).long().clamp(max=num_classes - 1)

    @torch.no_grad()
    def latents(self, model: SiT, index: Tensor) -> Tensor:
        """Numbers (B,) -> latents (B, C, H, W), float64, on the numbers' device."""
        config = model.config
        shape = (config.channels, config.latent_size, config.latent_size)
        start = normal(self.seed, Purpose.START, index, shape)
        labels = self.classes(index, config.num_classes)
        velocity = guided(model, labels, config.num_classes, self.cfg_scale, self.guidance_low, self.guidance_high)
        if self.mode == "ode":
            return ode(velocity, start, self.num_steps, self.heun)

        def brownian(step: int) -> Tensor:
            return normal(self.seed, Purpose.BROWNIAN, index, shape, draw=step)

        return sde(velocity, PATHS[self.path_type], start, self.num_steps, brownian)
