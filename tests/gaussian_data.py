"""Exact solutions for Gaussian data, whose velocity and marginals have closed forms.

The solutions come from closed forms, from scipy's integrators and from linear recursions that share
no code with the solvers.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from common.keyed_random import Purpose, normal
from experiments.solvers import make_example_gaussian
from interpolant import INTERPOLANTS
from samplers import (
    UNIT_INTERVAL,
    GuidedVelocity,
    denoise,
    euler_maruyama,
    ode_times,
    sde_times,
)

DATA = make_example_gaussian([0.3, 0.7, 1.6])
NULL = make_example_gaussian([0.5, 1.1, 1.3], seed=1)
NULL_CLASS = 9
SCALE = 1.8
# On grids of 4 n steps, guidance applies exactly on (0.25, 0.75].
LOW = 0.25 + 1e-6
HIGH = 0.75 + 1e-6
LINEAR = INTERPOLANTS["linear"]
COSINE = INTERPOLANTS["cosine"]


def compute_linear_coefficients(t):
    return 1 - t, t, -1, 1


def compute_cosine_coefficients(t):
    cos = math.cos(math.pi * t / 2)
    sin = math.sin(math.pi * t / 2)
    return cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos


def compute_vp_coefficients(t):
    variance = math.exp(-9.95 * t**2 - 0.1 * t)
    beta = 0.1 + 19.9 * t
    alpha = variance**0.5
    sigma = (1 - variance) ** 0.5
    return alpha, sigma, -beta / 2 * alpha, beta / 2 * variance / sigma


COEFFICIENTS = {
    "linear": compute_linear_coefficients,
    "cosine": compute_cosine_coefficients,
    "vp": compute_vp_coefficients,
}
# The velocity has no singularity on these paths.
on_regular_paths = pytest.mark.parametrize("path_type", ["linear", "cosine"])


def draw_initial_noise(count=10, dim=3):
    return normal(0, Purpose.INITIAL_NOISE, torch.arange(count), (dim,))


def compute_affine_drift(data, path_type, t, w=0.0):
    """Return M and c of the drift M x + c = v - w s / 2 of Gaussian data, as float64 numpy arrays.

    The drift follows from the change of the mean and the covariance of x_t.
    """
    alpha, sigma, d_alpha, d_sigma = COEFFICIENTS[path_type](t)
    mean = data.mean.numpy()
    covariance = data.covariance.numpy()
    identity = np.eye(3)
    inverse = np.linalg.inv(alpha**2 * covariance + sigma**2 * identity)
    matrix = (alpha * d_alpha * covariance + sigma * d_sigma * identity) @ inverse + w / 2 * inverse
    return matrix, d_alpha * mean - alpha * matrix @ mean


def compute_guided_drift(path_type, t, w=0.0):
    """Return M and c of the drift with guidance between DATA and NULL inside [LOW, HIGH]."""
    scale = SCALE if LOW <= t <= HIGH else 1
    matrix, c = compute_affine_drift(DATA, path_type, t, w)
    null_matrix, null_c = compute_affine_drift(NULL, path_type, t, w)
    return null_matrix + scale * (matrix - null_matrix), null_c + scale * (c - null_c)


def integrate_with_scipy(drift, x, edges=(1.0, 0.0)):
    """Integrate dx/dt = M x + c for x (B, 3) from the first edge to the last.

    The drift may have a jump at an edge. The edges split the integration into pieces, and the drift
    at an end of a piece is its limit from the inside of the piece.
    """
    for t_start, t_end in itertools.pairwise(edges):

        def slope(t, y, t_start=t_start, t_end=t_end):
            matrix, c = drift(min(max(t, t_end + 1e-9), t_start - 1e-9))
            return (y.reshape(-1, 3) @ matrix.T + c).ravel()

        solution = solve_ivp(
            slope, (t_start, t_end), x.ravel(), method="DOP853", rtol=1e-11, atol=1e-11
        )
        x = solution.y[:, -1].reshape(-1, 3)
    return torch.from_numpy(x)


def compute_recursive_moments(drift, num_steps, last, first=1.0, denoiser=None):
    """Return mean and covariance of Euler-Maruyama samples for an affine drift, by recursion.

    Args:
        drift: Function of t and w that returns M and c of the drift.
        num_steps: Number of evaluations.
        last: Time at which the last step starts.
        first: Time at which the first step starts.
        denoiser: M and c of the last step. By default, the last step also follows the drift.
    """
    times = [*np.linspace(first, last, num_steps), 0.0]
    mean = np.zeros(3)
    covariance = np.eye(3)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        if denoiser and t_next == 0:
            matrix, c = denoiser
            mean = matrix @ mean + c
            covariance = matrix @ covariance @ matrix.T
            break
        matrix, c = drift(t, 2 * t)
        step = np.eye(3) + (t_next - t) * matrix
        mean = step @ mean + (t_next - t) * c
        covariance = step @ covariance @ step.T
        if i < num_steps - 1:
            covariance += 2 * t * (t - t_next) * np.eye(3)
    return torch.from_numpy(mean), torch.from_numpy(covariance)


def make_gaussian_model(path_type):
    """Return a float32 model in which every class is DATA and the null class is NULL."""
    interpolant = INTERPOLANTS[path_type]

    def model(x, t, labels):
        assert x.dtype == t.dtype == torch.float32
        x = x.double()
        t = t.double()
        v_null = NULL.velocity(interpolant)(x, t)
        v_class = DATA.velocity(interpolant)(x, t)
        return torch.where((labels == NULL_CLASS)[:, None], v_null, v_class)

    return model


def make_guided_velocity(path_type, count, **interval):
    labels = torch.arange(count) % NULL_CLASS
    return GuidedVelocity(make_gaussian_model(path_type), labels, NULL_CLASS, SCALE, **interval)


def compute_convergence_orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def solve_ode(solver, velocity, x, num_steps, interpolant=None, interval=UNIT_INTERVAL):
    times = ode_times(num_steps, interval)
    return denoise(velocity, interpolant, solver(velocity, x, times), times[-1])


def solve_sde(velocity, interpolant, x, num_steps, noise, interval=UNIT_INTERVAL):
    times = sde_times(num_steps, interval)
    x = euler_maruyama(velocity, interpolant, x, times, noise)
    return denoise(velocity, interpolant, x, times[-1])


class RecordedVelocity:
    """The velocity field v = x, which records the times at which it is evaluated."""

    def __init__(self):
        self.times = []

    def __call__(self, x, t):
        self.times.append(t)
        return x
