"""Test the solvers on Gaussian data, for which velocity and marginals are known exactly.

The exact results come from closed forms, from scipy's integrators and from linear recursions that
share no code with the solvers.
"""

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
from samplers import (
    UNIT_INTERVAL,
    GuidedVelocity,
    VelocityModel,
    denoise,
    dopri5,
    euler,
    euler_maruyama,
    guided_dopri5,
    heun,
    ode_times,
    sde_times,
)
from sampling.recipe import Recipe
from tests.helpers import ROOT

DATA = example_gaussian([0.3, 0.7, 1.6])
NULL = example_gaussian([0.5, 1.1, 1.3], seed=1)
NULL_CLASS = 9
SCALE = 1.8
# On grids of 4 n steps, guidance applies exactly on (0.25, 0.75].
LOW = 0.25 + 1e-6
HIGH = 0.75 + 1e-6
LINEAR = INTERPOLANTS["linear"]
COSINE = INTERPOLANTS["cosine"]


def linear_coefficients(t):
    return 1 - t, t, -1, 1


def cosine_coefficients(t):
    cos = math.cos(math.pi * t / 2)
    sin = math.sin(math.pi * t / 2)
    return cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos


def vp_coefficients(t):
    variance = math.exp(-9.95 * t**2 - 0.1 * t)
    beta = 0.1 + 19.9 * t
    alpha = variance**0.5
    sigma = (1 - variance) ** 0.5
    return alpha, sigma, -beta / 2 * alpha, beta / 2 * variance / sigma


COEFFICIENTS = {
    "linear": linear_coefficients,
    "cosine": cosine_coefficients,
    "vp": vp_coefficients,
}
# The velocity has no singularity on these paths.
on_regular_paths = pytest.mark.parametrize("name", ["linear", "cosine"])
on_every_objective = pytest.mark.parametrize(
    ("name", "prediction"), list(itertools.product(INTERPOLANTS, PREDICTIONS))
)
with_both_ode_solvers = pytest.mark.parametrize("solver", [euler, heun])


def initial_noise(n=10, d=3):
    return normal(0, Purpose.INITIAL_NOISE, torch.arange(n), (d,))


def affine_drift(data, name, t, w=0.0):
    """Return M and c of the drift M x + c = v - w s / 2 of Gaussian data, as float64 numpy arrays.

    The drift follows from the change of the mean and the covariance of x_t.
    """
    alpha, sigma, d_alpha, d_sigma = COEFFICIENTS[name](t)
    mean = data.mean.numpy()
    covariance = data.covariance.numpy()
    identity = np.eye(3)
    inverse = np.linalg.inv(alpha**2 * covariance + sigma**2 * identity)
    matrix = (alpha * d_alpha * covariance + sigma * d_sigma * identity) @ inverse + w / 2 * inverse
    return matrix, d_alpha * mean - alpha * matrix @ mean


def guided_affine_drift(name, t, w=0.0):
    """Return M and c of the drift with guidance between DATA and NULL inside [LOW, HIGH]."""
    scale = SCALE if LOW <= t <= HIGH else 1
    matrix, c = affine_drift(DATA, name, t, w)
    null_matrix, null_c = affine_drift(NULL, name, t, w)
    return null_matrix + scale * (matrix - null_matrix), null_c + scale * (c - null_c)


def affine_denoiser(name, t):
    """Return M and c of the denoised image M x + c = E[x_0 | x_t] of DATA, as numpy arrays."""
    alpha, sigma, _, _ = COEFFICIENTS[name](t)
    mean = DATA.mean.numpy()
    covariance = DATA.covariance.numpy()
    matrix = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(3))
    return matrix, mean - alpha * matrix @ mean


def integrate_with_scipy(drift, x, edges=(1.0, 0.0)):
    """Integrate dx/dt = M x + c for x (B, 3) from the first edge to the last.

    The drift may jump at an edge; each piece uses its value inside the piece.
    """
    for begin, end in itertools.pairwise(edges):

        def slope(t, y, begin=begin, end=end):
            matrix, c = drift(min(max(t, end + 1e-9), begin - 1e-9))
            return (y.reshape(-1, 3) @ matrix.T + c).ravel()

        solution = solve_ivp(
            slope, (begin, end), x.ravel(), method="DOP853", rtol=1e-11, atol=1e-11
        )
        x = solution.y[:, -1].reshape(-1, 3)
    return torch.from_numpy(x)


def euler_maruyama_moments(drift, num_steps, last, first=1.0, denoiser=None):
    """Return mean and covariance of the Euler-Maruyama scheme, which maps N(0, I) affinely.

    Args:
        drift: Returns M and c of the drift, given t and w.
        num_steps: Number of evaluations.
        last: Time at which the last step starts.
        first: Time at which the first step starts.
        denoiser: M and c of the last step, if it is not a step of the drift.
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


def two_gaussians(name):
    """Return a float32 model in which every class is DATA and the null class is NULL."""
    interpolant = INTERPOLANTS[name]

    def model(x, t, labels):
        assert x.dtype == t.dtype == torch.float32
        x = x.double()
        t = t.double()
        v_null = NULL.velocity(interpolant)(x, t)
        v_class = DATA.velocity(interpolant)(x, t)
        return torch.where((labels == NULL_CLASS)[:, None], v_null, v_class)

    return model


def guided_gaussian(name, n, **interval):
    labels = torch.arange(n) % NULL_CLASS
    return GuidedVelocity(two_gaussians(name), labels, NULL_CLASS, SCALE, **interval)


def convergence_orders(errors):
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


# ODE solvers


@on_regular_paths
def test_flow_equals_scipys_solution_and_maps_noise_to_the_data(name):
    """Check the exact solution that other tests use, m + S^(1/2) x, and its velocity."""
    torch.testing.assert_close(
        integrate_with_scipy(lambda t: affine_drift(DATA, name, t), initial_noise().numpy()),
        DATA.flow(initial_noise()),
        atol=1e-8,
        rtol=0,
    )
    root = DATA.flow(torch.eye(3).double()) - DATA.mean
    torch.testing.assert_close(root.T @ root, DATA.covariance)
    for t in (0.02, 0.5, 1.0):
        matrix, c = map(torch.from_numpy, affine_drift(DATA, name, t))
        torch.testing.assert_close(
            DATA.velocity(INTERPOLANTS[name])(initial_noise(), t), initial_noise() @ matrix.T + c
        )


@on_regular_paths
@pytest.mark.parametrize(("solver", "order", "tolerance"), [(euler, 1, 4e-2), (heun, 2, 3e-3)])
def test_ode_solvers_have_their_order_of_convergence(name, solver, order, tolerance):
    exact = DATA.flow(initial_noise())
    velocity = DATA.velocity(INTERPOLANTS[name])
    errors = [
        (solve_ode(solver, velocity, initial_noise(), n) - exact).abs().max() for n in (32, 64, 128)
    ]
    assert errors[-1] < tolerance
    assert convergence_orders(errors) == pytest.approx([order] * 2, abs=0.2)


@with_both_ode_solvers
def test_ode_solvers_are_exact_for_a_constant_velocity(solver):
    end = solve_ode(solver, lambda x, t: torch.full_like(x, 3.0), initial_noise(), 7)
    torch.testing.assert_close(end, initial_noise() - 3)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [(euler, [1, 2 / 3, 1 / 3]), (heun, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])],
)
def test_ode_solvers_evaluate_at_the_same_times_as_repa(solver, expected):
    """Euler takes n evaluations. Heun takes 2 n - 1, because its last step is an Euler step."""
    velocity = RecordedVelocity()
    solve_ode(solver, velocity, initial_noise(2), 3)
    assert velocity.times == pytest.approx(expected)


# Adaptive step sizes


def test_dopri5_tableau_equals_that_of_scipy():
    for i, row in enumerate(samplers.DOPRI5_STAGES[:-1]):
        assert row == pytest.approx(RK45.A[i + 1, : i + 1], rel=1e-15)
    assert samplers.DOPRI5_STAGES[-1] == pytest.approx(RK45.B, rel=1e-15)
    assert samplers.DOPRI5_NODES[:-1] == pytest.approx(RK45.C[1:], rel=1e-15)
    assert samplers.DOPRI5_NODES[-1] == 1
    assert np.abs(samplers.DOPRI5_ERROR) == pytest.approx(np.abs(RK45.E), rel=1e-15)
    assert sum(samplers.DOPRI5_ERROR) == pytest.approx(0, abs=1e-15)


@on_regular_paths
def test_dopri5_meets_its_tolerance_with_as_many_evaluations_as_scipy(name):
    """scipy's RK45 uses the same pair, norm and factors, with one more evaluation at the start."""
    x = initial_noise(8)
    velocity = DATA.velocity(INTERPOLANTS[name])
    for rtol in (1e-3, 1e-6, 1e-9):
        end, evaluations = dopri5(velocity, x, rtol / 1000, rtol)
        assert (end - DATA.flow(x)).abs().max() < 20 * rtol
        solutions = [
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
        expected = np.mean([solution.nfev for solution in solutions])
        tolerance = 0.2 if rtol == 1e-3 else 0.1
        assert evaluations.double().mean().item() == pytest.approx(expected, rel=tolerance)


def relaxation_velocity(rates):
    """Return a velocity field in which image i approaches sin(3 t) at the rate rates[i]."""
    return lambda x, t: rates[:, None] * (x - torch.sin(3 * t)[:, None])


def test_dopri5_steps_of_an_image_do_not_depend_on_the_batch():
    """An image has the same result and count next to a stiff image as in a batch of one."""
    rates = torch.tensor([1.0, 400.0, 3.0]).double()
    x = initial_noise(3, 16)
    times = []

    def velocity(y, t):
        times.append(t)
        return relaxation_velocity(rates)(y, t)

    end, evaluations = dopri5(velocity, x, 1e-8, 1e-6)
    assert len(times) == evaluations.max() == evaluations[1] > 4 * evaluations[0]
    assert all(bool((t >= 0).all()) for t in times)
    for i in range(3):
        single, count = dopri5(relaxation_velocity(rates[i : i + 1]), x[i : i + 1], 1e-8, 1e-6)
        assert torch.equal(single[0], end[i])
        assert count.item() == evaluations[i]


def test_dopri5_with_a_nan_image_ends_and_does_not_change_the_others():
    num_calls = 0

    def velocity(x, t):
        nonlocal num_calls
        num_calls += 1
        assert num_calls < 200
        v = relaxation_velocity(torch.ones(2).double())(x, t)
        is_nan = (t < 0.99)[:, None] & (torch.arange(2) == 0)[:, None]
        return torch.where(is_nan, torch.nan, v)

    end, _ = dopri5(velocity, initial_noise(2))
    expected, _ = dopri5(relaxation_velocity(torch.ones(1).double()), initial_noise(2)[1:])
    assert end[0].isnan().all()
    assert torch.equal(end[1], expected[0])


def test_dopri5_crosses_a_jump_of_the_velocity():
    """At a jump, as at the ends of a guidance interval, dopri5 terminates with any tolerance."""

    def velocity(x, t):
        return torch.where(t < 0.3, 1.0, 5.0)[:, None].to(x).expand_as(x)

    end, evaluations = dopri5(velocity, initial_noise(2), 1e-13, 0)
    torch.testing.assert_close(end, initial_noise(2) - 5 * 0.7 - 0.3, atol=1e-7, rtol=0)
    assert evaluations.max() < 500


# The SDE


@on_regular_paths
def test_sde_moments_equal_the_recursion(name):
    """Both methods are exact and draw no samples."""
    interpolant = INTERPOLANTS[name]
    for num_steps, last in ((2, 0.5), (25, 0.04)):
        moments = sde_moments(DATA.velocity(interpolant), interpolant, 3, num_steps, last)
        expected = euler_maruyama_moments(
            lambda t, w: affine_drift(DATA, name, t, w), num_steps, last
        )
        torch.testing.assert_close(moments, expected, rtol=0, atol=1e-12)


@on_regular_paths
def test_sde_has_weak_order_one(name):
    """Mean and covariance converge if the last step shrinks with the others."""
    interpolant = INTERPOLANTS[name]
    errors = []
    for n in (50, 100, 200):
        mean, covariance = sde_moments(DATA.velocity(interpolant), interpolant, 3, n, 1 / n)
        mean_error = (mean - DATA.mean).abs().max().item()
        covariance_error = (covariance - DATA.covariance).abs().max().item()
        errors.append(max(mean_error, covariance_error))
    assert errors[-1] < 0.02
    assert convergence_orders(errors) == pytest.approx([1, 1], abs=0.2)


@on_regular_paths
def test_sde_samples_have_the_predicted_moments(name):
    """Each moment of 10,000 samples is within four standard errors."""
    n = 10_000
    num_steps = 40
    interpolant = INTERPOLANTS[name]
    indices = torch.arange(n)
    samples = solve_sde(
        DATA.velocity(interpolant),
        interpolant,
        initial_noise(n),
        num_steps,
        lambda i: normal(0, Purpose.BROWNIAN, indices, (3,), draw=i),
    )
    mean, covariance = euler_maruyama_moments(
        lambda t, w: affine_drift(DATA, name, t, w), num_steps, 0.04
    )
    variances = covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() < 4 * (variances / n).sqrt()).all()
    standard_errors = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert ((torch.cov(samples.T) - covariance).abs() < 4 * standard_errors).all()


def test_sde_grid_equals_that_of_repa():
    """There are `num_steps` evaluations, from 1 to 0.04, and no noise in the last step, to 0."""
    velocity = RecordedVelocity()
    noise_steps = []

    def noise(step):
        noise_steps.append(step)
        return torch.zeros(2, 3)

    solve_sde(velocity, LINEAR, initial_noise(2), 25, noise)
    torch.testing.assert_close(torch.tensor(velocity.times), torch.linspace(1, 0.04, 25))
    assert noise_steps == list(range(24))


# Guidance


class LabelledVelocity:
    """A model whose velocity is 1 for the null class and 3 otherwise, which records its labels."""

    def __init__(self):
        self.labels = []

    def __call__(self, x, t, labels):
        self.labels.append(labels)
        return torch.where(labels == NULL_CLASS, 1.0, 3.0)[:, None] * torch.ones_like(x)

    @property
    def batch_sizes(self):
        return [len(labels) for labels in self.labels]


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.5, 0.1]).double()])
def test_scale_one_never_evaluates_the_null_class(t):
    model = LabelledVelocity()
    velocity = GuidedVelocity(model, torch.tensor([0, 1]), NULL_CLASS, scale=1.0)
    assert torch.equal(velocity(torch.zeros(2, 1), t), torch.full((2, 1), 3.0))
    assert model.batch_sizes == [2]
    assert not (model.labels[0] == NULL_CLASS).any()


def test_guidance_formula_and_interval():
    times = [0.2, 0.5, 0.8, 0.19, 0.81]
    expected = torch.tensor([[6.0], [6.0], [6.0], [3.0], [3.0]])
    x = torch.zeros(5, 1)
    velocity = GuidedVelocity(
        LabelledVelocity(), torch.arange(5), NULL_CLASS, scale=2.5, low=0.2, high=0.8
    )
    for t, value in zip(times, expected):
        assert torch.equal(velocity(x, t), value.expand(5, 1)), t
    time_per_image = torch.tensor(times, dtype=torch.float64)
    assert torch.equal(velocity(x, time_per_image), expected)


def test_null_class_is_not_evaluated_outside_the_guidance_interval():
    model = LabelledVelocity()
    velocity = GuidedVelocity(model, torch.tensor([0, 1]), NULL_CLASS, 2.0, 0.2, 0.8)
    for t in (0.1, 0.5, 0.9):
        velocity(torch.zeros(2, 1), t)
    assert model.batch_sizes == [2, 4, 2]


@on_regular_paths
def test_guided_ode_follows_the_guided_flow(name):
    """Guidance between two Gaussians is affine, and scipy integrates it piece by piece."""
    x = initial_noise(6)
    exact = integrate_with_scipy(
        lambda t: guided_affine_drift(name, t), x.numpy(), (1.0, HIGH, LOW, 0.0)
    )
    assert (exact - DATA.flow(x)).abs().max() > 0.3
    guided = guided_gaussian(name, 6, low=LOW, high=HIGH)
    errors = [(solve_ode(euler, guided, x, n) - exact).abs().max() for n in (32, 64, 128)]
    assert errors[-1] < 8e-2
    assert convergence_orders(errors) == pytest.approx([1, 1], abs=0.2)

    # dopri5 integrates in pieces, and batches are doubled only inside the interval.
    model = two_gaussians(name)
    batch_sizes = []

    def recording_model(x, t, labels):
        batch_sizes.append(len(labels))
        return model(x, t, labels)

    guided = GuidedVelocity(recording_model, torch.arange(6), NULL_CLASS, SCALE, LOW, HIGH)
    end, evaluations = guided_dopri5(guided, x, 1e-6, 1e-6)
    torch.testing.assert_close(end, exact, atol=2e-5, rtol=0)
    assert sorted(set(batch_sizes)) == [6, 12]
    largest_count = max(batch_sizes.count(6), batch_sizes.count(12))
    assert largest_count < evaluations.max() <= len(batch_sizes)

    # Heun converges to the solution of dopri5 with guidance at all times.
    guided = GuidedVelocity(model, torch.arange(6), NULL_CLASS, SCALE)
    reference, _ = guided_dopri5(guided, x, atol=1e-6, rtol=1e-6)
    guided = guided_gaussian(name, 6)
    errors = [(solve_ode(heun, guided, x, n) - reference).abs().max() for n in (32, 64, 128)]
    assert errors[-1] < 5e-3
    assert convergence_orders(errors) == pytest.approx([2, 2], abs=0.3)


@on_regular_paths
def test_guided_sde_moments_equal_moments_of_the_guided_drift(name):
    """REPA guides the drift v - w s / 2. The score is affine in v, so guiding v is equivalent."""
    num_rows = 1 + 3 * 24
    velocity = guided_gaussian(name, num_rows, low=LOW, high=HIGH)
    moments = sde_moments(velocity, INTERPOLANTS[name], 3, 24, 0.04)
    expected = euler_maruyama_moments(lambda t, w: guided_affine_drift(name, t, w), 24, 0.04)
    # The tolerance allows for the float32 input of the network.
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)


# Objectives


def exact_end(name, interval, x):
    """Return the exact end of the flow on an interval for x (B, 3), followed by `denoise`.

    Each quantile of the start is mapped to the same quantile of the end.
    """
    alpha, sigma, _, _ = COEFFICIENTS[name](interval[0])
    alpha_start, sigma_start, _, _ = COEFFICIENTS[name](interval[1])
    std = (alpha**2 * DATA.std**2 + sigma**2).sqrt()
    std_start = (alpha_start**2 * DATA.std**2 + sigma_start**2).sqrt()
    quantile = (x - alpha_start * DATA.mean) @ DATA.axes / std_start
    if interval[0] > 0:
        return DATA.mean + alpha * DATA.std**2 / std * quantile @ DATA.axes.T
    return DATA.flow(quantile @ DATA.axes.T)


def perfect_velocity(name, prediction):
    """Return the float64 velocity field of a perfect network with this prediction."""
    interpolant = INTERPOLANTS[name]
    network = DATA.predict_expected(interpolant, prediction)

    def velocity(x, t):
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return prediction_to_velocity(interpolant, prediction, network(x, times), x, times)

    return velocity


def moments_of_affine_map(solve):
    """Return mean and covariance of `solve` applied to N(0, I), for an affine `solve`."""
    end = solve(torch.cat((torch.zeros(1, 3), torch.eye(3))).double())
    columns = end[1:] - end[0]
    return end[0], columns.T @ columns


@on_every_objective
def test_every_objective_reaches_the_moments_of_the_data(name, prediction):
    """The moments are exact and draw no samples.

    The tolerances allow for the start: it is treated as pure noise, although alpha is up to 0.007
    there, and with "eps" on the linear path it is too wide by 0.001. The tolerance of the SDE also
    allows for its discretisation error of 1.5%.
    """
    interpolant = INTERPOLANTS[name]
    interval = time_interval(interpolant, prediction)
    velocity = perfect_velocity(name, prediction)
    t_min, t_max = interval

    def solve_adaptively(x):
        end, _ = dopri5(velocity, x, 1e-9, 1e-6, t_max, t_min)
        return denoise(velocity, interpolant, end, t_min)

    def solve_with_heun(x):
        return solve_ode(heun, velocity, x, 128, interpolant, interval)

    moments = {
        "Heun": moments_of_affine_map(solve_with_heun),
        "dopri5": moments_of_affine_map(solve_adaptively),
        "SDE": sde_moments(velocity, interpolant, 3, 128, ends=interval),
    }
    for solver, (mean, covariance) in moments.items():
        tolerance = 0.016 if solver == "SDE" else 0.0025
        covariance_error = (covariance - DATA.covariance).norm() / DATA.covariance.norm()
        assert (mean - DATA.mean).norm() / DATA.mean.norm() < 0.008, solver
        assert covariance_error < tolerance, solver


@on_every_objective
def test_solvers_cover_the_whole_time_interval(name, prediction):
    """Heun converges to the exact end with order 2; SDE moments equal those of the recursion."""
    interpolant = INTERPOLANTS[name]
    interval = time_interval(interpolant, prediction)
    t_min, t_max = interval
    velocity = perfect_velocity(name, prediction)
    x = initial_noise()
    exact = exact_end(name, interval, x)
    errors = [
        (solve_ode(heun, velocity, x, n, interpolant, interval) - exact).abs().max()
        for n in (64, 128, 256)
    ]
    assert errors[-1] < 1e-4
    assert convergence_orders(errors) == pytest.approx([2] * 2, abs=0.1)

    moments = sde_moments(velocity, interpolant, 3, 25, ends=interval)
    denoiser = affine_denoiser(name, t_min) if t_min else None
    expected = euler_maruyama_moments(
        lambda t, w: affine_drift(DATA, name, t, w), 25, t_min or 0.04, t_max, denoiser
    )
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_all_predictions_give_the_same_samples_away_from_singularities(name):
    x = initial_noise()
    interpolant = INTERPOLANTS[name]
    interval = (0.001, 0.999)
    noise = normal(1, Purpose.INITIAL_NOISE, torch.arange(8), (3,))
    for solve in (
        lambda velocity: solve_ode(euler, velocity, x, 8, interpolant, interval),
        lambda velocity: solve_ode(heun, velocity, x, 8, interpolant, interval),
        lambda velocity: solve_sde(velocity, interpolant, x, 8, lambda i: noise[i], interval),
    ):
        expected, *others = (solve(perfect_velocity(name, p)) for p in PREDICTIONS)
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
    x, evaluations = guided_dopri5(velocity, initial_noise(2), t_start=1.0, t_end=0.001)
    assert evaluations.max() <= len(batch_sizes)
    assert min(times) == pytest.approx(0.001)  # also if the guidance interval ends below it
    denoise(velocity, LINEAR, x, 0.001)
    assert batch_sizes[-1] == batch_size


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.001, 0.999)])
def test_number_of_evaluations_does_not_depend_on_the_interval(interval):
    t_min, t_max = interval
    for solver, count in ((euler, 5), (heun, 9)):
        velocity = RecordedVelocity()
        solve_ode(solver, velocity, initial_noise(2), 5, COSINE, interval)
        assert len(velocity.times) == count
        assert velocity.times[0] == t_max
        assert (velocity.times[-1] == 0.001) == (t_min > 0)
    velocity = RecordedVelocity()
    solve_sde(velocity, COSINE, initial_noise(2), 5, lambda i: torch.zeros(2, 3), interval)
    assert len(velocity.times) == 5
    assert (velocity.times[0], velocity.times[-1]) == (t_max, t_min or 0.04)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.001, 0.999)])
def test_one_step_starts_at_the_upper_end_of_the_interval(interval):
    velocity = RecordedVelocity()
    solve_ode(euler, velocity, initial_noise(2), 1, COSINE, interval)
    assert velocity.times == [interval[1]]


def network_of(name, prediction):
    """Return a float32 network with the interface of a SiT, on images (B, 3, 1, 1).

    Every class is DATA, and the null class is NULL.
    """
    predict_class = DATA.predict_expected(INTERPOLANTS[name], prediction)
    predict_null = NULL.predict_expected(INTERPOLANTS[name], prediction)

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
def test_settings_sample_every_objective(name, prediction):
    """Samples of a float32 network on a fixed grid and with adaptive steps reach the exact end."""
    indices = torch.arange(10)
    network = network_of(name, prediction)
    interval = time_interval(INTERPOLANTS[name], prediction)
    exact = exact_end(name, interval, initial_noise()).float()
    for options, tolerance in (
        ({"heun": True, "num_steps": 128}, 5e-4),
        ({"dopri5": True, "rtol": 1e-4}, 2e-3),
    ):
        settings = Recipe("ode", path_type=name, prediction=prediction, **options)
        latents = settings.sample_latents(network, indices).flatten(1)
        assert (latents - exact).abs().max() < tolerance, options

    settings = Recipe("sde", num_steps=20, path_type=name, prediction=prediction)
    latents = settings.sample_latents(network, indices).flatten(1)
    noise = [normal(0, Purpose.BROWNIAN, indices, (3,), draw=i) for i in range(19)]
    expected = solve_sde(
        perfect_velocity(name, prediction),
        INTERPOLANTS[name],
        initial_noise(),
        20,
        lambda i: noise[i],
        interval,
    )
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "prediction"), list(itertools.product(INTERPOLANTS, ["x", "eps"]))
)
def test_guiding_every_objective_equals_guiding_the_velocity(name, prediction):
    """Some guidance intervals exceed the time interval."""
    interpolant = INTERPOLANTS[name]
    interval = (0.001, 0.999)
    t_min, t_max = interval
    x = initial_noise(6).float()
    labels = torch.arange(6)
    model = VelocityModel(network_of(name, prediction), interpolant, prediction)
    velocity_model = VelocityModel(network_of(name, "v"), interpolant, "v")

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


# Dtypes, device synchronisation and documentation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_its_dtype_and_the_network_receives_float32(dtype):
    received = set()

    def model(x, t, labels):
        received.update((x.dtype, t.dtype))
        return torch.ones_like(x)

    velocity = GuidedVelocity(model, torch.tensor([0, 1]), NULL_CLASS, scale=2.0)
    x = torch.zeros(2, 1, dtype=dtype)
    ends = (
        solve_ode(euler, velocity, x, 2),
        dopri5(velocity, x)[0],
        solve_sde(velocity, LINEAR, x, 2, lambda i: torch.ones(2, 1).double()),
    )
    assert {end.dtype for end in ends} == {dtype}
    assert received == {torch.float32}


def test_fixed_grids_do_not_synchronise_with_the_device():
    """Tensors on the meta device hold no data, so a synchronisation raises an error."""
    x = torch.empty(2, 3, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    velocity = GuidedVelocity(
        lambda x, t, labels: x * t[:, None] + labels[:, None], labels, NULL_CLASS, 2.0, LOW, HIGH
    )
    assert solve_ode(heun, velocity, x, 4).is_meta
    assert solve_sde(velocity, COSINE, x, 4, lambda i: x).is_meta
    assert velocity(x, torch.empty(2, device="meta")).is_meta
    with pytest.raises(RuntimeError):
        dopri5(velocity, x)


def test_documented_numbers_equal_the_measurements():
    """docs/sampling.md shows the numbers of docs/solvers.json. One error is measured again."""
    results = json.loads((ROOT / "docs/solvers.json").read_text())
    text = (ROOT / "docs/sampling.md").read_text()
    for table in solvers.markdown_tables(results):
        assert table in text
    data = example_gaussian(solvers.EXAMPLE_STDS)
    noise = solvers.start_noise(data)
    end = solve_ode(heun, data.velocity(LINEAR), noise, 16)
    recorded_error = results["ode"]["linear"]["Heun"]["error"][solvers.EVALUATION_COUNTS.index(32)]
    measured_error = solvers.relative_rms_error(data, end, data.flow(noise))
    assert measured_error == pytest.approx(recorded_error, rel=1e-3)
