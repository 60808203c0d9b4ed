"""Test classifier-free guidance with fixed and adaptive steps."""

import pytest
import torch

from experiments.solvers import compute_sde_moments
from interpolant import INTERPOLANTS
from samplers import GuidedVelocity, euler, guided_dopri5, heun
from tests.gaussian_data import (
    DATA,
    HIGH,
    LOW,
    NULL_CLASS,
    SCALE,
    compute_convergence_orders,
    compute_guided_drift,
    compute_recursive_moments,
    draw_initial_noise,
    integrate_with_scipy,
    make_gaussian_model,
    make_guided_velocity,
    on_regular_paths,
    solve_ode,
)


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
def test_guided_ode_follows_the_guided_flow(path_type):
    """Guidance between two Gaussians is affine, and scipy integrates it piece by piece."""
    x = draw_initial_noise(6)
    exact = integrate_with_scipy(
        lambda t: compute_guided_drift(path_type, t), x.numpy(), (1.0, HIGH, LOW, 0.0)
    )
    assert (exact - DATA.flow(x)).abs().max() > 0.3
    guided = make_guided_velocity(path_type, 6, low=LOW, high=HIGH)
    errors = [(solve_ode(euler, guided, x, n) - exact).abs().max() for n in (32, 64, 128)]
    assert errors[-1] < 8e-2
    assert compute_convergence_orders(errors) == pytest.approx([1, 1], abs=0.2)

    # dopri5 integrates in pieces, and batches are doubled only inside the interval.
    model = make_gaussian_model(path_type)
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
    guided = make_guided_velocity(path_type, 6)
    errors = [(solve_ode(heun, guided, x, n) - reference).abs().max() for n in (32, 64, 128)]
    assert errors[-1] < 5e-3
    assert compute_convergence_orders(errors) == pytest.approx([2, 2], abs=0.3)


def test_adaptive_steps_are_guided_up_to_the_rounded_end_of_the_interval():
    """The tolerance allows a single step, whose last stages are evaluated just below `low`."""
    low, high = 0.05, 0.2
    assert high - (high - low) < low
    velocity = GuidedVelocity(LabelledVelocity(), torch.arange(2), NULL_CLASS, 2.5, low, high)
    end, evaluations = guided_dopri5(velocity, torch.zeros(2, 1).double(), atol=1e6)
    assert evaluations.tolist() == [21, 21]
    expected = -6 * (high - low) - 3 * (1 - (high - low))
    torch.testing.assert_close(end, torch.full_like(end, expected))


@on_regular_paths
def test_guided_sde_moments_equal_moments_of_the_guided_drift(path_type):
    """REPA guides the drift v - w s / 2. The score is affine in v, so guiding v is equivalent."""
    batch_size = (
        1 + 3 * 24
    )  # in compute_sde_moments: the mean, and the noise of each step per dimension
    velocity = make_guided_velocity(path_type, batch_size, low=LOW, high=HIGH)
    moments = compute_sde_moments(velocity, INTERPOLANTS[path_type], 3, 24, 0.04)
    expected = compute_recursive_moments(
        lambda t, w: compute_guided_drift(path_type, t, w), 24, 0.04
    )
    # The tolerance allows for the float32 input of the network.
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)
