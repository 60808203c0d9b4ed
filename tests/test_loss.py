import pytest
import torch
import torch.nn.functional as F

from interpolant import INTERPOLANTS, PREDICTIONS
from loss import ALIGN_LOSSES, Alignment, alignment_loss, denoising_loss, training_losses


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
    by_hand = torch.tensor(
        [[1 - torch.dot(p, q) / (p.norm() * q.norm()) for p, q in zip(x, y)] for x, y in zip(a, b)]
    ).mean(1)
    torch.testing.assert_close(alignment_loss(a, b, T), by_hand)
    assert not torch.allclose(by_hand, 1 - F.cosine_similarity(a, b).mean(-1), atol=1e-3)

    other = b.clone()
    other[:, 5] = tokens(2)[:, 5]
    a.requires_grad_()
    before, after = (
        torch.autograd.grad(alignment_loss(a, target, T).sum(), a)[0] for target in (b, other)
    )
    changed = (before != after).any(-1)
    assert changed[:, 5].all() and not changed[:, :5].any() and not changed[:, 6:].any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1", lambda a, b: (a - b).abs()),
        ("l2", lambda a, b: (a - b) ** 2),
        (
            "smooth_l1",
            lambda a, b: torch.where(
                (a - b).abs() < 0.05, (a - b) ** 2 / 0.1, (a - b).abs() - 0.025
            ),
        ),
    ],
)
def test_elementwise_losses_are_means(kind, expected):
    a, b = tokens(0) * 0.05, tokens(1) * 0.05
    torch.testing.assert_close(
        alignment_loss(a, b, T, Alignment(kind)), expected(a, b).mean((1, 2))
    )


@pytest.mark.parametrize("kind", ALIGN_LOSSES)
def test_zero_at_the_target_and_no_gradient_into_it(kind):
    a, b = tokens(0).requires_grad_(), tokens(0).requires_grad_()
    distance = alignment_loss(a, b, T, Alignment(kind))
    torch.testing.assert_close(distance, torch.zeros(4), atol=1e-6, rtol=0)
    alignment_loss(a, tokens(1).requires_grad_() * b, T, Alignment(kind)).sum().backward()
    assert b.grad is None and a.grad is not None


def test_window_zeroes_samples_outside_and_leaves_the_rest():
    a, b = tokens(0), tokens(1)
    whole, window = alignment_loss(a, b, T), alignment_loss(a, b, T, Alignment(t_range=(0.3, 0.6)))
    assert (window[[0, 3]] == 0).all() and torch.equal(window[1:3], whole[1:3])


@pytest.mark.parametrize("kind", ALIGN_LOSSES)
def test_half_precision_inputs_are_summed_in_float32(kind):
    a, b = tokens(0).bfloat16() * 100, tokens(1).bfloat16() * 100
    low = alignment_loss(a, b, T, Alignment(kind))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, alignment_loss(a.float(), b.float(), T, Alignment(kind)))


def test_denoising_loss_is_the_mean_square_per_sample():
    a, b = tokens(0), tokens(1)
    torch.testing.assert_close(
        denoising_loss(a, b), torch.stack([F.mse_loss(x, y) for x, y in zip(a, b)])
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_losses_of_a_perfect_model_are_zero(prediction):
    x, noise = tokens(0, (4, 3, 8, 8)), tokens(1, (4, 3, 8, 8))
    targets = {"a": tokens(2), "b": tokens(3, (4, 16, 5))}
    right = {"v": noise - x, "x": x, "eps": noise}[prediction]
    given = INTERPOLANTS["linear"], prediction, x, None, noise, T
    how = {name: Alignment() for name in targets}
    perfect = training_losses(
        lambda x_t, t, y: (right, targets, dict.fromkeys(targets, T)), *given, targets, how
    )
    torch.testing.assert_close(perfect.denoising, torch.zeros(4))
    for name in targets:
        torch.testing.assert_close(perfect.align[name], torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(perfect.cosine[name], torch.ones(4))
    vanilla = training_losses(lambda x_t, t, y: (right + x, {}, {}), *given)
    torch.testing.assert_close(vanilla.denoising, x.square().flatten(1).mean(1))
    assert not vanilla.align


def test_a_method_without_a_target_is_idle_and_each_has_its_own_loss():
    x, pred = tokens(0, (4, 3, 8, 8)), {"a": tokens(1), "b": tokens(2)}
    how = {"a": Alignment("l1", t_range=(0.3, 1.0)), "b": Alignment("l2")}

    def terms(**targets):
        model = lambda x_t, t, y: (
            x,
            {name: pred[name] for name in targets},
            dict.fromkeys(targets, T),
        )  # noqa: E731
        return training_losses(model, INTERPOLANTS["linear"], "v", x, None, x, T, targets, how)

    both, one = terms(a=tokens(3), b=tokens(4)), terms(b=tokens(4))
    for name, seed in (("a", 3), ("b", 4)):
        assert torch.equal(both.align[name], alignment_loss(pred[name], tokens(seed), T, how[name]))
    assert torch.equal(one.align["b"], both.align["b"])
    assert (
        not any(term["a"].any() for term in one[1:])
        and both.align["a"][0] == 0 != both.align["a"][1]
    )
