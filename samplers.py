"""Integrate ODEs and SDEs from noise at t = 1 to data at t = 0, with guidance.

All solvers integrate a velocity field, which `VelocityModel` computes from the network's
prediction. Time grids follow REPA's samplers.py. If the velocity is singular at an end of [0, 1],
the caller limits the integration to `interpolant.time_interval` and replaces the last step to t = 0
with `denoise`.

The state keeps the dtype of the initial noise (REPA: float64), and the network always receives
float32. B is the batch size, and x has the shape (B, ...). With fixed steps, a time is one Python
float for the whole batch, so no step synchronizes with the device. With adaptive steps, times are a
tensor with one time per image, (B,) float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from interpolant import (
    Interpolant,
    expand_like,
    prediction_to_velocity,
    velocity_to_prediction,
    velocity_to_score,
)

# (x (B, ...), times (B,), labels (B,)) -> prediction of a network, or velocity, (B, ...).
LabelledModel = Callable[[Tensor, Tensor, Tensor], Tensor]
# (x (B, ...), time or times (B,)) -> velocity (B, ...).
VelocityField = Callable[[Tensor, float | Tensor], Tensor]
UNIT_INTERVAL = (0.0, 1.0)

# The pair RK5(4)7M of Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae", table 2.
# The last row of DOPRI5_STAGES contains the weights of the solution of order 5. DOPRI5_ERROR
# contains these weights minus those of the solution of order 4.
DOPRI5_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DOPRI5_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI5_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
MIN_STEP_SIZE = 1e-8  # a step of this size is accepted even if the error is too large


@dataclass(frozen=True, eq=False)
class VelocityModel:
    """A network whose predictions are converted to velocities.

    Args:
        network: Predicts the velocity, the data or the noise.
        interpolant: The interpolant that the network was trained on.
        prediction: Quantity that the network predicts: "v", "x" or "eps".
        dtype: Dtype of matrix products in the network. The network runs under autocast unless the
            dtype is float32.
        check_cancelled: Function that is called before each evaluation of the network, and that
            can end the sampling by raising an exception.
    """

    network: LabelledModel
    interpolant: Interpolant
    prediction: str
    dtype: torch.dtype = torch.float32
    check_cancelled: Callable[[], None] = lambda: None

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity at x (B, ...) and t (B,) for labels (B,)."""
        self.check_cancelled()
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.network(x, t, labels)
        return prediction_to_velocity(self.interpolant, self.prediction, output, x, t)


@dataclass(frozen=True, eq=False)
class GuidedVelocity:
    """The velocity field of a batch, with classifier-free guidance in an interval of t.

    Within low <= t <= high, the velocity is v_null + scale (v_class - v_null) (Ho & Salimans,
    arXiv:2207.12598; interval: Kynkäänniemi et al., arXiv:2404.07724). One evaluation of the model
    with a doubled batch computes v_null and v_class. Outside the interval, the velocity is v_class.
    The score, the predictions x and eps, and the drift of the SDE are affine in the velocity, so
    guiding the velocity is equivalent to guiding any of these.

    Args:
        model: Function that returns velocities, such as a `VelocityModel`.
        labels: Class of each image, (B,).
        null_class: Label of the unconditional model.
        scale: Guidance scale; 1 disables guidance.
        low: Lower end of the guidance interval.
        high: Upper end of the guidance interval.
    """

    model: LabelledModel
    labels: Tensor
    null_class: int
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return the velocity at x (B, ...) and t, which is one time or one time per image (B,).

        With one time per image, the batch is always doubled, because a test whether any of these
        times is in the guidance interval would synchronize with the device.
        """
        times = t.float() if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
        may_be_guided = isinstance(t, Tensor) or self.low <= t <= self.high
        if self.scale == 1.0 or not may_be_guided:
            return self.model(x.float(), times, self.labels).to(x.dtype)

        null_labels = torch.full_like(self.labels, self.null_class)
        velocities = self.model(
            torch.cat((x, x)).float(),
            torch.cat((times, times)),
            torch.cat((self.labels, null_labels)),
        )
        v_class, v_null = velocities.to(x.dtype).chunk(2)
        v_guided = v_null + self.scale * (v_class - v_null)
        if isinstance(t, Tensor):
            is_in_interval = (self.low <= t) & (t <= self.high)
            return torch.where(expand_like(is_in_interval, x), v_guided, v_class)
        return v_guided


def denoise(velocity: VelocityField, interpolant: Interpolant, x: Tensor, t: float) -> Tensor:
    """Return the denoised image E[x_0 | x_t], with one evaluation of the velocity.

    At t = 0, the denoised image is x, and the velocity is not evaluated. On the linear path, the
    result equals an Euler step to t = 0.
    """
    if t == 0:
        return x
    times = _repeat_time(t, x)
    return velocity_to_prediction(interpolant, "x", velocity(x, t), x, times)


def ode_times(num_steps: int, interval: tuple[float, float] = UNIT_INTERVAL) -> list[float]:
    """Return REPA's uniform grid for ODE solvers, from the upper to the lower end of the interval.

    Args:
        num_steps: Number of network evaluations with Euler's method, including the evaluation in a
            final `denoise`.
        interval: Lower and upper end of the integration. If the lower end is above 0, the grid has
            one step fewer, because the caller adds a final `denoise`.
    """
    t_min, t_max = interval
    num_times = num_steps if t_min > 0 else num_steps + 1
    return torch.linspace(t_max, t_min, num_times, dtype=torch.float64).tolist()


def sde_times(
    num_steps: int, interval: tuple[float, float] = UNIT_INTERVAL, last_step_start: float = 0.04
) -> list[float]:
    """Return REPA's SDE grid: `num_steps` uniform times from 1 to `last_step_start`, then 0.

    Args:
        num_steps: Number of network evaluations, including the evaluation in a final `denoise`.
        interval: Lower and upper end of the integration. If the lower end is above 0, the grid ends
            at the lower end instead of 0, `last_step_start` is ignored, and the caller adds a final
            `denoise`.
        last_step_start: Time at which the last step to 0 starts.
    """
    t_min, t_max = interval
    times = torch.linspace(t_max, t_min or last_step_start, num_steps, dtype=torch.float64).tolist()
    return times if t_min > 0 else [*times, 0.0]


def euler(velocity: VelocityField, x: Tensor, times: list[float]) -> Tensor:
    """Integrate the probability-flow ODE with Euler's method. Each step takes one evaluation."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: VelocityField, x: Tensor, times: list[float]) -> Tensor:
    """Integrate the probability-flow ODE with Heun's method (EDM, arXiv:2206.00364, algorithm 1).

    Each step takes two evaluations, except a step to t = 0, which is an Euler step.
    """
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        x_next = x + (t_next - t) * v
        if t_next > 0:
            x_next = x + (t_next - t) * 0.5 * (v + velocity(x_next, t_next))
        x = x_next
    return x


def euler_maruyama(
    velocity: VelocityField,
    interpolant: Interpolant,
    x: Tensor,
    times: list[float],
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Integrate the reverse SDE with the Euler-Maruyama method. Each step takes one evaluation.

    The SDE is dx = (v - w s / 2) dt + sqrt(w) dW with the score s and w(t) = 2 t (SiT,
    arXiv:2401.08740). A step to t = 0 adds no noise, as in REPA.

    Args:
        velocity: The velocity field.
        interpolant: The interpolant, which determines the score from the velocity.
        x: The state at times[0], (B, ...).
        times: Decreasing times (see `sde_times`).
        noise: Function that returns standard normal noise with the shape of x for the index of a
            step.

    Returns:
        The state at times[-1].
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t)
        score = velocity_to_score(interpolant, v, x, _repeat_time(t, x))
        x = x + (t_next - t) * (v - t * score)
        if t_next > 0:
            x = x + (2 * t * (t - t_next)) ** 0.5 * noise(step).to(x)
    return x


def dopri5(
    velocity: VelocityField,
    x: Tensor,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Integrate the probability-flow ODE with the Dormand-Prince pair and a step size per image.

    The error of a step is the root mean square over an image of difference / (atol + rtol max(|x|,
    |x_next|)). A step is accepted if its error is at most 1. The next step is 0.9 error^(-1/5)
    times as long, limited to factors from 0.2 to 10 (Hairer, Norsett & Wanner, Solving Ordinary
    Differential Equations I, sec. II.4). The size of the first step, (0.01 (atol + rtol))^(1/5),
    follows the same reference for a velocity of magnitude 1, the scale of the noise.

    A step takes six evaluations even if it is rejected, and the first step is preceded by one more
    evaluation. The whole batch is evaluated until every image has reached `t_end`, so that the
    result of an image does not depend on the other images. Checking whether all images have reached
    `t_end` synchronizes with the device once per step.

    The error estimate assumes a smooth velocity; `guided_dopri5` handles a discontinuous velocity.
    An image that becomes NaN is integrated in long steps and stays NaN, as with other solvers.

    Args:
        velocity: The velocity field, called with times (B,) in float64.
        x: The state at `t_start`, (B, ...).
        atol: Absolute tolerance, above 0.
        rtol: Relative tolerance.
        t_start: Time at which the integration starts.
        t_end: Time at which the integration ends.

    Returns:
        The state at `t_end`, and the number of evaluations that each image needed, (B,) int64.
    """
    # Initialize the time t and the step size h of each image, (B,).
    t = torch.full((len(x),), t_start, dtype=torch.float64, device=x.device)
    h = torch.full_like(t, (0.01 * (atol + rtol)) ** 0.2)
    first_slope = velocity(x, t)
    evaluations = torch.ones_like(t, dtype=torch.int64)
    while (t > t_end).any():
        # Evaluate the stages. The step size of images that have reached t_end is 0.
        is_running = t > t_end
        h = torch.minimum(h, t - t_end)
        step_size = expand_like(h, x).to(x.dtype)
        slopes = [first_slope]
        for node, stage in zip(DOPRI5_NODES, DOPRI5_STAGES):
            x_next = x - step_size * sum(a * v for a, v in zip(stage, slopes))
            slopes.append(velocity(x_next, t - node * h))

        # Accept or reject the step of each image.
        difference = step_size * sum(e * v for e, v in zip(DOPRI5_ERROR, slopes))
        tolerance = atol + rtol * torch.maximum(x.abs(), x_next.abs())
        error = (difference / tolerance).flatten(1).square().mean(1).sqrt().double()
        is_accepted = ~(error > 1) | (h <= MIN_STEP_SIZE)
        x = torch.where(expand_like(is_accepted, x), x_next, x)
        # The last slope of an accepted step is the first slope of the next one.
        first_slope = torch.where(expand_like(is_accepted, x), slopes[-1], first_slope)
        t_next = torch.where(h < t - t_end, t - h, t_end)
        t = torch.where(is_accepted, t_next, t)
        evaluations = evaluations + 6 * is_running

        # Choose the size of the next step.
        growth = (0.9 * error**-0.2).nan_to_num(10).clamp(0.2, 10)
        h = (h * growth).clamp(min=MIN_STEP_SIZE)
    return x, evaluations


def guided_dopri5(
    velocity: GuidedVelocity,
    x: Tensor,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Integrate with `dopri5` in up to three pieces: above, inside and below the guidance interval.

    The arguments and the result are the same as for `dopri5`.

    The velocity is smooth within each piece. A single integration would reduce the step size at the
    ends of the interval until the error estimate happens to miss the discontinuity. This takes
    more evaluations and leaves a larger error (docs/sampling.md reports measurements). With pieces,
    the null class is evaluated only inside the interval.
    """
    if velocity.scale == 1.0:
        return dopri5(velocity, x, atol, rtol, t_start, t_end)
    unguided_velocity = replace(velocity, scale=1.0)
    guided_velocity = replace(velocity, low=0.0, high=1.0)
    high = min(max(velocity.high, t_end), t_start)
    low = min(max(velocity.low, t_end), t_start)
    evaluations = torch.zeros_like(velocity.labels)
    for piece, piece_start, piece_end in (
        (unguided_velocity, t_start, high),
        (guided_velocity, high, low),
        (unguided_velocity, low, t_end),
    ):
        if piece_start > piece_end:
            x, count = dopri5(piece, x, atol, rtol, piece_start, piece_end)
            evaluations = evaluations + count
    return x, evaluations


def _repeat_time(t: float, x: Tensor) -> Tensor:
    """Return a tensor with time t for each image, (B,), with the dtype of x."""
    return torch.full((len(x),), t, device=x.device, dtype=x.dtype)
