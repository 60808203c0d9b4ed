"""Runs previews and evaluations of the EMA on a schedule, and finds out where a run stopped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from checkpointing.storage import format_error, list_checkpoints
from common.metrics_log import read_rows
from models.sit import SiT
from training.config import EvaluationConfig, PreviewConfig
from training.evaluation import Evaluator, Stopped
from training.log import RunLog, is_due
from training.preview import Preview, preview_path
from training.state import TrainState


@dataclass(frozen=True)
class RunPosition:
    """Where a run stands when it is started; the same on all processes."""

    checkpoints: list[Path] = field(default_factory=list)  # oldest first
    step: int = 0  # of the newest checkpoint
    evaluated_decays: frozenset[float] = frozenset()  # EMAs whose evaluation at `step` is done
    has_pending_work: bool = False  # a preview or evaluation at `step` was interrupted


class EMASchedule:
    """Previews and evaluates each EMA periodically and at the last step.

    Args:
        log: Log of the run.
        ema_decays: Decays of the EMAs; the first is the primary one.
        last_step: Number of updates of the whole run.
        preview: Draws sample grids; None on other processes than the first, or without previews.
        evaluator: Computes metrics; None without evaluations.
        preview_every: Steps between previews.
        eval_every: Steps between evaluations.
    """

    def __init__(
        self,
        log: RunLog,
        ema_decays: tuple[float, ...],
        last_step: int,
        preview: Preview | None,
        evaluator: Evaluator | None,
        preview_every: int,
        eval_every: int,
    ):
        self.log = log
        self.ema_decays = ema_decays
        self.last_step = last_step
        self.preview = preview
        self.evaluator = evaluator
        self.preview_every = preview_every
        self.eval_every = eval_every
        self.evaluated: set[tuple[int, float]] = set()  # (step, EMA decay)

    def restore(self, position: RunPosition) -> None:
        """Skip the evaluations that were complete when the run stopped."""
        self.evaluated = {(position.step, decay) for decay in position.evaluated_decays}

    def run_due(
        self, state: TrainState, gather: Callable[[Tensor], Tensor], is_stopped: Callable[[], bool]
    ) -> bool:
        """Run what is due at this step and not complete. All processes must call this.

        Args:
            state: State of the run.
            gather: Concatenates a tensor of every process.
            is_stopped: Whether a stop signal arrived.

        Returns:
            False if a stop signal interrupted the work.
        """
        step = state.step
        preview = self.preview if self._is_due(step, self.preview_every) else None
        evaluator = self.evaluator if self._is_due(step, self.eval_every) else None
        if not preview and not evaluator:
            return True
        with self.log.throughput.pause():
            for decay, suffix, ema in zip(
                self.ema_decays, ema_suffixes(self.ema_decays), state.emas
            ):
                if preview:
                    self._draw(preview, ema, step, suffix)
                if evaluator and (step, decay) not in self.evaluated:
                    try:
                        metrics = evaluator.measure(ema, gather, is_stopped)
                    except Stopped:
                        return False
                    if metrics:
                        identity = {"ema_decay": decay, **evaluator.identity}
                        self.log.evaluation(f"eval{suffix}", step, metrics, identity)
        return True

    def _is_due(self, step: int, period: int) -> bool:
        return is_due_or_last(step, period, self.last_step)

    def _draw(self, preview: Preview, ema: SiT, step: int, suffix: str) -> None:
        path = preview_path(self.log.folder, step, suffix)
        if path.exists():
            return
        try:
            preview.draw(ema, path, f"EMA{suffix.replace('-ema', ' ')} at step {step:,}")
            self.log.image(f"samples{suffix}", path, step)
        except OSError as error:  # a failed preview must not stop training
            self.log.info(f"could not save {path}: {format_error(error)}; training continues")


def is_due_or_last(step: int, period: int, last_step: int) -> bool:
    """Return whether an action is due: every `period` steps and at the last step.

    A period of 0 disables it.
    """
    return step > 0 and period > 0 and (is_due(step, period) or step == last_step)


def ema_suffixes(decays: tuple[float, ...]) -> list[str]:
    """Return the part of a preview's file name that tells EMAs apart, "" for the primary one."""
    return ["", *(f"-ema{decay}" for decay in decays[1:])]


def find_position(
    folder: Path,
    ema_decays: tuple[float, ...],
    last_step: int,
    preview: PreviewConfig,
    evaluation: EvaluationConfig,
) -> RunPosition:
    """Find out where a run stopped.

    Args:
        folder: The run folder; a new run may have none.
        ema_decays: Decays of the EMAs.
        last_step: Number of updates of the whole run.
        preview: Settings of the previews.
        evaluation: Settings of the evaluations.
    """
    checkpoints = list_checkpoints(folder)
    step = int(checkpoints[-1].name) if checkpoints else 0
    rows = [row for row in read_rows(folder) if row["step"] == step and "evaluation" in row]
    evaluated = frozenset(row["evaluation"]["ema_decay"] for row in rows)
    previews = [preview_path(folder, step, suffix) for suffix in ema_suffixes(ema_decays)]
    is_evaluation_due = is_due_or_last(step, evaluation.every, last_step)
    is_preview_due = is_due_or_last(step, preview.every, last_step)
    lacks_evaluation = not evaluated >= set(ema_decays)
    lacks_preview = not all(path.exists() for path in previews)
    return RunPosition(
        checkpoints,
        step,
        evaluated,
        has_pending_work=(is_evaluation_due and lacks_evaluation)
        or (is_preview_due and lacks_preview),
    )
