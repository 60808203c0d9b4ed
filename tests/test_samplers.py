"""Solvers against what is known exactly: Gaussian data, whose velocity and marginals are given by formulas, integrated once
more by scipy and by linear recursions that share no code with what is tested."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import RK45, solve_ivp

import samplers
from common.keyed_random import Purpose, normal
from experiments import solvers
from experiments.solvers import example_gaussian, sde_moments
from interpolant import INTERPOLANTS, PREDICTIONS, prediction_to_velocity, time_interval
from samplers import GuidedVelocity, VelocityModel, denoise, dopri5, guided_dopri5, ode, sde
from sampling.recipe import Recipe
from tests.helpers import ROOT

DATA, NULL = example_gaussian([0.3, 0.7, 1.6]), example_gaussian([0.5, 1.1, 1.3], seed=1)
SCALE, LOW, HIGH = (
    1.8,
    0.25 + 1e-6,
    0.75 + 1e-6,
)  # grids of 4 n steps then guide on just (0.25, 0.75]
COEFFICIENTS = {
    "linear": lambda t: (1 - t, t, -1, 1),
    "cosine": lambda t: (
        math.cos(math.pi * t / 2),
        math.sin(math.pi * t / 2),
        -math.pi / 2 * math.sin(math.pi * t / 2),
        math.pi / 2 * math.cos(math.pi * t / 2),
    ),
    "vp": lambda t: vp(math.exp(-9.95 * t**2 - 0.1 * t), 0.1 + 19.9 * t),
}
both = pytest.mark.parametrize(
    "name", ("linear", "cosine")
)  # nothing is singular on them, for velocities
objectives = pytest.mark.parametrize(
    ("name", "prediction"), [(name, one) for name in INTERPOLANTS for one in PREDICTIONS]
)


def vp(variance, beta):
    """Of the squared alpha and its rate of decay."""
    alpha, sigma = variance**0.5, (1 - variance) ** 0.5
    return alpha, sigma, -beta / 2 * alpha, beta / 2 * variance / sigma


def start(n=10, d=3):
    return normal(0, Purpose.INITIAL_NOISE, torch.arange(n), (d,))


def affine(data, name, t, w=0.0):
    """M and c of the drift M x + c = v - w s / 2 of N(m, S), from how mean and covariance of x_t move: numpy, float64."""
    alpha, sigma, d_alpha, d_sigma = COEFFICIENTS[name](t)
    mean, covariance, one = data.mean.numpy(), data.covariance.numpy(), np.eye(3)
    inverse = np.linalg.inv(alpha**2 * covariance + sigma**2 * one)
    matrix = (alpha * d_alpha * covariance + sigma * d_sigma * one) @ inverse + w / 2 * inverse
    return matrix, d_alpha * mean - alpha * matrix @ mean


def guided_affine(name, t, w=0.0):
    """The same under guidance of the drift, inside the interval."""
    scale = SCALE if LOW <= t <= HIGH else 1
    (matrix, c), (null_matrix, null_c) = affine(DATA, name, t, w), affine(NULL, name, t, w)
    return null_matrix + scale * (matrix - null_matrix), null_c + scale * (c - null_c)


def integrate(drift, x, edges=(1.0, 0.0)):
    """x (B, 3) from the first edge to the last, through dx/dt = M x + c, by scipy."""
    for begin, end in itertools.pairwise(edges):

        def slope(t, y, begin=begin, end=end):
            matrix, c = drift(
                min(max(t, end + 1e-9), begin - 1e-9)
            )  # where it jumps at an edge, the side that is meant
            return (y.reshape(-1, 3) @ matrix.T + c).ravel()

        x = (
            solve_ivp(slope, (begin, end), x.ravel(), method="DOP853", rtol=1e-11, atol=1e-11)
            .y[:, -1]
            .reshape(-1, 3)
        )
    return torch.from_numpy(x)


def affine_data(name, t):
    """M and c of the denoised image M x + c = E[x | x_t]: numpy, float64."""
    alpha, sigma, _, _ = COEFFICIENTS[name](t)
    mean, covariance = DATA.mean.numpy(), DATA.covariance.numpy()
    matrix = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(3))
    return matrix, mean - alpha * matrix @ mean


def recursion(drift, num_steps, last, first=1.0, final_step=None):
    """Mean and covariance that Euler and Maruyama's scheme gives, x_next = A x + b + noise, from N(0, I); `denoise` is the last
    A and b, if they are not the drift's."""
    times = [*np.linspace(first, last, num_steps), 0.0]
    mean, covariance = np.zeros(3), np.eye(3)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        if final_step and t_next == 0:
            matrix, c = final_step
            return torch.from_numpy(matrix @ mean + c), torch.from_numpy(
                matrix @ covariance @ matrix.T
            )
        matrix, c = drift(t, 2 * t)
        step = np.eye(3) + (t_next - t) * matrix
        mean, covariance = step @ mean + (t_next - t) * c, step @ covariance @ step.T
        if i < num_steps - 1:
            covariance += 2 * t * (t - t_next) * np.eye(3)
    return torch.from_numpy(mean), torch.from_numpy(covariance)


def two_gaussians(name):
    """A model of float32 numbers whose classes are all DATA, and whose null class, 9, is NULL."""
    path = INTERPOLANTS[name]

    def model(x, t, y):
        assert x.dtype == t.dtype == torch.float32
        x, t = x.double(), t.double()
        return torch.where((y == 9)[:, None], NULL.velocity(path)(x, t), DATA.velocity(path)(x, t))

    return model


def guided_gaussian(name, n, **interval):
    return GuidedVelocity(two_gaussians(name), torch.arange(n) % 9, 9, SCALE, **interval)


def orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


# The ODE


@both
def test_the_flow_is_what_scipy_integrates_and_gives_the_data(name):
    """The exact answer of the tests below, m + S^(1/2) x, and the velocity they integrate, against an independent form."""
    torch.testing.assert_close(
        integrate(lambda t: affine(DATA, name, t), start().numpy()),
        DATA.flow(start()),
        atol=1e-8,
        rtol=0,
    )
    root = DATA.flow(torch.eye(3).double()) - DATA.mean
    torch.testing.assert_close(root.T @ root, DATA.covariance)
    for t in (0.02, 0.5, 1.0):
        matrix, c = map(torch.from_numpy, affine(DATA, name, t))
        torch.testing.assert_close(
            DATA.velocity(INTERPOLANTS[name])(start(), t), start() @ matrix.T + c
        )


@both
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_order_of_convergence(name, heun, order):
    errors = [
        (ode(DATA.velocity(INTERPOLANTS[name]), start(), n, heun) - DATA.flow(start())).abs().max()
        for n in (32, 64, 128)
    ]
    assert errors[-1] < (4e-2, 3e-3)[heun] and orders(errors) == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize("heun", [False, True])
def test_ode_is_exact_on_constant_velocity(heun):
    torch.testing.assert_close(
        ode(lambda x, t: torch.full_like(x, 3.0), start(), 7, heun), start() - 3
    )


def test_evaluations_are_where_repa_has_them():
    """Euler: n of them. Heun: 2 n - 1, the last step being Euler's."""
    for heun, expected in ((False, [1, 2 / 3, 1 / 3]), (True, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])):
        times = []
        ode(lambda x, t, times=times: times.append(t) or x, start(2), 3, heun)
        assert times == pytest.approx(expected)


# Adaptive steps


def test_tableau_is_scipys():
    for i, row in enumerate(samplers.STAGES[:-1]):
        assert row == pytest.approx(RK45.A[i + 1, : i + 1], rel=1e-15)
    assert samplers.STAGES[-1] == pytest.approx(RK45.B, rel=1e-15)
    assert samplers.NODES[:-1] == pytest.approx(RK45.C[1:], rel=1e-15) and samplers.NODES[-1] == 1
    assert np.abs(samplers.ERROR) == pytest.approx(np.abs(RK45.E), rel=1e-15)
    assert sum(samplers.ERROR) == pytest.approx(0, abs=1e-15)


@both
def test_dopri5_follows_its_tolerance_at_the_cost_of_scipys(name):
    """scipy's RK45 has the same pair, norm and factors, but another first step, which costs it one evaluation more."""
    path, x = INTERPOLANTS[name], start(8)
    velocity = DATA.velocity(path)
    for rtol in (1e-3, 1e-6, 1e-9):
        end, evaluations = dopri5(velocity, x, rtol / 1000, rtol)
        assert (end - DATA.flow(x)).abs().max() < 20 * rtol
        runs = [
            solve_ivp(
                lambda t, y: velocity(torch.from_numpy(y)[None], t)[0].numpy(),
                (1, 0),
                row,
                "RK45",
                rtol=rtol,
                atol=rtol / 1000,
            )
            for row in x.numpy()
        ]
        assert evaluations.double().mean().item() == pytest.approx(
            np.mean([run.nfev for run in runs]), rel=0.2 if rtol == 1e-3 else 0.1
        )


def relaxing(rates):
    """Every number of image i runs after sin(3 t) at the rate rates[i]."""
    return lambda x, t: rates[:, None] * (x - torch.sin(3 * t)[:, None])


def test_an_image_has_its_own_steps():
    """Alone or beside a stiff one, to the bit; its count of evaluations is its own too."""
    rates, x = torch.tensor([1.0, 400.0, 3.0]).double(), start(3, 16)
    calls = []
    end, evaluations = dopri5(lambda y, t: calls.append(t) or relaxing(rates)(y, t), x, 1e-8, 1e-6)
    assert len(calls) == evaluations.max() == evaluations[1] > 4 * evaluations[0]
    assert all(bool((t >= 0).all()) for t in calls)
    for i in range(3):
        alone, count = dopri5(relaxing(rates[i : i + 1]), x[i : i + 1], 1e-8, 1e-6)
        assert torch.equal(alone[0], end[i]) and count.item() == evaluations[i]


def test_an_image_that_turns_nan_ends_and_leaves_the_others_alone():
    calls = []

    def velocity(x, t):
        calls.append(t)
        assert len(calls) < 200
        v = relaxing(torch.ones(2).double())(x, t)
        return torch.where((t < 0.99)[:, None] & (torch.arange(2) == 0)[:, None], torch.nan, v)

    end, _ = dopri5(velocity, start(2))
    alone, _ = dopri5(relaxing(torch.ones(1).double()), start(2)[1:])
    assert end[0].isnan().all() and torch.equal(end[1], alone[0])


def test_dopri5_crosses_a_jump():
    """As at the end of a guidance interval: however tight the tolerance, it ends."""
    end, evaluations = dopri5(
        lambda x, t: torch.where(t < 0.3, 1.0, 5.0)[:, None].to(x).expand_as(x), start(2), 1e-13, 0
    )
    torch.testing.assert_close(end, start(2) - 5 * 0.7 - 0.3, atol=1e-7, rtol=0)
    assert evaluations.max() < 500


# The SDE


@both
def test_sdes_moments_are_those_of_the_scheme(name):
    """Exact, no sampling: the map from start and noise to sample, against the linear recursion of mean and covariance."""
    for num_steps, last in ((2, 0.5), (25, 0.04)):
        moments = sde_moments(
            DATA.velocity(INTERPOLANTS[name]), INTERPOLANTS[name], 3, num_steps, last
        )
        expected = recursion(lambda t, w: affine(DATA, name, t, w), num_steps, last)
        torch.testing.assert_close(moments, expected, rtol=0, atol=1e-12)


@both
def test_sde_has_weak_order_one(name):
    """With a last step that shrinks with the others, mean and covariance tend to the data's; it does not at 0.04 for ever."""

    def error(num_steps, last):
        mean, covariance = sde_moments(
            DATA.velocity(INTERPOLANTS[name]), INTERPOLANTS[name], 3, num_steps, last
        )
        return max(
            (mean - DATA.mean).abs().max(), (covariance - DATA.covariance).abs().max()
        ).item()

    errors = [error(n, 1 / n) for n in (50, 100, 200)]
    assert errors[-1] < 0.02 and orders(errors) == pytest.approx([1, 1], abs=0.2)


@both
def test_sdes_samples_have_the_predicted_moments(name):
    """Drawn as sample_ddp.py draws them; each moment within four of its standard errors."""
    n, steps, path = 10_000, 40, INTERPOLANTS[name]
    index = torch.arange(n)
    samples = sde(
        DATA.velocity(path),
        path,
        start(n),
        steps,
        lambda i: normal(0, Purpose.BROWNIAN, index, (3,), draw=i),
    )
    mean, covariance = recursion(lambda t, w: affine(DATA, name, t, w), steps, 0.04)
    variances = covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() < 4 * (variances / n).sqrt()).all()
    standard_errors = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert ((torch.cov(samples.T) - covariance).abs() < 4 * standard_errors).all()


def test_sde_schedule_is_repas():
    """num_steps evaluations: from 1 to 0.04, then one to 0 without noise."""
    times, draws = [], []

    def velocity(x, t):
        times.append(t)
        return x

    sde(
        velocity,
        INTERPOLANTS["linear"],
        start(2),
        25,
        lambda i: draws.append(i) or torch.zeros(2, 3),
    )
    torch.testing.assert_close(torch.tensor(times), torch.linspace(1, 0.04, 25))
    assert draws == list(range(24))


# Guidance


def labelled(x, t, y):
    """A model whose velocity tells which label it got; 9 is the null class."""
    return torch.where(y == 9, 1.0, 3.0)[:, None] * torch.ones_like(x)


def test_scale_one_is_no_guidance_and_never_asks_for_the_null_class():
    for t in (0.5, torch.tensor([0.5, 0.1]).double()):
        asked = []
        velocity = GuidedVelocity(
            lambda x, t, y, asked=asked: asked.append(y) or labelled(x, t, y),
            torch.tensor([0, 1]),
            9,
            scale=1.0,
        )
        assert torch.equal(velocity(torch.zeros(2, 1), t), torch.full((2, 1), 3.0))
        assert len(asked) == 1 and not (asked[0] == 9).any()


def test_guidance_formula_and_interval():
    times, expected = [0.2, 0.5, 0.8, 0.19, 0.81], torch.tensor([[6.0], [6.0], [6.0], [3.0], [3.0]])
    velocity = GuidedVelocity(labelled, torch.arange(5), 9, scale=2.5, low=0.2, high=0.8)
    for t, one in zip(times, expected):
        assert torch.equal(velocity(torch.zeros(5, 1), t), one.expand(5, 1)), t
    assert torch.equal(
        velocity(torch.zeros(5, 1), torch.tensor(times, dtype=torch.float64)), expected
    )  # each image at its own time


def test_the_null_class_is_not_asked_outside_the_interval():
    asked = []
    velocity = GuidedVelocity(
        lambda x, t, y: asked.append(len(y)) or labelled(x, t, y),
        torch.tensor([0, 1]),
        9,
        2.0,
        0.2,
        0.8,
    )
    for t in (0.1, 0.5, 0.9):
        velocity(torch.zeros(2, 1), t)
    assert asked == [2, 4, 2]


@both
def test_guided_ode_is_the_guided_flow(name):
    """Guidance between two Gaussians is affine again, and inside an interval scipy integrates it piece by piece."""
    x, model = start(6), two_gaussians(name)
    exact = integrate(lambda t: guided_affine(name, t), x.numpy(), (1.0, HIGH, LOW, 0.0))
    assert (exact - DATA.flow(x)).abs().max() > 0.3
    errors = [
        (ode(guided_gaussian(name, 6, low=LOW, high=HIGH), x, n) - exact).abs().max()
        for n in (32, 64, 128)
    ]
    assert errors[-1] < 8e-2 and orders(errors) == pytest.approx([1, 1], abs=0.2)
    calls = []
    end, evaluations = guided_dopri5(
        lambda x, t, y: calls.append(len(y)) or model(x, t, y),
        torch.arange(6),
        9,
        x,
        SCALE,
        LOW,
        HIGH,
        1e-6,
        1e-6,
    )
    assert sorted(set(calls)) == [6, 12] and max(
        calls.count(6), calls.count(12)
    ) < evaluations.max() <= len(calls)
    torch.testing.assert_close(end, exact, atol=2e-5, rtol=0)
    fine, _ = guided_dopri5(model, torch.arange(6), 9, x, SCALE, atol=1e-6, rtol=1e-6)
    errors = [
        (ode(guided_gaussian(name, 6), x, n, heun=True) - fine).abs().max() for n in (32, 64, 128)
    ]
    assert errors[-1] < 5e-3 and orders(errors) == pytest.approx([2, 2], abs=0.3)


@both
def test_guided_sdes_moments_are_those_of_the_guided_drift(name):
    """REPA guides v - w s / 2; the score is affine in v, so guiding v is the same."""
    rows = 1 + 3 * 24
    moments = sde_moments(
        guided_gaussian(name, rows, low=LOW, high=HIGH), INTERPOLANTS[name], 3, 24, 0.04
    )
    expected = recursion(lambda t, w: guided_affine(name, t, w), 24, 0.04)
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)  # the network sees float32


# Every objective


def flow_between(name, ends, x):
    """Where the exact flow takes x (B, 3) from hi to lo, and E[x | x_lo] of that, in closed form, each quantile staying one."""
    (alpha, sigma, _, _), (alpha_hi, sigma_hi, _, _) = map(COEFFICIENTS[name], ends)
    std, std_hi = (
        (a**2 * DATA.std**2 + b**2).sqrt() for a, b in ((alpha, sigma), (alpha_hi, sigma_hi))
    )
    quantile = (x - alpha_hi * DATA.mean) @ DATA.axes / std_hi
    return (
        DATA.mean + alpha * DATA.std**2 / std * quantile @ DATA.axes.T
        if ends[0] > 0
        else DATA.flow(quantile @ DATA.axes.T)
    )


def perfect(name, prediction):
    """The velocity of a perfect network of that prediction, in float64."""
    path, output = INTERPOLANTS[name], DATA.predict_expected(INTERPOLANTS[name], prediction)

    def velocity(x, t):
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return prediction_to_velocity(path, prediction, output(x, times), x, times)

    return velocity


def moments(solve):
    """Mean and covariance of what a map affine in N(0, I) makes of it."""
    end = solve(torch.cat((torch.zeros(1, 3), torch.eye(3))).double())
    return end[0], (end[1:] - end[0]).T @ (end[1:] - end[0])


@objectives
def test_every_objective_has_the_datas_moments(name, prediction):
    """Exact, no sampling. Left are, of the mean, that the start is taken for noise alone while alpha(hi) is up to 0.007; of the
    covariance, on linear with eps, that its start is too wide by 0.001; and the SDE's own error, 1.5% and of order 1."""
    path, ends, velocity = (
        INTERPOLANTS[name],
        time_interval(INTERPOLANTS[name], prediction),
        perfect(name, prediction),
    )
    lo, hi = ends

    def adaptive(x):
        end, _ = dopri5(velocity, x, 1e-9, 1e-6, hi, lo)
        return denoise(velocity, path, end, lo) if lo > 0 else end

    ways = {
        "Heun": moments(lambda x: ode(velocity, x, 128, True, path, ends)),
        "dopri5": moments(adaptive),
        "SDE": sde_moments(velocity, path, 3, 128, ends=ends),
    }
    for way, (mean, covariance) in ways.items():
        assert (mean - DATA.mean).norm() / DATA.mean.norm() < 0.008, way
        assert (covariance - DATA.covariance).norm() / DATA.covariance.norm() < (
            0.016 if way == "SDE" else 0.0025
        ), way


@objectives
def test_solvers_go_from_end_to_end_of_the_interval(name, prediction):
    """dopri5 to its tolerance, Heun with its order, the SDE as the recursion has it, all with the last step."""
    path, ends, velocity, x = (
        INTERPOLANTS[name],
        time_interval(INTERPOLANTS[name], prediction),
        perfect(name, prediction),
        start(),
    )
    exact = flow_between(name, ends, x)
    errors = [(ode(velocity, x, n, True, path, ends) - exact).abs().max() for n in (64, 128, 256)]
    assert errors[-1] < 1e-4 and orders(errors) == pytest.approx([2] * 2, abs=0.1)
    lo, hi = ends
    expected = recursion(
        lambda t, w: affine(DATA, name, t, w),
        25,
        lo or 0.04,
        hi,
        affine_data(name, lo) if lo else None,
    )
    torch.testing.assert_close(
        sde_moments(velocity, path, 3, 25, ends=ends), expected, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_where_nothing_is_singular_the_samples_are_those_of_the_velocity(name):
    x, path, ends = start(), INTERPOLANTS[name], (0.001, 0.999)
    noise = normal(1, Purpose.INITIAL_NOISE, torch.arange(8), (3,))
    for solve in (
        lambda velocity: ode(velocity, x, 8, False, path, ends),
        lambda velocity: ode(velocity, x, 8, True, path, ends),
        lambda velocity: sde(velocity, path, x, 8, lambda i: noise[i], ends=ends),
    ):
        v, *others = (solve(perfect(name, prediction)) for prediction in PREDICTIONS)
        for other in others:
            torch.testing.assert_close(other, v, rtol=0, atol=1e-10)


def test_dopri5s_last_step_is_guided_where_its_time_is():
    for low, high, asked in ((0.0, 1.0, 4), (0.3, 0.7, 2), (0.0, 0.0005, 2)):
        sizes = []
        _, evaluations = guided_dopri5(
            lambda x, t, y, sizes=sizes: sizes.append(len(y)) or x,
            torch.arange(2),
            9,
            start(2),
            SCALE,
            low,
            high,
            path=INTERPOLANTS["linear"],
            ends=(0.001, 1.0),
        )
        assert sizes[-1] == asked and evaluations.max() <= len(sizes)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.001, 0.999)])
def test_evaluations_are_as_many_whatever_the_interval(ends):
    for heun, count in ((False, 5), (True, 9)):
        times = []
        ode(
            lambda x, t, times=times: times.append(t) or x,
            start(2),
            5,
            heun,
            INTERPOLANTS["cosine"],
            ends,
        )
        assert len(times) == count and times[0] == ends[1] and (times[-1] == 0.001) == (ends[0] > 0)
    times = []
    sde(
        lambda x, t: times.append(t) or x,
        INTERPOLANTS["cosine"],
        start(2),
        5,
        lambda i: torch.zeros(2, 3),
        ends=ends,
    )
    assert len(times) == 5 and (times[0], times[-1]) == (ends[1], ends[0] or 0.04)


def network_of(name, prediction, channels=3):
    """Shaped as a SiT: float32 images (B, C, 1, 1) of classes that are all DATA, and of the null class 9, NULL."""
    outputs = [data.predict_expected(INTERPOLANTS[name], prediction) for data in (DATA, NULL)]

    def network(x, t, y):
        assert x.dtype == t.dtype == torch.float32
        with_class, without = (
            output(x.flatten(1).double(), t.double()).float() for output in outputs
        )
        return torch.where((y == 9)[:, None], without, with_class).reshape(x.shape)

    network.config = SimpleNamespace(channels=channels, latent_size=1, num_classes=9)
    return network


@objectives
def test_a_recipe_serves_every_objective(name, prediction):
    """As sample_ddp.py has it: a float32 network's own prediction, on a grid and with adaptive steps, to the exact end."""
    index, model, ends = (
        torch.arange(10),
        network_of(name, prediction),
        time_interval(INTERPOLANTS[name], prediction),
    )
    exact = flow_between(name, ends, start()).float()
    for more, tolerance in (
        ({"heun": True, "num_steps": 128}, 5e-4),
        ({"dopri5": True, "rtol": 1e-4}, 2e-3),
    ):
        recipe = Recipe("ode", path_type=name, prediction=prediction, **more)
        latents = recipe.sample_latents(model, index).flatten(1)
        assert (latents - exact).abs().max() < tolerance, more
    recipe = Recipe("sde", num_steps=20, path_type=name, prediction=prediction)
    noise = [normal(0, Purpose.BROWNIAN, index, (3,), draw=i) for i in range(19)]
    by_hand = sde(
        perfect(name, prediction), INTERPOLANTS[name], start(), 20, lambda i: noise[i], ends=ends
    )
    torch.testing.assert_close(
        recipe.sample_latents(model, index).flatten(1).double(), by_hand, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "prediction"),
    [(name, one) for name in INTERPOLANTS for one in PREDICTIONS if one != "v"],
)
def test_guidance_of_every_objective_is_that_of_velocity(name, prediction):
    """On a grid and in dopri5's pieces, inside an interval that reaches beyond the network's."""
    path, x, labels = INTERPOLANTS[name], start(6).float(), torch.arange(6)
    ends = (0.001, 0.999)
    models = [VelocityModel(network_of(name, one), path, one) for one in (prediction, "v")]
    for low, high in ((0.0, 1.0), (0.3, 0.7), (0.0, 0.0005)):
        ours, by_velocity = (
            (
                ode(GuidedVelocity(model, labels, 9, SCALE, low, high), x, 9, True, path, ends),
                guided_dopri5(model, labels, 9, x, SCALE, low, high, 1e-4, 1e-4, path, ends)[0],
            )
            for model in models
        )
        for one, other in zip(ours, by_velocity):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
        plain = ode(GuidedVelocity(models[0], labels, 9), x, 9, True, path, ends)
        assert (high < 0.001) == torch.equal(ours[0], plain)


# All of them


def test_state_keeps_its_dtype_and_the_network_sees_float32():
    seen = []

    def model(x, t, y):
        seen.append((x.dtype, t.dtype))
        return labelled(x, t, y)

    velocity = GuidedVelocity(model, torch.tensor([0, 1]), 9, scale=2.0)
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, 1, dtype=dtype)
        ends = (
            ode(velocity, x, 2),
            dopri5(velocity, x)[0],
            sde(velocity, INTERPOLANTS["linear"], x, 2, lambda i: torch.ones(2, 1).double()),
        )
        assert {end.dtype for end in ends} == {dtype}
    assert set(seen) == {(torch.float32, torch.float32)}


def test_no_step_of_a_fixed_grid_waits_for_the_device():
    """On the meta device there is nothing to wait for: asking for a value is an error."""
    x, labels = torch.empty(2, 3, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    velocity = GuidedVelocity(
        lambda x, t, y: x * t[:, None] + y[:, None], labels, 9, 2.0, LOW, HIGH
    )
    assert (
        ode(velocity, x, 4, heun=True).is_meta
        and sde(velocity, INTERPOLANTS["cosine"], x, 4, lambda i: x).is_meta
    )
    assert velocity(x, torch.empty(2, device="meta")).is_meta
    with pytest.raises(RuntimeError):
        dopri5(velocity, x)


def test_the_documents_figures_are_those_that_were_measured():
    """docs/solvers.json is what `python -m experiments.solvers` wrote; spot checks that it would write the same now."""
    figures = json.loads((ROOT / "docs/solvers.json").read_text())
    text = (ROOT / "docs/sampling.md").read_text()
    assert all(table in text for table in solvers.markdown_tables(figures))
    data = example_gaussian(solvers.EXAMPLE_STDS)
    end = ode(data.velocity(INTERPOLANTS["linear"]), solvers.start_noise(data), 16, heun=True)
    assert solvers.relative_rms_error(
        data, end, data.flow(solvers.start_noise(data))
    ) == pytest.approx(
        figures["ode"]["linear"]["Heun"]["error"][solvers.EVALUATION_COUNTS.index(32)], rel=1e-3
    )
