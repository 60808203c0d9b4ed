import pytest
import torch
import torch.nn.functional as F

from interpolant import PATHS
from loss import ALIGN_LOSSES, alignment_loss, training_losses, velocity_loss


def tokens(seed=0, shape=(4, 16, 12)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


T = torch.tensor([0.0, 0.3, 0.6, 1.0])


def test_cosine_ignores_the_scale_of_a_token():
    a, b = tokens(0), tokens(1)
    scale = torch.rand(4, 16, 1) + 0.1
    torch.testing.assert_close(alignment_loss(a * scale, b, T), alignment_loss(a, b, T))


def test_cosine_is_over_the_channels_of_a_token_and_mixes_no_tokens():
    """PyTorch's own default, dim=1, is the token axis: SRA's released line uses it, ours must not."""
    a, b = tokens(0), tokens(1)
    by_hand = torch.tensor([[1 - torch.dot(p, q) / (p.norm() * q.norm()) for p, q in zip(x, y)] for x, y in zip(a, b)]).mean(1)
    torch.testing.assert_close(alignment_loss(a, b, T), by_hand)
    assert not torch.allclose(by_hand, 1 - F.cosine_similarity(a, b).mean(-1), atol=1e-3)

    other = b.clone()
    other[:, 5] = tokens(2)[:, 5]
    a.requires_grad_()
    before, after = (torch.autograd.grad(alignment_loss(a, target, T).sum(), a)[0] for target in (b, other))
    changed = (before != after).any(-1)
    assert changed[:, 5].all() and not changed[:, :5].any() and not changed[:, 6:].any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1", lambda a, b: (a - b).abs()),
        ("l2", lambda a, b: (a - b) ** 2),
        ("smooth_l1", lambda a, b: torch.where((a - b).abs() < 0.05, (a - b) ** 2 / 0.1, (a - b).abs() - 0.025)),
    ],
)
def test_elementwise_losses_are_means(kind, expected):
    a, b = tokens(0) * 0.05, tokens(1) * 0.05
    torch.testing.assert_close(alignment_loss(a, b, T, kind), expected(a, b).mean((1, 2)))


@pytest.mark.parametrize("kind", ALIGN_LOSSES)
def test_zero_at_the_target_and_no_gradient_into_it(kind):
    a, b = tokens(0).requires_grad_(), tokens(0).requires_grad_()
    distance = alignment_loss(a, b, T, kind)
    torch.testing.assert_close(distance, torch.zeros(4), atol=1e-6, rtol=0)
    alignment_loss(a, tokens(1).requires_grad_() * b, T, kind).sum().backward()
    assert b.grad is None and a.grad is not None


def test_window_zeroes_samples_outside_and_leaves_the_rest():
    a, b = tokens(0), tokens(1)
    whole, window = alignment_loss(a, b, T), alignment_loss(a, b, T, t_range=(0.3, 0.6))
    assert (window[[0, 3]] == 0).all() and torch.equal(window[1:3], whole[1:3])


@pytest.mark.parametrize("kind", ALIGN_LOSSES)
def test_half_precision_inputs_are_summed_in_float32(kind):
    a, b = tokens(0).bfloat16() * 100, tokens(1).bfloat16() * 100
    low = alignment_loss(a, b, T, kind)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, alignment_loss(a.float(), b.float(), T, kind))


def test_velocity_loss_is_the_mean_square_per_sample():
    a, b = tokens(0), tokens(1)
    torch.testing.assert_close(velocity_loss(a, b), torch.stack([F.mse_loss(x, y) for x, y in zip(a, b)]))


def test_training_losses_of_a_perfect_model_are_zero():
    x, noise = tokens(0, (4, 3, 8, 8)), tokens(1, (4, 3, 8, 8))
    target = tokens(2)
    perfect = training_losses(lambda x_t, t, y: (noise - x, target, torch.ones(4)), PATHS["linear"], x, None, noise, T, target)
    torch.testing.assert_close(perfect.velocity, torch.zeros(4))
    torch.testing.assert_close(perfect.align, torch.zeros(4), atol=1e-6, rtol=0)
    vanilla = training_losses(lambda x_t, t, y: (noise, None, None), PATHS["linear"], x, None, noise, T)
    torch.testing.assert_close(vanilla.velocity, x.square().flatten(1).mean(1))
    assert (vanilla.align == 0).all()
