"""Skip updates with non-finite losses or gradients, without host-device synchronization."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.cli import UserError
from common.watchdog import waiting_for_processes

MAX_CONSECUTIVE_BAD_STEPS = 5
# Isolated fp16 overflows are normal. After 32 in a row the loss scale has fallen from 2**16 to
# 2**-16, so lowering it further does not help.
MAX_CONSECUTIVE_OVERFLOWS = 32


@dataclass
class NonFiniteGuard:
    """Makes the optimizer skip updates that would write NaN or Inf into the weights.

    Fused optimizers read `optimizer.found_inf` on the device and skip the update if it is 1;
    GradScaler uses the same mechanism. With fp16 the GradScaler already skips overflowed gradients.
    This class then reports only non-finite losses, and overflows that persist while the loss scale
    falls.

    Args:
        optimizer: A fused optimizer.
        uses_grad_scaler: Whether mixed precision is fp16.
        bad_in_a_row: Number of consecutive bad steps when the checkpoint was written.
        overflows_in_a_row: Number of consecutive fp16 overflows when it was written.
        explain: Function that returns the cause of a bad step in the data, or "" if there is none.
    """

    optimizer: torch.optim.Optimizer
    uses_grad_scaler: bool = False
    bad_in_a_row: int = 0
    overflows_in_a_row: int = 0
    explain: Callable[[int], str] = lambda step: ""

    def __post_init__(self) -> None:
        self.names: list[str] = []
        # Maps each step to (number of scalars,), 1.0 where a scalar is not finite.
        self.pending: dict[int, Tensor] = {}

    def mark_step(self, step: int, losses: dict[str, Tensor], grad_norm: Tensor) -> Tensor:
        """Record a step and make the optimizer skip its update if the gradient is not finite.

        Call it after the backward pass and before `optimizer.step()`.

        Args:
            step: Index of the step, for the report.
            losses: The losses of this process, scalar tensors.
            grad_norm: The gradient norm of all processes, a scalar tensor.

        Returns:
            1.0 if the update is applied and 0.0 if it is skipped, on the device.
        """
        self.names = [*losses, "grad_norm"]
        is_bad = ~torch.isfinite(torch.stack([*losses.values(), grad_norm]).detach())
        if not self.uses_grad_scaler:
            # A non-finite loss gives a non-finite gradient, which DDP spreads to every process.
            setattr(self.optimizer, "found_inf", is_bad[-1].float())  # noqa: B010 (an undeclared attribute)
        self.pending[step] = is_bad.float()
        return 1 - is_bad.any().float()

    def report(self, reduce: Callable[[Tensor, str], Tensor]) -> list[str]:
        """Return one message per bad step since the last report.

        Args:
            reduce: `reduce(tensor, "mean")` averages over the processes.

        Raises:
            UserError: Too many consecutive steps were bad.
        """
        if not self.pending:
            return []
        table = torch.stack(list(self.pending.values()))
        with waiting_for_processes("the skipped steps of all processes"):
            rows = reduce(table, "mean").gt(0).tolist()
        steps = list(self.pending)
        self.pending.clear()
        messages: list[str] = []
        for step, row in zip(steps, rows):
            bad_names = [name for name, is_bad in zip(self.names, row) if is_bad]
            cause = ""
            is_overflow = self.uses_grad_scaler and bad_names == ["grad_norm"]
            is_bad_step = bool(bad_names) and not is_overflow
            self.overflows_in_a_row = self.overflows_in_a_row + 1 if is_overflow else 0
            self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad_step else 0
            if is_bad_step:
                skipped = "; update skipped" if "grad_norm" in bad_names else ""
                cause = self.explain(step)
                reason = f", because {cause}" if cause else ""
                message = f"step {step:,}: not finite: {', '.join(bad_names)}{skipped}{reason}"
                messages.append(message)
            self._check_limits(step, messages, cause)
        return messages

    def _check_limits(self, step: int, messages: list[str], cause: str) -> None:
        if self.bad_in_a_row == MAX_CONSECUTIVE_BAD_STEPS:
            remedy = "Repair the cache and rerun the same command"
            if not cause:
                remedy = (
                    "Start a new run with a lower --learning-rate: resuming this run repeats the "
                    "same images and noise"
                )
            raise UserError(
                f"{messages[-1]}; {MAX_CONSECUTIVE_BAD_STEPS} consecutive steps were bad. "
                f"Training was stopped, and the last checkpoint is unaffected. {remedy}"
            )
        if self.overflows_in_a_row == MAX_CONSECUTIVE_OVERFLOWS:
            raise UserError(
                f"step {step:,}: the gradient is not finite in fp16 at any loss scale; "
                f"{MAX_CONSECUTIVE_OVERFLOWS} consecutive steps overflowed. Training was stopped, "
                "and the last checkpoint is unaffected. Start a new run with --mixed-precision "
                "bf16, which has the range of float32: resuming this run repeats the same images "
                "and noise"
            )
