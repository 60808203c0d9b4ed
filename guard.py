"""Keeps numbers gone bad out of the weights, without asking the device in the step."""

import torch
from torch import Tensor

from cli import UserError

PATIENCE = 5  # bad steps in a row that end a run
SOURCES = ("velocity loss", "alignment loss", "gradient")


class Guard:
    """Finds steps whose losses or gradient are not finite.

    The verdict stays on the device: the optimizer skips the update by it (torch's `found_inf`, as GradScaler does), and the
    log brings it over with everything else. Under fp16 the scaler skips overflown gradients itself, as a matter of course:
    there only the losses count."""

    def __init__(self, optimizer: torch.optim.Optimizer, fp16: bool, streak: int = 0):
        self.optimizer, self.fp16, self.streak = optimizer, fp16, streak
        self.steps: list[int] = []
        self.verdicts: list[Tensor] = []

    def judge(self, step: int, losses: Tensor, grad_norm: Tensor) -> Tensor:
        """Losses (2,) of this process, gradient norm of all -> whether the step is good, a float on the device."""
        bad = ~torch.isfinite(torch.cat((losses.detach(), grad_norm.detach().reshape(1))))
        if self.fp16:
            bad[2] = False
        else:
            self.optimizer.found_inf = bad[2].float()  # a bad loss makes a bad gradient, and DDP makes it everyone's
        self.steps.append(step)
        self.verdicts.append(bad.float())
        return 1 - bad.any().float()

    def report(self, reduce) -> tuple[list[str], int]:
        """What to tell of the steps since the last report, and how many were bad. Raises UserError after PATIENCE in a row."""
        if not self.steps:
            return [], 0
        rows = reduce(torch.stack(self.verdicts), "mean").gt(0).tolist()
        lines = []
        for step, row in zip(self.steps, rows):
            self.streak = self.streak + 1 if any(row) else 0
            if any(row):
                what = ", ".join(name for name, bad in zip(SOURCES, row) if bad)
                lines.append(f"step {step:,}: {what} not finite, update skipped")
            if self.streak == PATIENCE:
                raise UserError(
                    f"{lines[-1]}, like the {PATIENCE - 1} before it; stopped, with the last checkpoint as it was. "
                    "A lower --learning-rate in a new run may help"
                )
        self.steps, self.verdicts = [], []
        return lines, len(lines)
