import pytest
import torch

from common.cli import UserError
from training.guard import OVERFLOWS, PATIENCE, NonFiniteGuard


class Optimizer:
    """Takes the verdict."""


def judge(guard, step, velocity=1.0, align=1.0, gradient=1.0) -> float:
    return guard.judge(step, *map(torch.tensor, (velocity, align, gradient))).item()


def alone(tensor, how):
    return tensor


def test_fp16s_overflown_gradients_are_not_counted_but_its_losses_are():
    guard, inf, nan = NonFiniteGuard(Optimizer(), fp16=True), float("inf"), float("nan")
    assert [judge(guard, 1, gradient=inf), judge(guard, 2, align=nan, gradient=nan)] == [
        0,
        0,
    ]  # neither counts in the means
    assert guard.report(alone) == (
        ["step 2: alignment loss, gradient not finite, update skipped"],
        1,
    )
    assert not hasattr(guard.optimizer, "found_inf")  # skipping is the scaler's


def test_without_a_scaler_the_optimizer_is_told():
    guard = NonFiniteGuard(Optimizer(), fp16=False)
    for gradient, verdict in ((float("nan"), 1.0), (2.0, 0.0)):
        judge(guard, 1, gradient=gradient)
        assert guard.optimizer.found_inf.item() == verdict


def test_a_streak_goes_on_across_reports_and_ends_with_a_good_step():
    guard, nan = NonFiniteGuard(Optimizer(), fp16=False), float("nan")
    for step in range(1, PATIENCE):
        judge(guard, step, gradient=nan)
    assert guard.report(alone)[1] == guard.streak == PATIENCE - 1
    judge(guard, PATIENCE)
    assert guard.report(alone) == ([], 0) and guard.streak == 0
    for step in range(10, 10 + PATIENCE):
        judge(guard, step, gradient=nan)
        if step < 10 + PATIENCE - 1:
            guard.report(alone)
    with pytest.raises(
        UserError,
        match=f"step {10 + PATIENCE - 1}: gradient not finite.*like the {PATIENCE - 1} before it",
    ):
        guard.report(alone)


def test_overflows_that_no_scale_ends_are_no_longer_ordinary():
    guard, inf = NonFiniteGuard(Optimizer(), fp16=True), float("inf")
    for step in range(1, OVERFLOWS):
        judge(guard, step, gradient=inf)
    assert guard.report(alone) == ([], 0) and guard.overflows == OVERFLOWS - 1
    resumed = NonFiniteGuard(Optimizer(), True, guard.streak, guard.overflows)
    judge(resumed, OVERFLOWS, gradient=inf)
    with pytest.raises(
        UserError,
        match=f"step {OVERFLOWS}: gradient not finite in fp16, like the {OVERFLOWS - 1} before it",
    ):
        resumed.report(alone)
    judge(guard, OVERFLOWS)
    assert guard.report(alone) == ([], 0) and guard.overflows == 0
