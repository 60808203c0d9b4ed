import math

import pytest
import torch

from interpolant import PATHS, interpolate, score_to_velocity, velocity_to_score

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


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
    torch.testing.assert_close(interpolate(path, x, noise, torch.zeros(6, dtype=torch.float64))[0], x)
    torch.testing.assert_close(interpolate(path, x, noise, torch.ones(6, dtype=torch.float64))[0], noise)


@paths
def test_score_of_a_known_point_is_minus_noise_over_sigma(path):
    x, noise, t = example()
    x_t, v = interpolate(path, x, noise, t)
    sigma = path.coefficients(t)[1][:, None, None, None]
    torch.testing.assert_close(velocity_to_score(path, v, x_t, t), -noise / sigma)


@paths
def test_score_and_velocity_are_inverses(path):
    x_t, v, t = example()
    torch.testing.assert_close(score_to_velocity(path, velocity_to_score(path, v, x_t, t), x_t, t), v)


def test_score_is_repas_formula():
    """(alpha / alpha' v - x) / (sigma^2 - alpha / alpha' sigma' sigma), on the cosine path."""
    x_t, v, t = example()
    angle = t[:, None, None, None] * math.pi / 2
    ratio = -torch.cos(angle) / (math.pi / 2 * torch.sin(angle))
    variance = torch.sin(angle) ** 2 - ratio * (math.pi / 2 * torch.cos(angle)) * torch.sin(angle)
    torch.testing.assert_close(velocity_to_score(PATHS["cosine"], v, x_t, t), (ratio * v - x_t) / variance)


def test_the_sit_repository_counts_time_backwards():
    """There x_s = s x + (1 - s) eps with velocity x - eps: ours at t = 1 - s, with the sign turned."""
    x, noise, t = example()
    x_t, v = interpolate(PATHS["linear"], x, noise, t)
    s = (1 - t)[:, None, None, None]
    torch.testing.assert_close(x_t, s * x + (1 - s) * noise)
    torch.testing.assert_close(v, -(x - noise))
