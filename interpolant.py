"""Interpolants between data and noise, and quantities derived from them.

Sources: Albergo & Vanden-Eijnden 2022; SiT, arXiv:2401.08740, sec. 2.

**Time convention: t = 0 is data and t = 1 is noise**, as in REPA. No other module defines this
convention. The SiT repository uses the reverse: a SiT model at time s equals the negated velocity
of a model of this repository at t = 1 - s.

Shapes: B batch; data, noise and noisy samples (B, ...); timesteps (B,).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

PREDICTIONS = ("v", "x", "eps")
# Distance to singular endpoints, as in SiT. This is also the first timestep of DDPM.
ENDPOINT_MARGIN = 1e-3


class Interpolant(Protocol):
    """A path from data to noise: x_t = alpha(t) x + sigma(t) eps."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma, d alpha / dt and d sigma / dt, each with the shape of t."""

    def time(self, ratio: Tensor) -> Tensor:
        """Return the t at which sigma / alpha equals `ratio`."""


class Linear:
    """The linear path: x_t = (1 - t) x + t eps."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma and their derivatives."""
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        """Return the t at which sigma / alpha equals `ratio`."""
        return ratio / (1 + ratio)


class Cosine:
    """The path x_t = cos(pi t / 2) x + sin(pi t / 2) eps, which preserves unit variance."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma and their derivatives."""
        cos = torch.cos(t * math.pi / 2)
        sin = torch.sin(t * math.pi / 2)
        return cos, sin, -sin * math.pi / 2, cos * math.pi / 2

    def time(self, ratio: Tensor) -> Tensor:
        """Return the t at which sigma / alpha equals `ratio`."""
        return 2 / math.pi * torch.atan(ratio)


class VP:
    """The continuous-time limit of the linear schedule with 1,000 steps of DDPM.

    alpha = exp(-1/2 int_0^t beta) and alpha^2 + sigma^2 = 1 with beta(t) = 0.1 + 19.9 t (Song et
    al. 2021, arXiv:2011.13456, eq. 32). ADM and DiT (arXiv:2212.09748) use the schedule of DDPM.
    Their timestep k, counted from 1, is t = k / 1000. This path with eps prediction is DiT's
    objective. A small part of the data remains at t = 1, where alpha is 0.0066.
    """

    beta_start = 0.1
    beta_end = 20.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma and their derivatives.

        Near t = 0, sigma is close to the square root of 0.1 t, so d sigma / dt is infinite at 0.
        """
        slope = self.beta_end - self.beta_start
        integral = t * (self.beta_start + t * slope / 2)
        beta = self.beta_start + t * slope
        alpha = torch.exp(-integral / 2)
        sigma = torch.sqrt(-torch.expm1(-integral))  # 1 - exp() is inaccurate near t = 0
        return alpha, sigma, -beta / 2 * alpha, beta / 2 * alpha.square() / sigma

    def time(self, ratio: Tensor) -> Tensor:
        """Return the t at which sigma / alpha equals `ratio`."""
        integral = torch.log1p(ratio.square())  # (sigma / alpha)^2 = exp(integral) - 1
        slope = self.beta_end - self.beta_start
        # Solve integral = beta_start t + slope t^2 / 2 for t.
        root = torch.sqrt(self.beta_start**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_start + root)


INTERPOLANTS: dict[str, Interpolant] = {"linear": Linear(), "cosine": Cosine(), "vp": VP()}


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Append axes of size 1 to t (B,), so that t broadcasts against x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(path: Interpolant, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noisy sample x_t and its velocity v = d x_t / dt, both with the shape of x."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x))
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def regression_target(prediction: str, x: Tensor, noise: Tensor, velocity: Tensor) -> Tensor:
    """Return the training target of a network with this prediction, with the shape of x."""
    return {"v": velocity, "x": x, "eps": noise}[prediction]


def velocity_to_score(path: Interpolant, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Convert a velocity to the score of p_t (SiT, eq. 9).

    Args:
        path: The interpolant.
        v: Velocity, (B, ...).
        x_t: Noisy samples, (B, ...).
        t: Timesteps in (0, 1], (B,). The score is undefined at t = 0.

    Returns:
        grad log p_t(x_t) = -E[eps | x_t] / sigma, (B, ...).
    """
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x_t))
    return (alpha * v - d_alpha * x_t) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def prediction_to_velocity(
    path: Interpolant, prediction: str, output: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Convert the output of a network to the velocity.

    The velocity is undefined for x prediction if sigma is 0 (t = 0), and for eps prediction if
    alpha is 0.

    Args:
        path: The interpolant.
        prediction: Quantity that the network predicts, one of PREDICTIONS.
        output: Output of the network, (B, ...).
        x_t: Noisy samples, (B, ...).
        t: Timesteps, (B,).
    """
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
    """Invert `prediction_to_velocity`. For "x" and t > 0, the result is the denoised E[x | x_t]."""
    assert prediction in PREDICTIONS, prediction
    if prediction == "v":
        return v
    alpha, sigma, d_alpha, d_sigma = path.coefficients(expand_like(t, x_t))
    determinant = d_alpha * sigma - alpha * d_sigma
    if prediction == "x":
        return (sigma * v - d_sigma * x_t) / determinant
    return (d_alpha * x_t - alpha * v) / determinant


def time_interval(path: Interpolant, prediction: str) -> tuple[float, float]:
    """Return the lowest and highest t at which a network is trained and evaluated.

    The interval is [0, 1], shortened by `ENDPOINT_MARGIN` at singular endpoints. An endpoint is
    singular if the velocity, which all solvers integrate, is infinite at the endpoint or cannot be
    computed from the prediction:

    - t = 0 is singular for x prediction, whose error is multiplied by 1 / sigma, and for every
      prediction on a path where the slope of sigma is infinite at t = 0 (vp).
    - t = 1 is singular for eps prediction, whose error is multiplied by 1 / alpha, on a path that
      ends in pure noise (linear and cosine).

    SiT's transport.check_interval shortens the interval at both ends for every prediction except
    the velocity.
    """
    alpha, _, _, d_sigma = path.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low = 0.0
    high = 1.0
    if prediction == "x" or not d_sigma[0].isfinite():
        low = ENDPOINT_MARGIN
    if prediction == "eps" and alpha[1] < 1e-9:
        high = 1 - ENDPOINT_MARGIN
    return low, high


def uniform_times(path: Interpolant, u: Tensor, low: float, high: float) -> Tensor:
    """Map uniform u to timesteps that are uniform on [low, high]."""
    return low + (high - low) * u


def lognormal_times(path: Interpolant, u: Tensor, low: float, high: float) -> Tensor:
    """Map uniform u to timesteps for which log(sigma / alpha) is standard normal.

    REPA's loss.py uses this distribution, which is adapted from EDM (arXiv:2206.00364).
    """
    return path.time(torch.special.ndtri(u).exp()).clamp(low, high)


# Functions of the path, of random numbers u that are uniform on (0, 1), (B,) float64, and of the
# interval of `time_interval`. They return timesteps (B,), which increase with u.
WEIGHTINGS: dict[str, Callable[[Interpolant, Tensor, float, float], Tensor]] = {
    "uniform": uniform_times,
    "lognormal": lognormal_times,
}
