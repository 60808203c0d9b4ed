"""From noise at t = 1 to data at t = 0: guidance, and each solver once (schedules as in REPA's samplers.py).

The state keeps the dtype of the x that comes in (REPA: float64); the network always sees float32.
B batch; x (B, C, H, W); times are Python floats, so that no step waits for the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from interpolant import Path, velocity_to_score

Velocity = Callable[[Tensor, float], Tensor]


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, null_class: int,
    scale: float = 1.0, low: float = 0.0, high: float = 1.0,
) -> Velocity:  # fmt: skip
    """Classifier-free guidance (Ho & Salimans 2022) inside the interval low <= t <= high (Kynkaanniemi et al. 2024).

    v = v_null + scale (v_class - v_null), both from one doubled batch; scale 1 is the plain conditional model. Since the
    score is affine in the velocity, guiding the velocity guides the SDE's drift just the same."""
    nulls = torch.full_like(labels, null_class)

    def velocity(x: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not low <= t <= high:
            return model(x.float(), torch.full((len(x),), t, device=x.device), labels).to(x.dtype)
        times = torch.full((2 * len(x),), t, device=x.device)
        v, v_null = model(torch.cat((x, x)).float(), times, torch.cat((labels, nulls))).to(x.dtype).chunk(2)
        return v_null + scale * (v - v_null)

    return velocity


def ode(velocity: Velocity, x: Tensor, num_steps: int, heun: bool = False) -> Tensor:
    """Probability-flow ODE on a uniform grid from 1 to 0: Euler (n evaluations), or Heun ending with Euler (2 n - 1)."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, t)
        x_next = x + (t_next - t) * v
        if heun and i < num_steps - 1:
            x_next = x + (t_next - t) * 0.5 * (v + velocity(x_next, t_next))
        x = x_next
    return x


def sde(
    velocity: Velocity, path: Path, x: Tensor, num_steps: int, noise: Callable[[int], Tensor], last: float = 0.04
) -> Tensor:
    """Reverse SDE dx = (v - w s / 2) dt + sqrt(w) dW with w(t) = 2 t, by Euler-Maruyama.

    REPA's schedule: num_steps times from 1 to `last`, noise between them, then one deterministic step to 0; num_steps
    evaluations in all. noise(i) gives step i's standard normal numbers, of x's shape."""
    times = torch.linspace(1, last, num_steps, dtype=torch.float64).tolist() + [0.0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, t)
        score = velocity_to_score(path, v, x, torch.full((len(x),), t, device=x.device, dtype=x.dtype))
        x = x + (t_next - t) * (v - t * score)
        if i < num_steps - 1:
            x = x + (2 * t * (t - t_next)) ** 0.5 * noise(i).to(x)
    return x
