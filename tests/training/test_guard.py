import pytest
import torch

from common.cli import UserError
from training.guard import (
    MAX_CONSECUTIVE_BAD_STEPS,
    MAX_CONSECUTIVE_OVERFLOWS,
    NonFiniteGuard,
)

INF, NAN = float("inf"), float("nan")


class Optimizer:
    """Receives `found_inf`."""


def mark_step(guard, step, denoising=1.0, align=1.0, grad_norm=1.0) -> float:
    losses = {"denoising": torch.tensor(denoising), "align/sra2": torch.tensor(align)}
    return guard.mark_step(step, losses, torch.tensor(grad_norm)).item()


def one_process(tensor, reduction):
    return tensor


def test_fp16_reports_bad_losses_but_not_overflowed_gradients():
    guard = NonFiniteGuard(Optimizer(), uses_grad_scaler=True)
    assert mark_step(guard, 1, grad_norm=INF) == 0
    assert mark_step(guard, 2, align=NAN, grad_norm=NAN) == 0
    assert guard.report(one_process) == [
        "step 2: not finite: align/sra2, grad_norm; update skipped"
    ]
    assert not hasattr(guard.optimizer, "found_inf")  # the GradScaler skips the update


def test_optimizer_skips_non_finite_gradients_without_grad_scaler():
    guard = NonFiniteGuard(Optimizer())
    for grad_norm, found_inf in ((NAN, 1.0), (2.0, 0.0)):
        mark_step(guard, 1, grad_norm=grad_norm)
        assert guard.optimizer.found_inf.item() == found_inf


def test_consecutive_bad_steps_are_counted_across_reports_and_reset_by_a_good_step():
    limit = MAX_CONSECUTIVE_BAD_STEPS
    guard = NonFiniteGuard(Optimizer())
    for step in range(1, limit):
        mark_step(guard, step, grad_norm=NAN)
    assert len(guard.report(one_process)) == guard.bad_in_a_row == limit - 1
    mark_step(guard, limit)
    assert guard.report(one_process) == [] and guard.bad_in_a_row == 0
    for step in range(10, 10 + limit):
        mark_step(guard, step, grad_norm=NAN)
        if step < 10 + limit - 1:
            guard.report(one_process)
    last = 10 + limit - 1
    expected = f"step {last}: not finite: grad_norm.*{limit} consecutive steps were bad.*repeats"
    with pytest.raises(UserError, match=expected):
        guard.report(one_process)


def test_persistent_fp16_overflows_end_the_run():
    limit = MAX_CONSECUTIVE_OVERFLOWS
    guard = NonFiniteGuard(Optimizer(), uses_grad_scaler=True)
    for step in range(1, limit):
        mark_step(guard, step, grad_norm=INF)
    assert guard.report(one_process) == [] and guard.overflows_in_a_row == limit - 1
    resumed = NonFiniteGuard(Optimizer(), True, guard.bad_in_a_row, guard.overflows_in_a_row)
    mark_step(resumed, limit, grad_norm=INF)
    message = f"step {limit}: the gradient is not finite in fp16.*{limit} consecutive.*repeats"
    with pytest.raises(UserError, match=message):
        resumed.report(one_process)
    mark_step(guard, limit)
    assert guard.report(one_process) == [] and guard.overflows_in_a_row == 0


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [("", "Start a new run with a lower --learning-rate"), ("x is NaN", "Repair the cache")],
)
def test_remedy_depends_on_whether_the_cache_is_the_cause(cause, remedy):
    guard = NonFiniteGuard(Optimizer(), explain=lambda step: cause)
    for step in range(MAX_CONSECUTIVE_BAD_STEPS):
        mark_step(guard, step, denoising=NAN, grad_norm=NAN)
    with pytest.raises(UserError, match=remedy) as error:
        guard.report(one_process)
    assert (", because x is NaN; 5 consecutive" in str(error.value)) == bool(cause)
