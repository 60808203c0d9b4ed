"""Looks at the averaged models while they train: what is due when, and whether a run that was stopped still owes it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from checkpointing.storage import format_error, list_checkpoints
from models.sit import SiT
from training.evaluation import Evaluator, Stopped
from training.log import Log, evaluated, every
from training.preview import Preview, preview_path
from training.state import TrainState


class Monitor:
    """A preview every --sampling-steps, an evaluation every --eval-every, of each average, and both at the end."""

    def __init__(
        self,
        args: argparse.Namespace,
        log: Log,
        preview: Preview | None,
        evaluator: Evaluator | None,
        start: int,
        measured: set[float],
    ):
        """measured: the averages whose evaluation at step `start` the run had when it was started."""
        self.args, self.log, self.preview, self.evaluator = args, log, preview, evaluator
        self.measured = {(start, decay) for decay in measured}

    def look(
        self, state: TrainState, gather: Callable[[Tensor], Tensor], stopped: Callable[[], bool]
    ) -> bool:
        """Does what is due at this step and not done yet. Called by all processes; gather stacks a tensor of each. Returns
        False if `stopped` cut it short.
        """
        args, step = self.args, state.step
        draw = self.preview and due(args, step, args.sampling_steps)
        measure = self.evaluator and due(args, step, args.eval_every)
        if not draw and not measure:
            return True
        with self.log.pause():
            for decay, name, ema in zip(args.ema_decay, average_names(args), state.emas):
                if draw:
                    self._draw(ema, step, name)
                if measure and (step, decay) not in self.measured:
                    try:
                        numbers = self.evaluator.measure(ema, gather, stopped)
                    except Stopped:
                        return False
                    if numbers:
                        self.log.evaluation(step, decay, numbers, self.evaluator.identity)
        return True

    def _draw(self, ema: SiT, step: int, name: str) -> None:
        path = preview_path(self.log.folder, step, name)
        if path.exists():
            return
        try:
            self.log.image(self.preview.draw(ema, step, name), step)
        except OSError as error:  # no picture is worth a run
            self.log.say(f"could not draw {path}: {format_error(error)}; training goes on")


def due(args: argparse.Namespace, step: int, period: int) -> bool:
    """Every `period` steps, and at the end; never if that is 0."""
    return step > 0 and (every(step, period) or (period > 0 and step == args.max_train_steps))


def average_names(args: argparse.Namespace) -> list[str]:
    """What each --ema-decay adds to the name of a picture; nothing for the first."""
    return ["", *(f"-ema{decay}" for decay in args.ema_decay[1:])]


def where(args: argparse.Namespace, folder: Path) -> tuple[list[Path], int, set[float], bool]:
    """Where a run stands: its checkpoints, the step of the newest, the averages evaluated there, and whether a look at them is
    still owed, as the run was stopped before it.
    """
    saved = list_checkpoints(folder)
    step = int(saved[-1].name) if saved else 0
    measured = evaluated(folder, step)
    pictures = all(preview_path(folder, step, name).exists() for name in average_names(args))
    owed = due(args, step, args.eval_every) and not measured >= set(args.ema_decay)
    return saved, step, measured, owed or (due(args, step, args.sampling_steps) and not pictures)
