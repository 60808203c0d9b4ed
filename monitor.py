"""Looks at the averaged models while they train: what is due when, and whether a run that was stopped still owes it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from evaluator import Evaluator, Stopped
from logbook import Log, evaluated, every
from preview import Preview, preview_path
from train_state import TrainState


class Monitor:
    """A preview every --sampling-steps, an evaluation every --eval-every, of each average, and both at the end."""

    def __init__(self, args: argparse.Namespace, log: Log, preview: Preview | None, evaluator: Evaluator | None):
        self.args, self.log, self.preview, self.evaluator = args, log, preview, evaluator

    def look(self, state: TrainState, gather: Callable[[Tensor], Tensor], stopped: Callable[[], bool]) -> bool:
        """Does what is due at this step and not done yet. Called by all processes; gather stacks a tensor of each. Returns
        False if `stopped` cut it short."""
        args, log, step = self.args, self.log, state.step
        with log.pause():
            for decay, name, ema in zip(args.ema_decay, average_names(args), state.emas):
                path = preview_path(log.folder, step, name)
                if self.preview and due(args, step, args.sampling_steps) and not path.exists():
                    log.image(self.preview.draw(ema, step, name), step)
                if self.evaluator and due(args, step, args.eval_every) and not log.measured(step, decay):
                    try:
                        numbers = self.evaluator.measure(ema, gather, stopped)
                    except Stopped:
                        return False
                    if numbers:
                        log.evaluation(step, decay, numbers, self.evaluator.identity)
        return True


def due(args: argparse.Namespace, step: int, period: int) -> bool:
    """Every `period` steps, and at the end; never if that is 0."""
    return step > 0 and (every(step, period) or (period > 0 and step == args.max_train_steps))


def average_names(args: argparse.Namespace) -> list[str]:
    """What each --ema-decay adds to the name of a picture; nothing for the first."""
    return ["", *(f"-ema{decay}" for decay in args.ema_decay[1:])]


def undone(args: argparse.Namespace, folder: Path, step: int) -> bool:
    """Whether a run stopped at this step before it had a look that is due."""
    pictures = all(preview_path(folder, step, name).exists() for name in average_names(args))
    return (due(args, step, args.sampling_steps) and not pictures) or (
        due(args, step, args.eval_every) and not evaluated(folder, step) >= set(args.ema_decay)
    )
