"""Compare denoising and alignment losses with direct computations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss import ALIGN_LOSSES, alignment_loss, denoising_loss, standardize_tokens


def make_tokens(seed=0, shape=(4, 16, 12)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([0.0, 0.3, 0.6, 1.0])


def test_cosine_ignores_the_scale_of_a_token():
    a, b = make_tokens(0), make_tokens(1)
    scale = torch.rand(4, 16, 1) + 0.1
    torch.testing.assert_close(alignment_loss(a * scale, b, TIMES), alignment_loss(a, b, TIMES))


def test_cosine_is_computed_over_the_dimensions_of_a_token():
    """The loss must not use the default of PyTorch, dim=1, which is the axis of the tokens."""
    a, b = make_tokens(0), make_tokens(1)
    expected = torch.tensor(
        [[1 - torch.dot(p, q) / (p.norm() * q.norm()) for p, q in zip(x, y)] for x, y in zip(a, b)]
    ).mean(1)
    torch.testing.assert_close(alignment_loss(a, b, TIMES), expected)
    assert not torch.allclose(expected, 1 - F.cosine_similarity(a, b).mean(-1), atol=1e-3)


def test_cosine_gradient_of_a_token_depends_on_that_token_only():
    a, b = make_tokens(0).requires_grad_(), make_tokens(1)
    changed_target = b.clone()
    changed_target[:, 5] = make_tokens(2)[:, 5]
    gradients = [
        torch.autograd.grad(alignment_loss(a, target, TIMES).sum(), a)[0]
        for target in (b, changed_target)
    ]
    changed = (gradients[0] != gradients[1]).any(-1)
    assert changed[:, 5].all() and not changed[:, :5].any() and not changed[:, 6:].any()


def compute_smooth_l1(a, b):
    error = (a - b).abs()
    return torch.where(error < 0.05, error**2 / 0.1, error - 0.025)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("l1", lambda a, b: (a - b).abs()),
        ("l2", lambda a, b: (a - b) ** 2),
        ("smooth_l1", compute_smooth_l1),
    ],
)
def test_elementwise_losses_are_means_over_tokens_and_dimensions(loss, expected):
    a, b = make_tokens(0) * 0.05, make_tokens(1) * 0.05
    torch.testing.assert_close(alignment_loss(a, b, TIMES, loss), expected(a, b).mean((1, 2)))


@pytest.mark.parametrize("loss", ALIGN_LOSSES)
def test_loss_is_zero_at_the_target_and_has_no_gradient_for_it(loss):
    a, b = make_tokens(0).requires_grad_(), make_tokens(0).requires_grad_()
    distance = alignment_loss(a, b, TIMES, loss)
    torch.testing.assert_close(distance, torch.zeros(4), atol=1e-6, rtol=0)
    alignment_loss(a, make_tokens(1).requires_grad_() * b, TIMES, loss).sum().backward()
    assert b.grad is None and a.grad is not None


def test_t_range_sets_only_losses_outside_the_range_to_zero():
    a, b = make_tokens(0), make_tokens(1)
    full = alignment_loss(a, b, TIMES)
    limited = alignment_loss(a, b, TIMES, t_range=(0.3, 0.6))
    assert (limited[[0, 3]] == 0).all() and torch.equal(limited[1:3], full[1:3])


@pytest.mark.parametrize("loss", ALIGN_LOSSES)
def test_losses_of_half_precision_inputs_are_computed_in_float32(loss):
    a, b = make_tokens(0).bfloat16() * 100, make_tokens(1).bfloat16() * 100
    half_precision_loss = alignment_loss(a, b, TIMES, loss)
    assert half_precision_loss.dtype == torch.float32
    expected = alignment_loss(a.float(), b.float(), TIMES, loss)
    torch.testing.assert_close(half_precision_loss, expected)


def test_denoising_loss_is_the_mean_square_per_sample():
    a, b = make_tokens(0), make_tokens(1)
    expected = torch.stack([F.mse_loss(x, y) for x, y in zip(a, b)])
    torch.testing.assert_close(denoising_loss(a, b), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_tokens_are_standardized_per_image_and_channel(alpha):
    tokens = make_tokens() * 3 + 2
    expected = np.empty(tokens.shape)
    for image in range(4):
        for channel in range(12):
            values = tokens[image, :, channel].numpy().astype(np.float64)
            difference = values - alpha * values.mean()
            expected[image, :, channel] = difference / (values.std(ddof=1) + 1e-6)
    actual = standardize_tokens(tokens, alpha)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)
    half = tokens.bfloat16()
    assert torch.equal(standardize_tokens(half, alpha), standardize_tokens(half.float(), alpha))


def test_constant_tokens_are_standardized_to_finite_values():
    assert not standardize_tokens(torch.full((1, 4, 2), 5.0), alpha=1.0).any()
