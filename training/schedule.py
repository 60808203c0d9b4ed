"""The learning rate of each update, as a function of the number of earlier updates."""

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up, followed by a constant, cosine or linear schedule.

    Nothing is stored in checkpoints, because the rate depends only on the settings and the step.
    Skipped updates count as updates.

    Args:
        peak: The highest learning rate.
        kind: One of SCHEDULES.
        warmup_steps: Number of updates before the peak is reached.
        min_factor: Final learning rate of a cosine or linear schedule, as a fraction of the peak.
        num_steps: Number of updates of the run.
    """

    peak: float
    kind: str
    warmup_steps: int
    min_factor: float
    num_steps: int

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rates depend on the number of updates of the run."""
        return self.kind != "constant"

    @property
    def is_fixed(self) -> bool:
        """Whether all updates have the same learning rate."""
        return self.kind == "constant" and self.warmup_steps == 0

    def compute(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` updates.

        During the warm-up of W updates, it is (step + 1) / (W + 1) of the peak. The decay starts
        from the peak at step = W and would reach its final value at step = `num_steps`.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))
        remaining = 1 - progress
        if self.kind == "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (self.min_factor + (1 - self.min_factor) * remaining)
