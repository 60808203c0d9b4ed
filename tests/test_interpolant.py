"""Test interpolants, conversions between predictions, and the distribution of timesteps."""

import math

import pytest
import torch
from scipy.stats import norm

from interpolant import (
    INTERPOLANTS,
    PREDICTIONS,
    WEIGHTINGS,
    interpolate,
    prediction_to_velocity,
    regression_target,
    time_interval,
    velocity_to_prediction,
    velocity_to_score,
)

on_every_path = pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS)
with_every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def draw_times(path, prediction, weighting, u):
    return WEIGHTINGS[weighting](path, u, *time_interval(path, prediction))


def make_example(count=6):
    """Return data, noise and timesteps inside (0, 1), in float64."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, count, 3, 4, 4, dtype=torch.float64, generator=generator)
    return x, noise, torch.linspace(0.05, 0.95, count, dtype=torch.float64)


@on_every_path
def test_velocity_is_the_derivative_of_the_path(path):
    x, noise, t = make_example()
    for i in range(len(t)):
        _, v = interpolate(path, x[i : i + 1], noise[i : i + 1], t[i : i + 1])
        derivative = torch.autograd.functional.jacobian(
            lambda s, i=i: interpolate(path, x[i : i + 1], noise[i : i + 1], s)[0], t[i : i + 1]
        )
        torch.testing.assert_close(v, derivative[..., 0], rtol=1e-12, atol=1e-12)


@on_every_path
def test_path_leads_from_data_at_time_0_to_noise_at_time_1(path):
    x, noise, _ = make_example()
    start, _ = interpolate(path, x, noise, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(start, x)
    end, _ = interpolate(path, x, noise, torch.ones(6, dtype=torch.float64))
    final_alpha = 0.0
    if path is INTERPOLANTS["vp"]:  # with DDPM's schedule, a small part of the data remains
        final_alpha = math.exp(-10.05 / 2)
    torch.testing.assert_close(end, final_alpha * x + (1 - final_alpha**2) ** 0.5 * noise)


@on_every_path
def test_score_of_the_true_velocity_is_minus_noise_over_sigma(path):
    x, noise, t = make_example()
    x_t, v = interpolate(path, x, noise, t)
    sigma = path.coefficients(t)[1][:, None, None, None]
    torch.testing.assert_close(velocity_to_score(path, v, x_t, t), -noise / sigma)


def test_score_equals_the_formula_of_repa():
    """Compare with (alpha / alpha' v - x) / (sigma^2 - alpha / alpha' sigma' sigma) for cosine."""
    x_t, v, t = make_example()
    angle = t[:, None, None, None] * math.pi / 2
    ratio = -torch.cos(angle) / (math.pi / 2 * torch.sin(angle))
    variance = torch.sin(angle) ** 2 - ratio * (math.pi / 2 * torch.cos(angle)) * torch.sin(angle)
    torch.testing.assert_close(
        velocity_to_score(INTERPOLANTS["cosine"], v, x_t, t), (ratio * v - x_t) / variance
    )


def test_linear_path_equals_the_sit_repository_path_with_reversed_time():
    """The SiT repository has x_s = s x + (1 - s) eps with velocity x - eps, where s = 1 - t."""
    x, noise, t = make_example()
    x_t, v = interpolate(INTERPOLANTS["linear"], x, noise, t)
    s = (1 - t)[:, None, None, None]
    torch.testing.assert_close(x_t, s * x + (1 - s) * noise)
    torch.testing.assert_close(v, -(x - noise))


# The VP path


def test_vp_preserves_the_variance_and_agrees_with_the_1000_steps_of_ddpm():
    """In DDPM, log alpha_bar is a sum of log(1 - beta); in vp, it is an integral of -beta.

    Each term of the sum differs from the integral over its step by beta^2 / 2 plus half an
    increment of beta.
    """
    k = torch.arange(1001, dtype=torch.float64)
    alpha, sigma, _, _ = INTERPOLANTS["vp"].coefficients(k / 1000)
    torch.testing.assert_close(
        alpha**2 + sigma**2, torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15
    )
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    discrete = (1 - betas).log().cumsum(0)
    tolerance = (0.51 * betas**2).cumsum(0) + k[1:] * (betas[1] - betas[0]) / 2
    assert ((2 * alpha[1:].log() - discrete).abs() < tolerance).all()


def test_vp_coefficients_are_accurate_in_float32_near_time_0():
    t = torch.logspace(-5, 0, 200)
    in_float32 = INTERPOLANTS["vp"].coefficients(t)
    in_float64 = INTERPOLANTS["vp"].coefficients(t.double())
    for actual, expected in zip(in_float32, in_float64):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=0)


# Predictions of the network


@on_every_path
@with_every_prediction
def test_conversions_between_prediction_and_velocity_are_inverse(path, prediction):
    x_t, v, t = make_example()
    output = velocity_to_prediction(path, prediction, v, x_t, t)
    torch.testing.assert_close(prediction_to_velocity(path, prediction, output, x_t, t), v)
    velocity = prediction_to_velocity(path, prediction, v, x_t, t)
    torch.testing.assert_close(velocity_to_prediction(path, prediction, velocity, x_t, t), v)


@on_every_path
@with_every_prediction
def test_regression_target_converts_to_the_velocity_of_the_path(path, prediction):
    x, noise, t = make_example()
    x_t, v = interpolate(path, x, noise, t)
    target = regression_target(prediction, x, noise, v)
    assert torch.equal(target, {"v": v, "x": x, "eps": noise}[prediction])
    torch.testing.assert_close(prediction_to_velocity(path, prediction, target, x_t, t), v)
    torch.testing.assert_close(velocity_to_prediction(path, prediction, v, x_t, t), target)


@on_every_path
@with_every_prediction
def test_guiding_a_prediction_equals_guiding_its_velocity_or_score(path, prediction):
    x_t, with_class, t = make_example()
    without_class = with_class.roll(1, 0)

    def guide(a, b):
        return b + 1.8 * (a - b)

    def velocity(output):
        return prediction_to_velocity(path, prediction, output, x_t, t)

    def score(output):
        return velocity_to_score(path, velocity(output), x_t, t)

    for quantity in (velocity, score):
        torch.testing.assert_close(
            quantity(guide(with_class, without_class)),
            guide(quantity(with_class), quantity(without_class)),
        )


# Timesteps


@on_every_path
@with_every_prediction
def test_time_interval_omits_only_singular_endpoints(path, prediction):
    """The velocity and its error are bounded in the interval and infinite at omitted endpoints."""

    def largest_coefficient(t):
        """Return the largest of the path coefficients and the prediction-to-velocity factor."""
        t = torch.tensor([t], dtype=torch.float64)
        one = torch.ones(1, 1, dtype=torch.float64)
        zero = torch.zeros(1, 1, dtype=torch.float64)
        factor = prediction_to_velocity(path, prediction, one, zero, t)
        factor = factor - prediction_to_velocity(path, prediction, zero, zero, t)
        coefficients = (factor, *path.coefficients(t))
        return max(value.abs().nan_to_num(torch.inf).max() for value in coefficients)

    low, high = time_interval(path, prediction)
    assert low < 0.01 and high > 0.99
    assert all(largest_coefficient(t) < 2000 for t in (low, 0.5, high))
    if low != 0:
        assert largest_coefficient(0.0) > 1e12
    if high != 1:
        assert largest_coefficient(1.0) > 1e12


@on_every_path
@with_every_prediction
def test_float32_is_accurate_at_the_ends_of_the_time_interval(path, prediction):
    x, noise, _ = make_example()
    for t in map(torch.tensor, time_interval(path, prediction)):
        t = t.expand(6)
        x_t, v = interpolate(path, x, noise, t.double())
        output = regression_target(prediction, x, noise, v).float()
        torch.testing.assert_close(
            prediction_to_velocity(path, prediction, output, x_t.float(), t).double(),
            v,
            rtol=0,
            atol=2e-3,
        )


def test_uniform_times_cover_the_time_interval():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for name in ("linear", "cosine"):
        assert torch.equal(draw_times(INTERPOLANTS[name], "v", "uniform", u), u)
    torch.testing.assert_close(draw_times(INTERPOLANTS["linear"], "eps", "uniform", u), 0.999 * u)
    torch.testing.assert_close(
        draw_times(INTERPOLANTS["vp"], "eps", "uniform", u), 0.001 + 0.999 * u
    )


@on_every_path
@with_every_prediction
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_times_increase_with_u_and_stay_inside_the_interval(path, prediction, weighting):
    u = torch.cat((torch.logspace(-9, -1, 50).double(), 1 - torch.logspace(-1, -9, 50).double()))
    t = draw_times(path, prediction, weighting, u)
    low, high = time_interval(path, prediction)
    assert t.dtype == torch.float64 and (t.diff() >= 0).all() and low <= t[0] < t[-1] <= high


@on_every_path
def test_lognormal_times_have_a_normal_log_ratio_of_sigma_to_alpha(path):
    """Compare quantiles with scipy, and linear and cosine times with the formulas of REPA."""
    u = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    t = draw_times(path, "v", "lognormal", u)
    alpha, sigma, _, _ = path.coefficients(t)
    normal_quantiles = torch.from_numpy(norm.ppf(u.numpy()))
    torch.testing.assert_close((sigma / alpha).log(), normal_quantiles, rtol=0, atol=1e-9)
    if path is INTERPOLANTS["linear"]:
        torch.testing.assert_close(t, normal_quantiles.exp() / (1 + normal_quantiles.exp()))
    if path is INTERPOLANTS["cosine"]:
        torch.testing.assert_close(t, 2 / math.pi * torch.atan(normal_quantiles.exp()))
