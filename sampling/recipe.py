"""From a network to latents: what sample_ddp.py, and evaluation while training, both do to a batch of image numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import UserError
from common.keyed_random import Purpose, normal, uniform
from interpolant import INTERPOLANTS, time_interval
from models.sit import SiT
from samplers import (
    GuidedVelocity,
    VelocityModel,
    denoise,
    euler,
    euler_maruyama,
    guided_dopri5,
    heun,
    ode_times,
    sde_times,
)

STATE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Recipe(NamedTuple):
    """With a network and a number, all that decides a latent."""

    mode: str = "sde"
    heun: bool = False
    dopri5: bool = False
    num_steps: int = 250
    atol: float = 1e-6
    rtol: float = 1e-3
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    labels: str = "random"  # or balanced, or one class, or a file of a class for each number
    seed: int = 0
    path_type: str = "linear"
    prediction: str = "v"  # what the network gives: v, x or eps
    state_dtype: str = "float32"  # of x between two steps; REPA's is float64
    explicit_labels: Tensor | None = None  # (n,) what the file of labels holds

    @property
    def solver(self) -> str:
        """Its name in records and file names."""
        if self.mode == "sde":
            return "euler-maruyama"
        return "dopri5" if self.dopri5 else "heun" if self.heun else "euler"

    def validate(self, flag: str = "--") -> None:
        """Raises UserError, with `flag` before the names of the flags at fault."""
        if self.cfg_scale < 1:
            raise UserError(f"{flag}cfg-scale {self.cfg_scale} is below 1; 1 is no guidance")
        if self.guidance_low > self.guidance_high:
            raise UserError(
                f"{flag}guidance-low {self.guidance_low} lies above {flag}guidance-high {self.guidance_high}"
            )
        for name in ("heun", "dopri5"):
            if getattr(self, name) and self.mode == "sde":
                raise UserError(f"{flag}{name} is an ODE solver: add {flag}mode ode")
        if self.heun and self.dopri5:
            raise UserError(f"{flag}heun and {flag}dopri5 are two solvers: name one")
        if self.mode == "sde" and self.num_steps < 2:
            raise UserError(
                f"{flag}num-steps 1 is too few for {flag}mode sde, "
                "which ends with one deterministic step after at least one other"
            )

    def with_loaded_labels(self, num_classes: int, count: int) -> "Recipe":
        """The recipe, its labels read and found to be classes of the model. Raises UserError."""
        if self.labels in ("random", "balanced"):
            return self
        explicit_labels = None
        if self.labels.isdecimal() and len(self.labels) < 10:
            given = np.array([int(self.labels)])
        else:
            given = load_labels(Path(self.labels))
            explicit_labels = torch.from_numpy(given)
            if len(given) < count:
                raise UserError(
                    f"--labels {self.labels} holds {len(given):,} classes, --num-fid-samples asks for {count:,}"
                )
        wrong = given[(given < 0) | (given >= num_classes)]
        if len(wrong):
            raise UserError(
                f"--labels {self.labels}: {wrong[0]} is no class; the model has 0 to {num_classes - 1}"
            )
        return self._replace(explicit_labels=explicit_labels)

    def compute_labels(self, index: Tensor, num_classes: int) -> Tensor:
        """The class of each image: numbers (B,) -> (B,)."""
        if self.explicit_labels is not None:  # a last batch is padded with numbers beyond the end
            return self.explicit_labels.to(index.device)[
                index.clamp(max=len(self.explicit_labels) - 1)
            ]
        if self.labels.isdecimal():
            return torch.full_like(index, int(self.labels))
        if self.labels == "balanced":
            return index % num_classes
        return (
            (uniform(self.seed, Purpose.CLASS, index) * num_classes)
            .long()
            .clamp(max=num_classes - 1)
        )

    @torch.no_grad()
    def sample_latents(
        self,
        model: SiT,
        index: Tensor,
        dtype: torch.dtype = torch.float32,
        check: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Numbers (B,) -> latents (B, C, H, W), of the state's dtype, on the numbers' device.

        dtype: of the network's products. check: called before each evaluation of the network; what it raises ends the work.
        """
        config = model.config
        shape = (config.channels, config.latent_size, config.latent_size)
        start = normal(self.seed, Purpose.INITIAL_NOISE, index, shape).to(
            STATE_DTYPES[self.state_dtype]
        )
        labels = self.compute_labels(index, config.num_classes)

        interpolant = INTERPOLANTS[self.path_type]
        interval = time_interval(interpolant, self.prediction)
        velocity = GuidedVelocity(
            VelocityModel(model, interpolant, self.prediction, dtype, check),
            labels,
            config.num_classes,
            self.cfg_scale,
            self.guidance_low,
            self.guidance_high,
        )
        if self.dopri5:
            t_min, t_max = interval
            x, _ = guided_dopri5(velocity, start, self.atol, self.rtol, t_max, t_min)
            return denoise(velocity, interpolant, x, t_min)
        if self.mode == "ode":
            times = ode_times(self.num_steps, interval)
            solver = heun if self.heun else euler
            x = solver(velocity, start, times)
            return denoise(velocity, interpolant, x, times[-1])

        def brownian(step: int) -> Tensor:
            return normal(self.seed, Purpose.BROWNIAN, index, shape, draw=step)

        times = sde_times(self.num_steps, interval)
        x = euler_maruyama(velocity, interpolant, start, times, brownian)
        return denoise(velocity, interpolant, x, times[-1])


def cast_matmul_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the weights of products in the dtype that autocast would give them anew in every evaluation: the same numbers."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)


def load_labels(path: Path) -> np.ndarray:
    """A class for each image: .npy, .npz (arr_1, as samples have it), .json (a list) or text with white space between.
    (n,) int64. Raises UserError.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path)
        elif path.suffix == ".npz":
            with np.load(path) as content:
                values = content["arr_1"]
        elif path.suffix == ".json":
            values = np.array(json.loads(path.read_text()))
        else:
            values = np.array([int(word) for word in path.read_text().split()])
        if (
            values.ndim != 1
            or not len(values)
            or not np.array_equal(values, values.astype(np.int64))
        ):
            raise ValueError("not a list of whole numbers")
    except FileNotFoundError:
        raise UserError(
            f"--labels {path} is neither random, balanced, a class nor a file"
        ) from None
    except Exception as error:  # whatever numpy, json and int say of files that are something else
        raise UserError(
            f"--labels {path} cannot be read as a class for each image ({error})"
        ) from None
    return values.astype(np.int64)
