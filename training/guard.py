"""Keeps numbers gone bad out of the weights, without asking the device in the step."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.cli import UserError

PATIENCE = 5  # bad steps in a row that end a run
OVERFLOWS = 32  # likewise of fp16's overflows, which are ordinary: the scale, 65,536 at first, is 2**-16 after so many
SOURCES = ("denoising loss", "alignment loss", "gradient")


class NonFiniteGuard:
    """Finds steps whose losses or gradient are not finite.

    The verdict stays on the device: the optimizer skips the update by it (torch's `found_inf`, as GradScaler does), and the
    log brings it over with everything else. Under fp16 the scaler skips overflown gradients itself, as a matter of course:
    there only the losses count, and overflows that lowering the scale does not end.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, fp16: bool, streak: int = 0, overflows: int = 0
    ):
        """streak and overflows: those in a row when the run was saved."""
        self.optimizer, self.fp16, self.streak, self.overflows = optimizer, fp16, streak, overflows
        self.steps: list[int] = []
        self.verdicts: list[Tensor] = []

    def judge(self, step: int, denoising: Tensor, align: Tensor, grad_norm: Tensor) -> Tensor:
        """Losses of this process, gradient norm of all, each a number -> 1 if the step updates the weights, else 0, on the
        device.
        """
        bad = ~torch.isfinite(torch.stack((denoising, align, grad_norm)).detach())
        if not self.fp16:
            self.optimizer.found_inf = bad[
                2
            ].float()  # a bad loss makes a bad gradient, and DDP makes it everyone's
        self.steps.append(step)
        self.verdicts.append(bad.float())
        return 1 - bad.any().float()

    def report(self, reduce: Callable[[Tensor, str], Tensor]) -> tuple[list[str], int]:
        """What to tell of the steps since the last report, and how many were bad. Raises UserError after PATIENCE in a row."""
        if not self.steps:
            return [], 0
        rows = reduce(torch.stack(self.verdicts), "mean").gt(0).tolist()
        lines = []
        for step, row in zip(self.steps, rows):
            overflow = self.fp16 and not any(row[:2]) and row[2]
            self.overflows = self.overflows + 1 if overflow else 0
            bad = any(row) and not overflow
            self.streak = self.streak + 1 if bad else 0
            if bad:
                what = ", ".join(name for name, bad in zip(SOURCES, row) if bad)
                lines.append(f"step {step:,}: {what} not finite" + ", update skipped" * row[2])
            if self.streak == PATIENCE:
                raise UserError(
                    f"{lines[-1]}, like the {PATIENCE - 1} before it; stopped, with the last checkpoint as it was. "
                    "A lower --learning-rate in a new run may help"
                )
            if self.overflows == OVERFLOWS:
                raise UserError(
                    f"step {step:,}: gradient not finite in fp16, like the {OVERFLOWS - 1} before it, whatever its scale; "
                    "stopped, with the last checkpoint as it was. --mixed-precision bf16 in a new run has a float32's range"
                )
        self.steps, self.verdicts = [], []
        return lines, len(lines)
