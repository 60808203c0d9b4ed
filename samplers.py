"""From noise at t = 1 to data at t = 0: guidance, and each solver once (schedules as in REPA's samplers.py).

All of them integrate the velocity, whatever the network predicts (velocity_model). Where an end of [0, 1] is singular they take
ends = interpolant.interval(path, prediction) = (lo, hi): noise enters at hi, and where lo > 0 the last step, from lo, is to the
denoised image E[x | x_t] (on the linear path Euler's step to 0 is just that).

The state keeps the dtype of the x that comes in (REPA: float64); the network always sees float32.
B batch; x (B, ...). With a fixed grid a time is one Python float for all images, so that no step waits for the device; with
adaptive steps it is (B,), each image having its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from interpolant import (
    Interpolant,
    expand_like,
    prediction_to_velocity,
    velocity_to_prediction,
    velocity_to_score,
)

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, times (B,), labels (B,) -> velocity
VelocityField = Callable[[Tensor, float | Tensor], Tensor]
UNIT_INTERVAL = (0.0, 1.0)

# The pair RK5(4)7M of Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae", table 2. The last row of stages is
# also the solution of order 5; ERROR is that minus the one of order 4.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SMALLEST = 1e-8  # a step of this length is taken whatever its error


def VelocityModel(network: Model, path: Interpolant, prediction: str) -> Model:
    """The velocity of a network that predicts it, the data or the noise; float32, as the network."""
    if prediction == "v":
        return network
    return lambda x, t, y: prediction_to_velocity(path, prediction, network(x, t, y), x, t)


def denoise(velocity: VelocityField, path: Interpolant, x: Tensor, t: float) -> Tensor:
    """E[x | x_t], with one evaluation."""
    return velocity_to_prediction(
        path, "x", velocity(x, t), x, torch.full((len(x),), t, device=x.device, dtype=x.dtype)
    )


def GuidedVelocity(
    model: Model,
    labels: Tensor,
    null_class: int,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
) -> VelocityField:
    """Classifier-free guidance (Ho & Salimans 2022) inside the interval low <= t <= high (Kynkaanniemi et al. 2024).

    v = v_null + scale (v_class - v_null), both from one doubled batch; scale 1 is the plain conditional model. Since score, x
    and eps are affine in the velocity, guiding it guides them, and the SDE's drift, just the same. With times (B,) the batch is
    always doubled, and an image outside the interval keeps its v_class: to ask whether any is inside would wait for the
    device.
    """
    nulls = torch.full_like(labels, null_class)

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        each = isinstance(t, Tensor)
        times = t.float() if each else torch.full((len(x),), t, device=x.device)
        if scale == 1.0 or not (each or low <= t <= high):
            return model(x.float(), times, labels).to(x.dtype)
        both = model(
            torch.cat((x, x)).float(), torch.cat((times, times)), torch.cat((labels, nulls))
        )
        v, v_null = both.to(x.dtype).chunk(2)
        v_guided = v_null + scale * (v - v_null)
        return (
            torch.where(expand_like((low <= t) & (t <= high), x), v_guided, v) if each else v_guided
        )

    return velocity


def ode(
    velocity: VelocityField,
    x: Tensor,
    num_steps: int,
    heun: bool = False,
    path: Interpolant | None = None,
    ends: tuple[float, float] = UNIT_INTERVAL,
) -> Tensor:
    """Probability-flow ODE on a uniform grid from 1 to 0: Euler (n evaluations), or Heun ending with Euler (2 n - 1).

    Where lo > 0, for which `path` is needed: n times from hi to lo, then the denoised image; as many evaluations.
    """
    lo, hi = ends
    times = torch.linspace(hi, lo, num_steps + (lo == 0), dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t)
        x_next = x + (t_next - t) * v
        if heun and t_next > 0:
            x_next = x + (t_next - t) * 0.5 * (v + velocity(x_next, t_next))
        x = x_next
    return denoise(velocity, path, x, times[-1]) if lo > 0 else x


def dopri5(
    velocity: VelocityField,
    x: Tensor,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Probability-flow ODE by Dormand and Prince's pair, with steps of each image's own: (x at the end, evaluations (B,)).

    A step is taken if the root mean square, over an image's numbers, of error / (atol + rtol max(|x|, |x_next|)) is at most
    1; the next is 0.9 error^(-1/5) times as long, between 0.2 and 10 (Hairer, Norsett & Wanner, Solving ODEs I, sec. II.4).
    The first is theirs for a velocity of the size of the noise, 1: (0.01 (atol + rtol))^(1/5). atol must be above 0.

    Six evaluations a step, accepted or not, and one before the first. The whole batch is evaluated until its last image has
    arrived, so that an image does not depend on when others do; each step waits once for the device, to know whether that
    is so. The estimate of the error takes the velocity to be smooth: see guided_dopri5 for one that jumps. An image that
    turns NaN goes through in long steps and ends as NaN, as with the other solvers.
    """
    t = torch.full((len(x),), t_start, dtype=torch.float64, device=x.device)
    h = torch.full_like(t, (0.01 * (atol + rtol)) ** 0.2)
    first, evaluations = velocity(x, t), torch.ones_like(t, dtype=torch.int64)
    while (t > t_end).any():
        running, slopes = t > t_end, [first]
        h = torch.minimum(h, t - t_end)
        length = expand_like(h, x).to(x.dtype)
        for node, row in zip(NODES, STAGES):
            x_next = x - length * sum(a * v for a, v in zip(row, slopes))
            slopes.append(velocity(x_next, t - node * h))
        error = (
            length
            * sum(e * v for e, v in zip(ERROR, slopes))
            / (atol + rtol * torch.maximum(x.abs(), x_next.abs()))
        )
        error = error.flatten(1).square().mean(1).sqrt().double()
        taken = ~(error > 1) | (h <= SMALLEST)  # of an image that has arrived: h is 0
        x = torch.where(expand_like(taken, x), x_next, x)
        first = torch.where(
            expand_like(taken, x), slopes[-1], first
        )  # the last slope of a step is the first of the next
        t = torch.where(taken, torch.where(h < t - t_end, t - h, t_end), t)
        evaluations = evaluations + 6 * running
        h = (h * (0.9 * error**-0.2).nan_to_num(10).clamp(0.2, 10)).clamp(min=SMALLEST)
    return x, evaluations


def guided_dopri5(
    model: Model,
    labels: Tensor,
    null_class: int,
    x: Tensor,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    path: Interpolant | None = None,
    ends: tuple[float, float] = UNIT_INTERVAL,
) -> tuple[Tensor, Tensor]:
    """dopri5 with guidance on low <= t <= high, from 1 to high, to low, to 0, each piece of which is smooth.

    Where lo > 0, for which `path` is needed, from hi to lo, then the denoised image with one evaluation more.

    In one go, a step across an end of the interval shrinks until the estimate of its error happens to miss the jump: more
    evaluations, and a far worse end (docs/sampling.md has figures). In pieces the null class is not asked outside, either.
    """
    lo, hi = ends
    top, bottom = (min(max(edge, lo), hi) for edge in (high, low))
    pieces = (
        ((hi, top, 1.0), (top, bottom, scale), (bottom, lo, 1.0))
        if scale != 1.0
        else ((hi, lo, 1.0),)
    )
    evaluations = torch.zeros_like(labels)
    for t_start, t_end, strength in pieces:
        if t_start > t_end:
            x, count = dopri5(
                GuidedVelocity(model, labels, null_class, strength), x, atol, rtol, t_start, t_end
            )
            evaluations = evaluations + count
    if lo > 0:
        return denoise(
            GuidedVelocity(model, labels, null_class, scale, low, high), path, x, lo
        ), evaluations + 1
    return x, evaluations


def sde(
    velocity: VelocityField,
    path: Interpolant,
    x: Tensor,
    num_steps: int,
    noise: Callable[[int], Tensor],
    last: float = 0.04,
    ends: tuple[float, float] = UNIT_INTERVAL,
) -> Tensor:
    """Reverse SDE dx = (v - w s / 2) dt + sqrt(w) dW with w(t) = 2 t, by Euler-Maruyama.

    REPA's schedule: num_steps times from 1 to `last`, noise between them, then one deterministic step to 0; num_steps
    evaluations in all. Where lo > 0: as many from hi to lo, whatever `last` is, and that step is to the denoised image.
    noise(i) gives step i's standard normal numbers, of x's shape.
    """
    lo, hi = ends
    times = torch.linspace(hi, lo or last, num_steps, dtype=torch.float64).tolist() + [0.0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        if lo > 0 and t_next == 0:
            return denoise(velocity, path, x, t)
        v = velocity(x, t)
        score = velocity_to_score(
            path, v, x, torch.full((len(x),), t, device=x.device, dtype=x.dtype)
        )
        x = x + (t_next - t) * (v - t * score)
        if i < num_steps - 1:
            x = x + (2 * t * (t - t_next)) ** 0.5 * noise(i).to(x)
    return x
