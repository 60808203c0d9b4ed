import pytest
import torch

from interpolant import PATHS
from keyed_random import Purpose, normal
from samplers import guided, ode, sde

MEAN, STD = 0.7, 0.5


def gaussian_velocity(path):
    """E[v | x_t] for one-dimensional data N(MEAN, STD^2): exact, so what a sampler gets wrong is the sampler's."""

    def velocity(x, t):
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in path.coefficients(torch.tensor(t, dtype=torch.float64)))
        variance = alpha**2 * STD**2 + sigma**2
        data = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        noise = sigma / variance * (x - alpha * MEAN)
        return d_alpha * data + d_sigma * noise

    return velocity


def start(n=20_000):
    return normal(0, Purpose.START, torch.arange(n), (1,))


@pytest.mark.parametrize("heun", [False, True])
def test_ode_is_exact_on_constant_velocity(heun):
    x = start(10)
    torch.testing.assert_close(ode(lambda x, t: torch.full_like(x, 3.0), x, 7, heun), x - 3)


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_order_of_convergence(heun, order):
    path, x = PATHS["linear"], start(10)
    exact = MEAN + STD * x  # the ODE's map between Gaussians
    errors = [(ode(gaussian_velocity(path), x, n, heun) - exact).abs().max() for n in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:]):
        assert torch.log2(coarse / fine).item() == pytest.approx(order, abs=0.25)


def test_evaluations_are_where_repa_has_them():
    """Euler: n of them. Heun: 2 n - 1, the last step being Euler's."""
    for heun, expected in ((False, [1, 2 / 3, 1 / 3]), (True, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])):
        times = []
        ode(lambda x, t, times=times: times.append(t) or x, start(2), 3, heun)
        assert times == pytest.approx(expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_sde_samples_the_data(path):
    x = start()
    index = torch.arange(len(x))
    samples = sde(gaussian_velocity(path), path, x, 250, lambda i: normal(0, Purpose.BROWNIAN, index, (1,), draw=i))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.02)


def test_sde_schedule_is_repas():
    """num_steps evaluations: from 1 to 0.04, then one to 0 without noise."""
    times, draws = [], []

    def velocity(x, t):
        times.append(t)
        return x

    sde(velocity, PATHS["linear"], start(2), 25, lambda i: draws.append(i) or torch.zeros(2, 1))
    torch.testing.assert_close(torch.tensor(times), torch.linspace(1, 0.04, 25))
    assert draws == list(range(24))


def labelled(x, t, y):
    """A model whose velocity tells which label it got; 9 is the null class."""
    return torch.where(y == 9, 1.0, 3.0)[:, None] * torch.ones_like(x)


def test_scale_one_is_no_guidance_and_never_asks_for_the_null_class():
    asked = []
    velocity = guided(lambda x, t, y: asked.append(y) or labelled(x, t, y), torch.tensor([0, 1]), 9, scale=1.0)
    assert torch.equal(velocity(torch.zeros(2, 1), 0.5), torch.full((2, 1), 3.0))
    assert len(asked) == 1 and not (asked[0] == 9).any()


def test_guidance_formula_and_interval():
    velocity = guided(labelled, torch.tensor([0, 1]), 9, scale=2.5, low=0.2, high=0.8)
    for t, expected in ((0.2, 6.0), (0.5, 6.0), (0.8, 6.0), (0.19, 3.0), (0.81, 3.0)):
        assert torch.equal(velocity(torch.zeros(2, 1), t), torch.full((2, 1), expected)), t


def test_guiding_the_velocity_guides_the_drift():
    """REPA guides v - w s / 2; the score is affine in v, so both are the same."""
    path, x, t = PATHS["linear"], start(4), torch.full((4,), 0.6, dtype=torch.float64)
    from interpolant import velocity_to_score

    v, v_null = torch.randn(2, 4, 1, dtype=torch.float64)

    def drift(v):
        return v - 0.6 * velocity_to_score(path, v, x, t)

    torch.testing.assert_close(drift(v_null + 2 * (v - v_null)), drift(v_null) + 2 * (drift(v) - drift(v_null)))


def test_state_keeps_its_dtype_and_the_network_sees_float32():
    seen = []
    velocity = guided(lambda x, t, y: seen.append(x.dtype) or labelled(x, t, y), torch.tensor([0, 1]), 9, scale=2.0)
    assert ode(velocity, torch.zeros(2, 1, dtype=torch.float64), 2).dtype == torch.float64
    assert set(seen) == {torch.float32}
