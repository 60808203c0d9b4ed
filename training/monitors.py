"""Run the previews and evaluations of the EMA during training."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from checkpointing.storage import format_error
from models.sit import SiT
from training.evaluation import Evaluator, Stopped
from training.log import RunLog, is_due
from training.preview import Preview, preview_path
from training.state import TrainState


@dataclass
class Monitors:
    """Draws previews of each EMA and evaluates it, periodically and at the last step.

    Args:
        log: Log of the run.
        ema_decays: Decays of the EMAs; the first is the primary one.
        last_step: Number of updates of the whole run.
        preview: Draws sample grids; None if disabled, and on all processes but the first.
        evaluator: Computes metrics; None if disabled.
        preview_every: Steps between previews.
        eval_every: Steps between evaluations.
        complete_evaluations: Step and EMA decay of evaluations that were complete when the run
            stopped.
    """

    log: RunLog
    ema_decays: tuple[float, ...]
    last_step: int
    preview: Preview | None
    evaluator: Evaluator | None
    preview_every: int
    eval_every: int
    complete_evaluations: Collection[tuple[int, float]] = ()

    def run_due(
        self, state: TrainState, gather: Callable[[Tensor], Tensor], is_stopped: Callable[[], bool]
    ) -> bool:
        """Run previews and evaluations that are due and incomplete; all processes must call this.

        Args:
            state: State of the run.
            gather: Concatenates a tensor of every process.
            is_stopped: Returns whether a stop signal arrived.

        Returns:
            False if a stop signal interrupted the work.
        """
        step = state.step
        is_preview_due = is_due(step, self.preview_every, self.last_step)
        is_evaluation_due = is_due(step, self.eval_every, self.last_step)
        preview = self.preview if is_preview_due else None
        evaluator = self.evaluator if is_evaluation_due else None
        if not preview and not evaluator:
            return True
        with self.log.throughput.pause():
            suffixes = ema_suffixes(self.ema_decays)
            for decay, suffix, ema in zip(self.ema_decays, suffixes, state.emas):
                if preview:
                    self._draw(preview, ema, step, suffix)
                if evaluator and (step, decay) not in self.complete_evaluations:
                    try:
                        metrics = evaluator.measure(ema, gather, is_stopped)
                    except Stopped:
                        return False
                    if metrics:
                        identity = {"ema_decay": decay, **evaluator.identity}
                        self.log.record_evaluation(f"eval{suffix}", step, metrics, identity)
        return True

    def _draw(self, preview: Preview, ema: SiT, step: int, suffix: str) -> None:
        path = preview_path(self.log.folder, step, suffix)
        if path.exists():
            return
        try:
            preview.draw(ema, path, f"EMA{suffix.replace('-ema', ' ')} at step {step:,}")
            self.log.record_image(f"samples{suffix}", path, step)
        except OSError as error:  # a failed preview must not stop training
            self.log.info(f"could not save {path}: {format_error(error)}; training continues")


def ema_suffixes(decays: tuple[float, ...]) -> list[str]:
    """Return the suffix of each EMA in file names and trackers, "" for the primary one."""
    return ["", *(f"-ema{decay}" for decay in decays[1:])]
