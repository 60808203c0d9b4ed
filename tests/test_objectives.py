"""Test sampling for every combination of interpolant and prediction."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.keyed_random import Purpose, normal
from experiments.solvers import compute_sde_moments
from interpolant import INTERPOLANTS, PREDICTIONS, prediction_to_velocity, time_interval
from samplers import GuidedVelocity, VelocityModel, denoise, dopri5, euler, guided_dopri5, heun
from sampling.recipe import Recipe
from tests.gaussian_data import (
    COEFFICIENTS,
    COSINE,
    DATA,
    LINEAR,
    NULL,
    NULL_CLASS,
    SCALE,
    RecordedVelocity,
    compute_affine_drift,
    compute_convergence_orders,
    compute_recursive_moments,
    draw_initial_noise,
    solve_ode,
    solve_sde,
)

on_every_objective = pytest.mark.parametrize(
    ("path_type", "prediction"), list(itertools.product(INTERPOLANTS, PREDICTIONS))
)


def compute_affine_denoiser(path_type, t):
    """Return M and c of the denoised image M x + c = E[x_0 | x_t] of DATA, as numpy arrays."""
    alpha, sigma, _, _ = COEFFICIENTS[path_type](t)
    mean = DATA.mean.numpy()
    covariance = DATA.covariance.numpy()
    matrix = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(3))
    return matrix, mean - alpha * matrix @ mean


def compute_exact_end(path_type, interval, x):
    """Return the exact end of the flow on an interval for x (B, 3), followed by `denoise`.

    Each quantile of the start is mapped to the same quantile of the end.
    """
    alpha, sigma, _, _ = COEFFICIENTS[path_type](interval[0])
    alpha_start, sigma_start, _, _ = COEFFICIENTS[path_type](interval[1])
    std = (alpha**2 * DATA.std**2 + sigma**2).sqrt()
    std_start = (alpha_start**2 * DATA.std**2 + sigma_start**2).sqrt()
    quantile = (x - alpha_start * DATA.mean) @ DATA.axes / std_start
    if interval[0] > 0:
        return DATA.mean + alpha * DATA.std**2 / std * quantile @ DATA.axes.T
    return DATA.flow(quantile @ DATA.axes.T)


def make_perfect_velocity(path_type, prediction):
    """Return the float64 velocity field of a perfect network with this prediction."""
    interpolant = INTERPOLANTS[path_type]
    network = DATA.predict_expected(interpolant, prediction)

    def velocity(x, t):
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return prediction_to_velocity(interpolant, prediction, network(x, times), x, times)

    return velocity


def compute_affine_moments(solve):
    """Return mean and covariance of `solve` applied to N(0, I), for an affine `solve`."""
    end = solve(torch.cat((torch.zeros(1, 3), torch.eye(3))).double())
    columns = end[1:] - end[0]
    return end[0], columns.T @ columns


@on_every_objective
def test_every_objective_reaches_the_moments_of_the_data(path_type, prediction):
    """The moments are exact and draw no samples.

    The tolerances allow for the initial state, which is pure noise: at the start of the interval,
    the exact alpha is up to 0.007, and the exact sigma is 0.999 for "eps" on the linear path. The
    tolerance of the SDE also allows for the discretization error of 1.5%.
    """
    interpolant = INTERPOLANTS[path_type]
    interval = time_interval(interpolant, prediction)
    velocity = make_perfect_velocity(path_type, prediction)
    t_min, t_max = interval

    def solve_adaptively(x):
        end, _ = dopri5(velocity, x, 1e-9, 1e-6, t_max, t_min)
        return denoise(velocity, interpolant, end, t_min)

    def solve_with_heun(x):
        return solve_ode(heun, velocity, x, 128, interpolant, interval)

    moments = {
        "Heun": compute_affine_moments(solve_with_heun),
        "dopri5": compute_affine_moments(solve_adaptively),
        "SDE": compute_sde_moments(velocity, interpolant, 3, 128, ends=interval),
    }
    for solver, (mean, covariance) in moments.items():
        tolerance = 0.016 if solver == "SDE" else 0.0025
        covariance_error = (covariance - DATA.covariance).norm() / DATA.covariance.norm()
        assert (mean - DATA.mean).norm() / DATA.mean.norm() < 0.008, solver
        assert covariance_error < tolerance, solver


@on_every_objective
def test_solvers_cover_the_whole_time_interval(path_type, prediction):
    """Heun converges to the exact end with order 2; SDE moments equal those of the recursion."""
    interpolant = INTERPOLANTS[path_type]
    interval = time_interval(interpolant, prediction)
    t_min, t_max = interval
    velocity = make_perfect_velocity(path_type, prediction)
    x = draw_initial_noise()
    exact = compute_exact_end(path_type, interval, x)
    errors = [
        (solve_ode(heun, velocity, x, n, interpolant, interval) - exact).abs().max()
        for n in (64, 128, 256)
    ]
    assert errors[-1] < 1e-4
    assert compute_convergence_orders(errors) == pytest.approx([2] * 2, abs=0.1)

    moments = compute_sde_moments(velocity, interpolant, 3, 25, ends=interval)
    denoiser = compute_affine_denoiser(path_type, t_min) if t_min else None
    expected = compute_recursive_moments(
        lambda t, w: compute_affine_drift(DATA, path_type, t, w), 25, t_min or 0.04, t_max, denoiser
    )
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path_type", INTERPOLANTS)
def test_all_predictions_give_the_same_samples_away_from_singularities(path_type):
    x = draw_initial_noise()
    interpolant = INTERPOLANTS[path_type]
    interval = (0.001, 0.999)
    noise = normal(1, Purpose.INITIAL_NOISE, torch.arange(8), (3,))
    for solve in (
        lambda velocity: solve_ode(euler, velocity, x, 8, interpolant, interval),
        lambda velocity: solve_ode(heun, velocity, x, 8, interpolant, interval),
        lambda velocity: solve_sde(velocity, interpolant, x, 8, lambda i: noise[i], interval),
    ):
        expected, *others = (solve(make_perfect_velocity(path_type, p)) for p in PREDICTIONS)
        for other in others:
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("low", "high", "batch_size"), [(0.0, 1.0, 4), (0.3, 0.7, 2), (0.0, 0.0005, 2)]
)
def test_denoising_is_guided_if_the_time_is_in_the_interval(low, high, batch_size):
    batch_sizes = []
    times = []

    def model(x, t, labels):
        batch_sizes.append(len(labels))
        times.extend(t.tolist())
        return x

    velocity = GuidedVelocity(model, torch.arange(2), NULL_CLASS, SCALE, low, high)
    x, evaluations = guided_dopri5(velocity, draw_initial_noise(2), t_start=1.0, t_end=0.001)
    assert evaluations.max() <= len(batch_sizes)
    assert min(times) == pytest.approx(0.001)  # also if the guidance interval ends below it
    denoise(velocity, LINEAR, x, 0.001)
    assert batch_sizes[-1] == batch_size


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.001, 0.999)])
def test_number_of_evaluations_does_not_depend_on_the_interval(interval):
    t_min, t_max = interval
    for solver, count in ((euler, 5), (heun, 9)):
        velocity = RecordedVelocity()
        solve_ode(solver, velocity, draw_initial_noise(2), 5, COSINE, interval)
        assert len(velocity.times) == count
        assert velocity.times[0] == t_max
        assert (velocity.times[-1] == 0.001) == (t_min > 0)
    velocity = RecordedVelocity()
    solve_sde(velocity, COSINE, draw_initial_noise(2), 5, lambda i: torch.zeros(2, 3), interval)
    assert len(velocity.times) == 5
    assert (velocity.times[0], velocity.times[-1]) == (t_max, t_min or 0.04)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.001, 0.999)])
def test_a_single_step_starts_at_the_upper_end_of_the_interval(interval):
    velocity = RecordedVelocity()
    solve_ode(euler, velocity, draw_initial_noise(2), 1, COSINE, interval)
    assert velocity.times == [interval[1]]


def make_network(path_type, prediction):
    """Return a float32 network with the interface of a SiT, on images (B, 3, 1, 1).

    Every class is DATA, and the null class is NULL.
    """
    predict_class = DATA.predict_expected(INTERPOLANTS[path_type], prediction)
    predict_null = NULL.predict_expected(INTERPOLANTS[path_type], prediction)

    def network(x, t, labels):
        assert x.dtype == t.dtype == torch.float32
        flat = x.flatten(1).double()
        class_output = predict_class(flat, t.double()).float()
        null_output = predict_null(flat, t.double()).float()
        is_null = (labels == NULL_CLASS)[:, None]
        return torch.where(is_null, null_output, class_output).reshape(x.shape)

    network.config = SimpleNamespace(channels=3, latent_size=1, num_classes=NULL_CLASS)
    return network


@on_every_objective
def test_recipes_sample_every_objective(path_type, prediction):
    """Compare samples of a float32 network with the exact end of the flow and the SDE solver."""
    indices = torch.arange(10)
    network = make_network(path_type, prediction)
    interval = time_interval(INTERPOLANTS[path_type], prediction)
    exact = compute_exact_end(path_type, interval, draw_initial_noise()).float()
    for options, tolerance in (
        ({"heun": True, "num_steps": 128}, 5e-4),
        ({"dopri5": True, "rtol": 1e-4}, 2e-3),
    ):
        recipe = Recipe("ode", path_type=path_type, prediction=prediction, **options)
        latents = recipe.sample_latents(network, indices).flatten(1)
        assert (latents - exact).abs().max() < tolerance, options

    recipe = Recipe("sde", num_steps=20, path_type=path_type, prediction=prediction)
    latents = recipe.sample_latents(network, indices).flatten(1)
    noise = [normal(0, Purpose.BROWNIAN, indices, (3,), draw=i) for i in range(19)]
    expected = solve_sde(
        make_perfect_velocity(path_type, prediction),
        INTERPOLANTS[path_type],
        draw_initial_noise(),
        20,
        lambda i: noise[i],
        interval,
    )
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("path_type", "prediction"), list(itertools.product(INTERPOLANTS, ["x", "eps"]))
)
def test_guiding_every_objective_equals_guiding_the_velocity(path_type, prediction):
    """Some guidance intervals include times outside the time interval."""
    interpolant = INTERPOLANTS[path_type]
    interval = (0.001, 0.999)
    t_min, t_max = interval
    x = draw_initial_noise(6).float()
    labels = torch.arange(6)
    model = VelocityModel(make_network(path_type, prediction), interpolant, prediction)
    velocity_model = VelocityModel(make_network(path_type, "v"), interpolant, "v")

    def solve_with_heun(velocity):
        return solve_ode(heun, velocity, x, 9, interpolant, interval)

    def solve_adaptively(velocity):
        end, _ = guided_dopri5(velocity, x, 1e-4, 1e-4, t_max, t_min)
        return denoise(velocity, interpolant, end, t_min)

    unguided = solve_with_heun(GuidedVelocity(model, labels, NULL_CLASS))
    for low, high in ((0.0, 1.0), (0.3, 0.7), (0.0, 0.0005)):
        guided = GuidedVelocity(model, labels, NULL_CLASS, SCALE, low, high)
        expected = GuidedVelocity(velocity_model, labels, NULL_CLASS, SCALE, low, high)
        for solve in (solve_with_heun, solve_adaptively):
            torch.testing.assert_close(solve(guided), solve(expected), rtol=0, atol=2e-3)
        is_never_guided = high < 0.001
        assert torch.equal(solve_with_heun(guided), unguided) == is_never_guided
