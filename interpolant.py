"""The path between data and noise, and what follows from it (Albergo & Vanden-Eijnden 2022; SiT, arXiv:2401.08740, sec. 2):
what a network may predict, how that becomes velocity and score, and at which times it is trained and asked.

The time convention of this repository is stated here and nowhere else: **t = 0 is data, t = 1 is noise**, as in REPA.
(The SiT repository counts the other way: its model at time s is ours at t = 1 - s, with the velocity's sign turned.)
B batch; x and everything like it (B, ...); t (B,).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Interpolant(Protocol):
    """x_t = alpha(t) x + sigma(t) eps."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives in t, each of t's shape."""

    def time(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha is `ratio`."""


class Linear:
    """x_t = (1 - t) x + t eps."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)


class Cosine:
    """x_t = cos(pi t / 2) x + sin(pi t / 2) eps, which keeps the variance of unit-variance data."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        return cos, sin, -sin * math.pi / 2, cos * math.pi / 2

    def time(self, ratio: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(ratio)


class VP:
    """alpha = exp(-1/2 int_0^t beta), alpha^2 + sigma^2 = 1, beta(t) = 0.1 + 19.9 t: DDPM's linear schedule of 1,000 steps in
    continuous time (Song et al. 2021, arXiv:2011.13456, eq. 32).

    ADM and DiT (arXiv:2212.09748) kept that schedule; their step k, counted from 1, is t = k / 1000, and with eps predicted
    this is DiT's objective. A little of the data is left at t = 1, where alpha is 0.0066.
    """

    first, last = 0.1, 20.0  # beta at t = 0 and 1

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d sigma / dt is infinite at t = 0, where sigma grows as the root of 0.1 t."""
        rise = self.last - self.first
        integral, beta = t * (self.first + t * rise / 2), self.first + t * rise
        alpha, sigma = (
            torch.exp(-integral / 2),
            torch.sqrt(-torch.expm1(-integral)),
        )  # 1 - exp would lose digits near t = 0
        return alpha, sigma, -beta / 2 * alpha, beta / 2 * alpha.square() / sigma

    def time(self, ratio: Tensor) -> Tensor:
        integral = torch.log1p(
            ratio.square()
        )  # (sigma / alpha)^2 = exp(integral) - 1; then a quadratic equation for t
        return (
            2
            * integral
            / (self.first + torch.sqrt(self.first**2 + 2 * (self.last - self.first) * integral))
        )


INTERPOLANTS: dict[str, Interpolant] = {"linear": Linear(), "cosine": Cosine(), "vp": VP()}
PREDICTIONS = ("v", "x", "eps")
ENDPOINT_MARGIN = (
    1e-3  # what is cut off an end that is singular: SiT's, and the first of DDPM's thousand times
)


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) with axes of size 1 added, to broadcast against x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(path: Interpolant, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its velocity v = d x_t / dt."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x))
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def velocity_to_score(path: Interpolant, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """s = grad log p_t(x_t) = -E[eps | x_t] / sigma, for 0 < t (SiT, eq. 9). At t = 0 it does not exist."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x_t))
    return (alpha * v - d_alpha * x_t) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def score_to_velocity(path: Interpolant, score: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The inverse of velocity_to_score, for t < 1."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x_t))
    return (sigma * (d_alpha * sigma - alpha * d_sigma) * score + d_alpha * x_t) / alpha


def regression_target(
    path: Interpolant, prediction: str, x: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """What the network is to predict from x_t: the velocity, the data or the noise."""
    assert prediction in PREDICTIONS, prediction
    return (
        x
        if prediction == "x"
        else noise
        if prediction == "eps"
        else interpolate(path, x, noise, t)[1]
    )


def prediction_to_velocity(
    path: Interpolant, prediction: str, output: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """The velocity that a prediction amounts to. Of x not at t = 0, where sigma is 0; of eps not where alpha is."""
    assert prediction in PREDICTIONS, prediction
    if prediction == "v":
        return output
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x_t))
    if prediction == "x":
        return d_alpha * output + d_sigma * (x_t - alpha * output) / sigma
    return d_alpha * (x_t - sigma * output) / alpha + d_sigma * output


def velocity_to_prediction(
    path: Interpolant, prediction: str, v: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """The inverse of to_velocity. Of x at 0 < t it is the denoised image E[x | x_t]."""
    assert prediction in PREDICTIONS, prediction
    if prediction == "v":
        return v
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x_t))
    determinant = d_alpha * sigma - alpha * d_sigma
    return (
        sigma * v - d_sigma * x_t if prediction == "x" else d_alpha * x_t - alpha * v
    ) / determinant


def time_interval(path: Interpolant, prediction: str) -> tuple[float, float]:
    """(lo, hi), the times at which such a network is trained, and asked by the samplers: [0, 1] without singular ends.

    An end is singular if the velocity, which all solvers integrate, does not follow from the prediction there, or is infinite:
    t = 0 for x (an error of it is multiplied by 1 / sigma), and on a path on which sigma starts vertically, vp; t = 1 for eps
    (by 1 / alpha) on a path that ends in noise alone, linear and cosine. EDGE is cut off such an end, as in SiT's
    transport.check_interval, which cuts both ends on linear and cosine for whatever is no velocity.
    """
    alpha, _, _, d_sigma = path.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    lo = ENDPOINT_MARGIN if prediction == "x" or not d_sigma[0].isfinite() else 0.0
    return lo, 1 - ENDPOINT_MARGIN if prediction == "eps" and alpha[1] < 1e-9 else 1.0


def uniform_times(path: Interpolant, u: Tensor, lo: float, hi: float) -> Tensor:
    """Every time as often."""
    return lo + (hi - lo) * u


def lognormal_times(path: Interpolant, u: Tensor, lo: float, hi: float) -> Tensor:
    """log(sigma / alpha) standard normal (REPA's loss.py, after EDM, arXiv:2206.00364)."""
    return path.time(torch.special.ndtri(u).exp()).clamp(lo, hi)


WEIGHTINGS: dict[str, Callable[[Interpolant, Tensor, float, float], Tensor]] = {
    "uniform": uniform_times,
    "lognormal": lognormal_times,
}


def draw_times(path: Interpolant, prediction: str, weighting: str, u: Tensor) -> Tensor:
    """Times of training inside `interval`, rising with u: uniform on (0, 1), float64, (B,) -> (B,)."""
    return WEIGHTINGS[weighting](path, u, *time_interval(path, prediction))
