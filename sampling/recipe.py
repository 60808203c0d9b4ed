"""Define the settings of the sampler, and sample latents with these settings."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import cli
from common.config import setting
from common.keyed_random import KeyedRandom, Purpose, normal, uniform
from common.lfs import describe_lfs_pointer
from interpolant import INTERPOLANTS, time_interval
from models.errors import FieldError
from models.labels import TrainedLabels
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


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of the sampler. Each setting has a command-line flag."""

    mode: str = setting(
        "sde",
        choices=("sde", "ode"),
        help="sde: reverse SDE with Euler-Maruyama steps; ode: probability-flow ODE with Euler "
        "steps",
    )
    heun: bool = setting(
        False, action=argparse.BooleanOptionalAction, help="solve the ODE with Heun's method"
    )
    dopri5: bool = setting(
        False,
        help="solve the ODE with Dormand-Prince steps, whose size and number adapt to each image; "
        "--num-steps is ignored",
    )
    num_steps: int = setting(250, type=cli.positive_int, help="number of steps from noise to data")
    atol: float = setting(1e-6, type=cli.positive_float, help="absolute tolerance of --dopri5")
    rtol: float = setting(1e-3, type=cli.non_negative_float, help="relative tolerance of --dopri5")
    cfg_scale: float = setting(
        1.0,
        type=cli.non_negative_float,
        help="classifier-free guidance scale; 1 disables guidance",
    )
    guidance_low: float = setting(
        0.0, type=cli.fraction, help="smallest t with guidance, where t = 0 is data"
    )
    guidance_high: float = setting(
        1.0, type=cli.fraction, help="largest t with guidance, where t = 1 is noise"
    )
    labels: str = setting(
        "random",
        help="class labels: random (uniform), balanced (equal counts), a single class such as 207, "
        "or a file with one class per image (.txt, .npy, .json, or the .npz of other samples)",
    )
    all_classes: bool = setting(
        False,
        help="draw random and balanced labels from all classes, including those without training "
        "images",
    )
    seed: int = setting(
        0,
        flags=("--global-seed",),
        type=cli.seed,
        help="random seed; the seed and the index of an image determine its noise and random label",
    )
    state_dtype: str = setting(
        "float32",
        choices=("float32", "float64"),
        help="dtype of the latents between steps (REPA: float64)",
    )

    @property
    def solver(self) -> str:
        """Return the name of the solver for records and file names."""
        if self.mode == "sde":
            return "euler-maruyama"
        if self.dopri5:
            return "dopri5"
        return "heun" if self.heun else "euler"

    def validate(self) -> None:
        """Check that the settings are consistent.

        Raises:
            FieldError: A setting is out of range or contradicts another setting.
        """
        if self.cfg_scale < 1:
            raise FieldError(
                "cfg_scale",
                f"{self.cfg_scale} is below 1; pass 1 to disable guidance, or a larger value",
            )
        if self.guidance_low > self.guidance_high:
            raise FieldError(
                "guidance_low",
                f"{self.guidance_low} exceeds guidance_high, {self.guidance_high}; "
                "choose a smaller value",
            )
        for solver in ("heun", "dopri5"):
            if getattr(self, solver) and self.mode == "sde":
                raise FieldError(solver, "is an ODE solver; set the mode to ode")
        if self.heun and self.dopri5:
            raise FieldError("heun", "cannot be combined with dopri5; choose one solver")
        if self.mode == "sde" and self.num_steps < 2:
            raise FieldError(
                "num_steps",
                "1 is too few for mode sde, whose last step is deterministic; use 2 or more",
            )

    def describe_ignored_settings(self) -> str:
        """Return a warning about settings that have no effect, or "" if there are none."""
        if self.cfg_scale == 1 and (self.guidance_low, self.guidance_high) != (0, 1):
            return (
                "--guidance-low and --guidance-high have no effect without guidance: pass "
                "--cfg-scale with a value above 1"
            )
        return ""


@dataclass(frozen=True, eq=False)
class Recipe(SamplerConfig):
    """All settings that determine a latent, except the network and the index of the image.

    Args:
        path_type: Name of the interpolant that the network was trained on.
        prediction: Quantity that the network predicts: "v", "x" or "eps".
        explicit_labels: Contents of the label file, (n,) int64, if `labels` is a file.
        label_classes: Classes that random and balanced labels are drawn from, (k,) int64; None for
            all classes.
    """

    path_type: str = "linear"
    prediction: str = "v"
    explicit_labels: Tensor | None = None
    label_classes: Tensor | None = None

    @property
    def draws_labels(self) -> bool:
        """Return whether classes are drawn by the recipe instead of specified by the user."""
        return self.explicit_labels is None and self.labels in ("random", "balanced")

    def for_trained_labels(self, trained: TrainedLabels) -> "Recipe":
        """Return the recipe without the classes that a network was not trained on.

        Raises:
            FieldError: Guidance is enabled, but the network does not support it.
        """
        if self.cfg_scale > 1 and not trained.has_null_class:
            raise FieldError(
                "cfg_scale",
                f"{self.cfg_scale:g} requires the null class, on which the network was not trained "
                "(see --cfg-prob of train.py); pass 1 to disable guidance",
            )
        counts = trained.images_per_class
        if self.all_classes or not self.draws_labels or counts is None or all(counts):
            return self
        return replace(self, label_classes=torch.tensor(trained.list_classes(len(counts))))

    def describe_label_classes(self) -> dict[str, str]:
        """Return a record of `label_classes`, such as "0-3,5"; {} if there is no restriction."""
        if self.label_classes is None:
            return {}
        return {"label_classes": format_ranges(self.label_classes.tolist())}

    def with_loaded_labels(self, num_classes: int, count: int) -> "Recipe":
        """Return the recipe with validated labels. A label file is loaded into `explicit_labels`.

        Args:
            num_classes: Number of classes of the model.
            count: Number of images to sample.

        Raises:
            FieldError: The labels cannot be read, are too few, or are not classes of the model.
        """
        if self.labels in ("random", "balanced"):
            return self
        is_one_class = self.labels.isdecimal() and len(self.labels) < 10
        labels = np.array([int(self.labels)]) if is_one_class else load_labels(Path(self.labels))
        if not is_one_class and len(labels) < count:
            raise FieldError(
                "labels",
                f"{self.labels} contains {len(labels):,} labels, but {count:,} are needed; "
                "add labels or sample fewer images",
            )
        invalid_labels = labels[(labels < 0) | (labels >= num_classes)]
        if len(invalid_labels):
            raise FieldError(
                "labels",
                f"{self.labels}: {invalid_labels[0]} is not a class; "
                f"choose classes from 0 to {num_classes - 1}",
            )
        return self if is_one_class else replace(self, explicit_labels=torch.from_numpy(labels))

    def compute_labels(self, indices: Tensor, num_classes: int) -> Tensor:
        """Return the class of each image, (B,), given the indices of the images, (B,)."""
        if self.explicit_labels is not None:
            # The padding of the last batch has indices beyond the end of the file.
            last_index = len(self.explicit_labels) - 1
            return self.explicit_labels.to(indices.device)[indices.clamp(max=last_index)]
        if self.labels.isdecimal():
            return torch.full_like(indices, int(self.labels))
        classes = self.label_classes
        num_choices = num_classes if classes is None else len(classes)
        if self.labels == "balanced":
            choice = indices % num_choices
        else:
            u = uniform(self.seed, Purpose.CLASS, indices)
            choice = (u * num_choices).long().clamp(max=num_choices - 1)
        return choice if classes is None else classes.to(indices.device)[choice]

    @torch.no_grad()
    def sample_latents(
        self,
        model: SiT,
        indices: Tensor,
        dtype: torch.dtype = torch.float32,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Sample a batch of latents.

        Args:
            model: The network.
            indices: Index of each image, (B,), on the network's device.
            dtype: Dtype of the network's matrix products.
            check_cancelled: Function that is called before each evaluation of the network. Sampling
                ends if the function raises an exception.

        Returns:
            Latents, (B, C, h, w), of dtype `state_dtype`.

        Raises:
            FloatingPointError: Some latents are not finite.
        """
        latents = self._solve(model, indices, dtype, check_cancelled)
        if not latents.isfinite().all():
            raise FloatingPointError("the sampled latents are not finite")
        return latents

    def _solve(
        self,
        model: SiT,
        indices: Tensor,
        dtype: torch.dtype,
        check_cancelled: Callable[[], None],
    ) -> Tensor:
        config = model.config
        shape = (config.channels, config.latent_size, config.latent_size)
        x = normal(self.seed, Purpose.INITIAL_NOISE, indices, shape)
        x = x.to(getattr(torch, self.state_dtype))
        interpolant = INTERPOLANTS[self.path_type]
        velocity = GuidedVelocity(
            VelocityModel(model, interpolant, self.prediction, dtype, check_cancelled),
            self.compute_labels(indices, config.num_classes),
            null_class=config.num_classes,
            scale=self.cfg_scale,
            low=self.guidance_low,
            high=self.guidance_high,
        )

        random = KeyedRandom(self.seed, indices.device, normal={Purpose.BROWNIAN: shape})

        def draw_brownian_noise(step: int) -> Tensor:
            return random.draw(indices, step)[Purpose.BROWNIAN]

        interval = time_interval(interpolant, self.prediction)
        if self.solver == "dopri5":
            t_min, t_max = interval
            x, _ = guided_dopri5(velocity, x, self.atol, self.rtol, t_max, t_min)
            return denoise(velocity, interpolant, x, t_min)
        if self.solver == "euler-maruyama":
            times = sde_times(self.num_steps, interval)
            x = euler_maruyama(velocity, interpolant, x, times, draw_brownian_noise)
        else:
            times = ode_times(self.num_steps, interval)
            solve = heun if self.heun else euler
            x = solve(velocity, x, times)
        return denoise(velocity, interpolant, x, times[-1])


def cast_matmul_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear and convolutional layers in place.

    The results are the same as with autocast, which casts these weights in every evaluation.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)


def format_ranges(values: list[int]) -> str:
    """Format ascending integers as ranges, such as "0-3,5"."""
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], value]
        else:
            ranges.append([value])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def load_labels(path: Path) -> np.ndarray:
    """Load one class per image, (n,) int64.

    Args:
        path: A .npy file, a .npz file of samples (arr_1), a .json file with a list, or a text file
            with numbers separated by whitespace.

    Raises:
        FieldError: The file does not exist or does not contain a list of integers.
    """
    try:
        return _read_label_file(path)
    except FileNotFoundError:
        raise FieldError(
            "labels",
            f"{path} does not exist; choose random, balanced, a class index or an existing file",
        ) from None
    except Exception as error:  # numpy, json and int raise many exception types for invalid files
        problem = describe_lfs_pointer(path)
        raise FieldError(
            "labels", problem or f"{path} cannot be read as one class per image ({error})"
        ) from None


def _read_label_file(path: Path) -> np.ndarray:
    """Read a label file, or raise any exception if the file is invalid."""
    if path.suffix in (".npy", ".npz"):
        values = np.load(path)
        if path.suffix == ".npz":
            values = values["arr_1"]
    elif path.suffix == ".json":
        values = np.array(json.loads(path.read_text()))
    else:
        values = np.array([int(word) for word in path.read_text().split()])
    labels = values.astype(np.int64)
    if values.ndim != 1 or not len(values) or not np.array_equal(values, labels):
        raise ValueError("not a list of integers")
    return labels
