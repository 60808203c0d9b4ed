"""Interpolants, predictions and times, against derivatives, closed forms and other repositories."""

import math

import pytest
import torch
from scipy.stats import norm

from interpolant import (
    INTERPOLANTS,
    PREDICTIONS,
    WEIGHTINGS,
    draw_times,
    interpolate,
    prediction_to_velocity,
    regression_target,
    score_to_velocity,
    time_interval,
    velocity_to_prediction,
    velocity_to_score,
)

paths = pytest.mark.parametrize("path", INTERPOLANTS.values(), ids=INTERPOLANTS)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def example(n=6):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, n, 3, 4, 4, dtype=torch.float64, generator=generator)
    return x, noise, torch.linspace(0.05, 0.95, n, dtype=torch.float64)


@paths
def test_velocity_is_the_derivative_of_the_path(path):
    x, noise, t = example()
    for i in range(len(t)):
        _, v = interpolate(path, x[i : i + 1], noise[i : i + 1], t[i : i + 1])
        derivative = torch.autograd.functional.jacobian(
            lambda s, i=i: interpolate(path, x[i : i + 1], noise[i : i + 1], s)[0], t[i : i + 1]
        )
        torch.testing.assert_close(v, derivative[..., 0], rtol=1e-12, atol=1e-12)


@paths
def test_time_zero_is_data_and_time_one_is_noise(path):
    x, noise, _ = example()
    torch.testing.assert_close(
        interpolate(path, x, noise, torch.zeros(6, dtype=torch.float64))[0], x
    )
    # DDPM's schedule ends before the data has vanished.
    left = math.exp(-10.05 / 2) if path is INTERPOLANTS["vp"] else 0.0
    end = interpolate(path, x, noise, torch.ones(6, dtype=torch.float64))[0]
    torch.testing.assert_close(end, left * x + (1 - left**2) ** 0.5 * noise)


@paths
def test_score_of_a_known_point_is_minus_noise_over_sigma(path):
    x, noise, t = example()
    x_t, v = interpolate(path, x, noise, t)
    sigma = path.coefficients(t)[1][:, None, None, None]
    torch.testing.assert_close(velocity_to_score(path, v, x_t, t), -noise / sigma)


@paths
def test_score_and_velocity_are_inverses(path):
    x_t, v, t = example()
    torch.testing.assert_close(
        score_to_velocity(path, velocity_to_score(path, v, x_t, t), x_t, t), v
    )


def test_score_is_repas_formula():
    """(alpha / alpha' v - x) / (sigma^2 - alpha / alpha' sigma' sigma), on the cosine path."""
    x_t, v, t = example()
    angle = t[:, None, None, None] * math.pi / 2
    ratio = -torch.cos(angle) / (math.pi / 2 * torch.sin(angle))
    variance = torch.sin(angle) ** 2 - ratio * (math.pi / 2 * torch.cos(angle)) * torch.sin(angle)
    torch.testing.assert_close(
        velocity_to_score(INTERPOLANTS["cosine"], v, x_t, t), (ratio * v - x_t) / variance
    )


def test_time_and_velocity_are_reversed_compared_to_the_sit_repository():
    """SiT defines x_s = s x + (1 - s) eps with velocity x - eps, where s = 1 - t."""
    x, noise, t = example()
    x_t, v = interpolate(INTERPOLANTS["linear"], x, noise, t)
    s = (1 - t)[:, None, None, None]
    torch.testing.assert_close(x_t, s * x + (1 - s) * noise)
    torch.testing.assert_close(v, -(x - noise))


# The VP path


def test_vp_preserves_the_variance_and_follows_the_thousand_steps_of_ddpm():
    """Compare with DDPM, whose log alpha_bar is a sum of log(1 - beta).

    The interpolant has its limit, the integral of -beta. Each step differs by beta^2 / 2 and half a
    step.
    """
    k = torch.arange(1001, dtype=torch.float64)
    alpha, sigma, _, _ = INTERPOLANTS["vp"].coefficients(k / 1000)
    torch.testing.assert_close(
        alpha**2 + sigma**2, torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15
    )
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    discrete = (1 - betas).log().cumsum(0)
    assert (
        (2 * alpha[1:].log() - discrete).abs()
        < (0.51 * betas**2).cumsum(0) + k[1:] * (betas[1] - betas[0]) / 2
    ).all()


def test_vp_is_exact_in_float32_down_to_its_first_step():
    t = torch.logspace(-5, 0, 200)
    for rough, fine in zip(
        INTERPOLANTS["vp"].coefficients(t), INTERPOLANTS["vp"].coefficients(t.double())
    ):
        torch.testing.assert_close(rough.double(), fine, rtol=2e-6, atol=0)


# What the network predicts


@paths
@predictions
def test_a_prediction_and_its_velocity_are_inverses(path, prediction):
    x_t, v, t = example()
    torch.testing.assert_close(
        prediction_to_velocity(
            path, prediction, velocity_to_prediction(path, prediction, v, x_t, t), x_t, t
        ),
        v,
    )
    torch.testing.assert_close(
        velocity_to_prediction(
            path, prediction, prediction_to_velocity(path, prediction, v, x_t, t), x_t, t
        ),
        v,
    )


@paths
@predictions
def test_the_target_is_what_the_paths_velocity_comes_from(path, prediction):
    x, noise, t = example()
    x_t, v = interpolate(path, x, noise, t)
    target = regression_target(prediction, x, noise, v)
    assert torch.equal(target, {"v": v, "x": x, "eps": noise}[prediction])
    torch.testing.assert_close(prediction_to_velocity(path, prediction, target, x_t, t), v)
    torch.testing.assert_close(velocity_to_prediction(path, prediction, v, x_t, t), target)


@paths
@predictions
def test_to_guide_a_prediction_is_to_guide_its_velocity_and_score(path, prediction):
    x_t, with_class, t = example()
    without = with_class.roll(1, 0)

    def guide(a, b):
        return b + 1.8 * (a - b)

    def velocity(output):
        return prediction_to_velocity(path, prediction, output, x_t, t)

    def score(output):
        return velocity_to_score(path, velocity(output), x_t, t)

    for quantity in (velocity, score):
        torch.testing.assert_close(
            quantity(guide(with_class, without)), guide(quantity(with_class), quantity(without))
        )


# Times


@paths
@predictions
def test_endpoint_is_removed_if_and_only_if_it_is_singular(path, prediction):
    """Check the coefficients and the factor from an error of the prediction to one of the velocity.

    They are bounded in `time_interval`, and infinite at an end that it excludes.
    """

    def size(t):
        t = torch.tensor([t], dtype=torch.float64)
        one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        gain = prediction_to_velocity(path, prediction, one, none, t) - prediction_to_velocity(
            path, prediction, none, none, t
        )
        return max(
            number.abs().nan_to_num(torch.inf).max() for number in (gain, *path.coefficients(t))
        )

    lo, hi = time_interval(path, prediction)
    assert all(size(t) < 2000 for t in (lo, 0.5, hi)) and lo < 0.01 and hi > 0.99
    assert all(size(end) > 1e12 for t, end in ((lo, 0.0), (hi, 1.0)) if t != end)


@paths
@predictions
def test_float32_is_accurate_at_both_ends(path, prediction):
    x, noise, _ = example()
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


def test_uniform_times_of_velocity_are_the_draws_themselves():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for name in ("linear", "cosine"):
        assert torch.equal(draw_times(INTERPOLANTS[name], "v", "uniform", u), u)
    torch.testing.assert_close(draw_times(INTERPOLANTS["linear"], "eps", "uniform", u), 0.999 * u)
    torch.testing.assert_close(
        draw_times(INTERPOLANTS["vp"], "eps", "uniform", u), 0.001 + 0.999 * u
    )


@paths
@predictions
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_times_rise_with_the_draws_and_stay_inside(path, prediction, weighting):
    u = torch.cat((torch.logspace(-9, -1, 50).double(), 1 - torch.logspace(-1, -9, 50).double()))
    t, (lo, hi) = draw_times(path, prediction, weighting, u), time_interval(path, prediction)
    assert t.dtype == torch.float64 and (t.diff() >= 0).all() and lo <= t[0] < t[-1] <= hi


@paths
def test_lognormal_times_have_log_normal_noise(path):
    """Compare quantiles with scipy, and on two paths with the formulas in REPA's loss.py."""
    u = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
    t = draw_times(path, "v", "lognormal", u)
    alpha, sigma, _, _ = path.coefficients(t)
    normal = torch.from_numpy(norm.ppf(u.numpy()))
    torch.testing.assert_close((sigma / alpha).log(), normal, rtol=0, atol=1e-9)
    repas = {
        "linear": normal.exp() / (1 + normal.exp()),
        "cosine": 2 / math.pi * torch.atan(normal.exp()),
        "vp": t,
    }
    torch.testing.assert_close(
        t, next(repas[name] for name in INTERPOLANTS if INTERPOLANTS[name] is path)
    )
