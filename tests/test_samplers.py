"""Test the ODE and SDE solvers on Gaussian data."""

import json

import numpy as np
import pytest
import torch
from scipy.integrate import RK45, solve_ivp

import samplers
from common.keyed_random import Purpose, normal
from experiments import solvers
from experiments.solvers import compute_sde_moments, make_example_gaussian
from interpolant import INTERPOLANTS
from samplers import GuidedVelocity, dopri5, euler, heun
from tests.gaussian_data import (
    COSINE,
    DATA,
    HIGH,
    LINEAR,
    LOW,
    NULL_CLASS,
    RecordedVelocity,
    compute_affine_drift,
    compute_convergence_orders,
    compute_recursive_moments,
    draw_initial_noise,
    integrate_with_scipy,
    on_regular_paths,
    solve_ode,
    solve_sde,
)
from tests.helpers import ROOT

with_both_ode_solvers = pytest.mark.parametrize("solver", [euler, heun])

# ODE solvers


@on_regular_paths
def test_flow_equals_scipys_solution_and_maps_noise_to_the_data(path_type):
    """Check the exact solution that other tests use, m + S^(1/2) x, and its velocity."""
    torch.testing.assert_close(
        integrate_with_scipy(
            lambda t: compute_affine_drift(DATA, path_type, t), draw_initial_noise().numpy()
        ),
        DATA.flow(draw_initial_noise()),
        atol=1e-8,
        rtol=0,
    )
    root = DATA.flow(torch.eye(3).double()) - DATA.mean
    torch.testing.assert_close(root.T @ root, DATA.covariance)
    for t in (0.02, 0.5, 1.0):
        matrix, c = map(torch.from_numpy, compute_affine_drift(DATA, path_type, t))
        torch.testing.assert_close(
            DATA.velocity(INTERPOLANTS[path_type])(draw_initial_noise(), t),
            draw_initial_noise() @ matrix.T + c,
        )


@on_regular_paths
@pytest.mark.parametrize(("solver", "order", "tolerance"), [(euler, 1, 4e-2), (heun, 2, 3e-3)])
def test_ode_solvers_converge_at_the_expected_order(path_type, solver, order, tolerance):
    exact = DATA.flow(draw_initial_noise())
    velocity = DATA.velocity(INTERPOLANTS[path_type])
    errors = [
        (solve_ode(solver, velocity, draw_initial_noise(), n) - exact).abs().max()
        for n in (32, 64, 128)
    ]
    assert errors[-1] < tolerance
    assert compute_convergence_orders(errors) == pytest.approx([order] * 2, abs=0.2)


@with_both_ode_solvers
def test_ode_solvers_are_exact_for_a_constant_velocity(solver):
    end = solve_ode(solver, lambda x, t: torch.full_like(x, 3.0), draw_initial_noise(), 7)
    torch.testing.assert_close(end, draw_initial_noise() - 3)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [(euler, [1, 2 / 3, 1 / 3]), (heun, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])],
)
def test_ode_solvers_evaluate_at_the_same_times_as_repa(solver, expected):
    """Euler takes n evaluations. Heun takes 2 n - 1, because its last step is an Euler step."""
    velocity = RecordedVelocity()
    solve_ode(solver, velocity, draw_initial_noise(2), 3)
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
def test_dopri5_meets_its_tolerance_with_as_many_evaluations_as_scipy(path_type):
    """scipy's RK45 uses the same pair, norm and factors, with one more evaluation at the start."""
    x = draw_initial_noise(8)
    velocity = DATA.velocity(INTERPOLANTS[path_type])
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


def make_relaxation_velocity(rates):
    """Return a velocity field under which image i approaches sin(3 t) at rate rates[i]."""
    return lambda x, t: rates[:, None] * (x - torch.sin(3 * t)[:, None])


def test_dopri5_steps_of_an_image_do_not_depend_on_the_batch():
    """An image has the same result and count next to a stiff image as in a batch of one."""
    rates = torch.tensor([1.0, 400.0, 3.0]).double()
    x = draw_initial_noise(3, 16)
    times = []

    def velocity(y, t):
        times.append(t)
        return make_relaxation_velocity(rates)(y, t)

    end, evaluations = dopri5(velocity, x, 1e-8, 1e-6)
    assert len(times) == evaluations.max() == evaluations[1] > 4 * evaluations[0]
    assert all(bool((t >= 0).all()) for t in times)
    for i in range(3):
        single, count = dopri5(make_relaxation_velocity(rates[i : i + 1]), x[i : i + 1], 1e-8, 1e-6)
        assert torch.equal(single[0], end[i])
        assert count.item() == evaluations[i]


def test_dopri5_with_a_nan_image_ends_and_does_not_change_the_others():
    """The NaN image takes long steps, and its times stay between 0 and 1."""
    num_calls = 0

    def velocity(x, t):
        nonlocal num_calls
        num_calls += 1
        assert num_calls < 200
        assert ((t >= 0) & (t <= 1)).all()  # false for NaN
        v = make_relaxation_velocity(torch.ones(2).double())(x, t)
        is_nan = (t < 0.99)[:, None] & (torch.arange(2) == 0)[:, None]
        return torch.where(is_nan, torch.nan, v)

    end, _ = dopri5(velocity, draw_initial_noise(2))
    expected, _ = dopri5(
        make_relaxation_velocity(torch.ones(1).double()), draw_initial_noise(2)[1:]
    )
    assert end[0].isnan().all()
    assert torch.equal(end[1], expected[0])


def test_dopri5_terminates_at_a_jump_of_the_velocity():
    """The velocity has such a jump at each end of a guidance interval."""

    def velocity(x, t):
        return torch.where(t < 0.3, 1.0, 5.0)[:, None].to(x).expand_as(x)

    end, evaluations = dopri5(velocity, draw_initial_noise(2), 1e-13, 0)
    torch.testing.assert_close(end, draw_initial_noise(2) - 5 * 0.7 - 0.3, atol=1e-7, rtol=0)
    assert evaluations.max() < 500


# The SDE


@on_regular_paths
def test_sde_moments_equal_the_linear_recursion(path_type):
    """Both methods are exact and draw no samples."""
    interpolant = INTERPOLANTS[path_type]
    for num_steps, last in ((2, 0.5), (25, 0.04)):
        moments = compute_sde_moments(DATA.velocity(interpolant), interpolant, 3, num_steps, last)
        expected = compute_recursive_moments(
            lambda t, w: compute_affine_drift(DATA, path_type, t, w), num_steps, last
        )
        torch.testing.assert_close(moments, expected, rtol=0, atol=1e-12)


@on_regular_paths
def test_sde_has_weak_order_one(path_type):
    """Mean and covariance converge if the last step shrinks with the others."""
    interpolant = INTERPOLANTS[path_type]
    errors = []
    for n in (50, 100, 200):
        mean, covariance = compute_sde_moments(DATA.velocity(interpolant), interpolant, 3, n, 1 / n)
        mean_error = (mean - DATA.mean).abs().max().item()
        covariance_error = (covariance - DATA.covariance).abs().max().item()
        errors.append(max(mean_error, covariance_error))
    assert errors[-1] < 0.02
    assert compute_convergence_orders(errors) == pytest.approx([1, 1], abs=0.2)


@on_regular_paths
def test_sde_samples_have_the_predicted_moments(path_type):
    """Each moment of 10,000 samples is within four standard errors."""
    n = 10_000
    num_steps = 40
    interpolant = INTERPOLANTS[path_type]
    indices = torch.arange(n)
    samples = solve_sde(
        DATA.velocity(interpolant),
        interpolant,
        draw_initial_noise(n),
        num_steps,
        lambda i: normal(0, Purpose.BROWNIAN, indices, (3,), draw=i),
    )
    mean, covariance = compute_recursive_moments(
        lambda t, w: compute_affine_drift(DATA, path_type, t, w), num_steps, 0.04
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

    solve_sde(velocity, LINEAR, draw_initial_noise(2), 25, noise)
    torch.testing.assert_close(torch.tensor(velocity.times), torch.linspace(1, 0.04, 25))
    assert noise_steps == list(range(24))


# Dtypes, device synchronization and documentation


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


def test_fixed_grids_do_not_synchronize_with_the_device():
    """Tensors on the meta device hold no data, so a synchronization raises an error."""
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
    """docs/sampling.md contains the numbers of docs/solvers.json. One of them is measured again."""
    results = json.loads((ROOT / "docs/solvers.json").read_text())
    text = (ROOT / "docs/sampling.md").read_text()
    for table in solvers.format_tables(results):
        assert table in text
    data = make_example_gaussian(solvers.EXAMPLE_STDS)
    noise = solvers.draw_initial_noise(data)
    end = solve_ode(heun, data.velocity(LINEAR), noise, 16)
    recorded_error = results["ode"]["linear"]["Heun"]["error"][solvers.EVALUATION_COUNTS.index(32)]
    measured_error = solvers.compute_relative_rms_error(data, end, data.flow(noise))
    assert measured_error == pytest.approx(recorded_error, rel=1e-3)
