"""The path between data and noise, and what follows from it (Albergo & Vanden-Eijnden 2022; SiT, arXiv:2401.08740, sec. 2).

The time convention of this repository is stated here and nowhere else: **t = 0 is data, t = 1 is noise**, as in REPA.
(The SiT repository counts the other way: its model at time s is ours at t = 1 - s, with the velocity's sign turned.)
B batch; x and everything like it (B, ...); t (B,)."""

import math
from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """x_t = alpha(t) x + sigma(t) eps."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives in t, each of t's shape."""


class Linear:
    """x_t = (1 - t) x + t eps."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


class Cosine:
    """x_t = cos(pi t / 2) x + sin(pi t / 2) eps, which keeps the variance of unit-variance data."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        return cos, sin, -sin * math.pi / 2, cos * math.pi / 2


PATHS: dict[str, Path] = {"linear": Linear(), "cosine": Cosine()}


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) with axes of size 1 added, to broadcast against x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(path: Path, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its velocity v = d x_t / dt."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(like(t, x))
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def velocity_to_score(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """s = grad log p_t(x_t) = -E[eps | x_t] / sigma, for 0 < t (SiT, eq. 9). At t = 0 it does not exist."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(like(t, x_t))
    return (alpha * v - d_alpha * x_t) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def score_to_velocity(path: Path, score: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The inverse of velocity_to_score, for t < 1."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(like(t, x_t))
    return (sigma * (d_alpha * sigma - alpha * d_sigma) * score + d_alpha * x_t) / alpha


PREDICTIONS = ("v", "x", "eps")
WEIGHTINGS = ("uniform", "lognormal")


def training_target(path: Path, prediction: str, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return {"v": interpolate(path, x, noise, t)[1], "x": x, "eps": noise}[prediction]


def draw_times(path: Path, prediction: str, weighting: str, u: Tensor) -> Tensor:
    return u
