"""Run the previews and evaluations of the EMA during training.

A failed preview or evaluation does not end the run, because training takes days and the next one
may succeed. A trial before the first step detects those that can never succeed.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from checkpointing.storage import format_error
from common.cli import UserError
from common.image_grid import save_png
from latents.cache import LatentCache
from models.sit import SiT
from training.evaluation import Evaluator
from training.joint_work import JointWorkError, Stopped, exchange_status, fail_jointly
from training.log import RunLog, is_due
from training.preview import Gather, Preview, preview_path, real_images_path
from training.sharding import allocate
from training.state import TrainState

Result = TypeVar("Result")

MAX_CONSECUTIVE_FAILURES = 3
DISABLING_FLAGS = {
    "preview": "--sampling-steps 0",
    "evaluation": "--eval-every 0",
}


@dataclass
class FailureCount:
    """Number of consecutive failures of previews or evaluations.

    Args:
        flags: The flags that they failed with.
        consecutive: Number of failures since the last success.
    """

    flags: dict = field(default_factory=dict)
    consecutive: int = 0


def restore_failures(progress: dict, flags: Mapping[str, dict]) -> dict[str, FailureCount]:
    """Return the failures when the checkpoint was written, or none if the flags were changed.

    Args:
        progress: Values that `Monitors.collect_progress` returned then.
        flags: The flags of each kind of work.
    """
    stored = progress.get("monitor_failures", {})
    failures = {}
    for kind, current_flags in flags.items():
        failures[kind] = FailureCount(**stored.get(kind, {}))
        if failures[kind].flags != current_flags:
            failures[kind] = FailureCount(current_flags)
    return failures


@dataclass
class Monitors:
    """Draws previews of each EMA and evaluates it, periodically and at the last step.

    Failures are logged and skipped. After three in a row, previews or evaluations are switched off.

    Args:
        log: Log of the run.
        ema_decays: Decays of the EMAs; the first is the primary one.
        last_step: Number of updates of the whole run.
        preview: Draws sample grids; None if disabled.
        evaluator: Computes metrics; None if disabled.
        preview_every: Steps between previews.
        eval_every: Steps between evaluations.
        complete_evaluations: Step and EMA decay of evaluations that were complete when the run
            stopped.
        complete_previews: Files of previews that were complete when the run stopped.
        real_cache: Latent cache whose images are drawn once, next to the first preview; None if the
            run has drawn them.
        failures: Number of consecutive failures of each kind of work.
    """

    log: RunLog
    ema_decays: tuple[float, ...]
    last_step: int
    preview: Preview | None
    evaluator: Evaluator | None
    preview_every: int
    eval_every: int
    complete_evaluations: Collection[tuple[int, float]] = ()
    complete_previews: Collection[Path] = ()
    real_cache: LatentCache | None = None
    failures: dict[str, FailureCount] = field(
        default_factory=lambda: {kind: FailureCount() for kind in DISABLING_FLAGS}
    )

    def run_due(self, state: TrainState, gather: Gather, is_stopped: Callable[[], bool]) -> bool:
        """Run previews and evaluations that are due and incomplete; all processes must call this.

        Args:
            state: State of the run.
            gather: Concatenates a tensor of every process on the first one.
            is_stopped: Returns whether a stop signal arrived.

        Returns:
            False if a stop signal interrupted the work.
        """
        step = state.step
        preview = self.preview if is_due(step, self.preview_every, self.last_step) else None
        evaluator = self.evaluator if is_due(step, self.eval_every, self.last_step) else None
        if preview and self.real_cache is not None:
            self._draw_real_images(preview, self.real_cache, gather, step)
        suffixes = ema_suffixes(self.ema_decays)
        for decay, suffix, ema in zip(self.ema_decays, suffixes, state.emas):
            path = preview_path(self.log.folder, step, suffix)
            load_network = partial(gather_ema, state, ema)
            if preview and path not in self.complete_previews:
                title = f"EMA{suffix.replace('-ema', ' ')} at step {step:,}"
                draw = partial(self._draw, preview, load_network, gather, path, title)
                if self._attempt("preview", step, draw):
                    self.log.record_image(f"samples{suffix}", path, step)
                self.complete_previews = {*self.complete_previews, path}
            if evaluator and (step, decay) not in self.complete_evaluations:
                measure = partial(self._measure, evaluator, load_network, gather, is_stopped)
                try:
                    metrics = self._attempt("evaluation", step, measure)
                except Stopped:
                    return False
                if metrics:
                    identity = {"ema_decay": decay, **evaluator.identity}
                    self.log.record_evaluation(f"eval{suffix}", step, metrics, identity)
        return True

    def collect_progress(self) -> dict:
        """Return the number of failures, which a resumed run continues to count."""
        return {"monitor_failures": {kind: asdict(count) for kind, count in self.failures.items()}}

    def _attempt(self, kind: str, step: int, work: Callable[[], Result]) -> Result | None:
        """Return the result of the work, or None if it failed or is switched off."""
        failures = self.failures[kind]
        if failures.consecutive >= MAX_CONSECUTIVE_FAILURES:
            return None
        try:
            with self.log.throughput.pause(kind), fail_jointly():
                result = work()
        except JointWorkError as error:
            failures.consecutive += 1
            self.log.info(f"the {kind} at step {step:,} failed ({error}); training continues")
            if failures.consecutive == MAX_CONSECUTIVE_FAILURES:
                self.log.info(
                    f"{kind}s are switched off after {MAX_CONSECUTIVE_FAILURES} failures in a row, "
                    f"until the run is resumed with other {kind} flags"
                )
            return None
        failures.consecutive = 0
        return result

    def _measure(
        self,
        evaluator: Evaluator,
        load_network: Callable[[], SiT],
        gather: Gather,
        is_stopped: Callable[[], bool],
    ) -> dict[str, float | None] | None:
        return evaluator.measure(load_network(), gather, is_stopped)

    def _draw(
        self,
        preview: Preview,
        load_network: Callable[[], SiT],
        gather: Gather,
        path: Path,
        title: str,
    ) -> bool:
        """Draw a preview. Return True on the first process if the file was saved."""
        return self._save(preview.draw(load_network(), gather, title), path)

    def _draw_real_images(
        self, preview: Preview, cache: LatentCache, gather: Gather, step: int
    ) -> None:
        """Draw training images next to a preview. After a failure, the next preview draws them."""
        path = real_images_path(self.log.folder)

        def draw() -> bool:
            return self._save(preview.draw_real(cache, gather), path)

        is_saved = self._attempt("preview", step, draw)
        if is_saved is None:  # the attempt has failed on all processes
            return
        self.real_cache = None
        if is_saved:
            self.log.record_image("samples-real", path, step)

    def _save(self, image: Image.Image | None, path: Path) -> bool:
        """Save an image on the process that has one. Return True if the file was saved."""
        if image is None:
            return False
        try:
            save_png(image, path)
        except OSError as error:  # a full disk is temporary, so it does not count as a failure
            self.log.info(f"could not save {path}: {format_error(error)}; training continues")
            return False
        return True


def run_trials(
    preview: Preview | None,
    evaluator: Evaluator | None,
    state: TrainState,
    gather: Gather,
    is_main_process: bool,
) -> None:
    """Run a small preview and a small evaluation; all processes must call this.

    Raises:
        UserError: On the main process, if one of them failed on any process.
        SystemExit: On the other processes, with code 2.
    """
    for kind, monitor in {"preview": preview, "evaluation": evaluator}.items():
        if monitor:
            _run_trial(kind, partial(_try_out, monitor, state, gather), is_main_process)


def _try_out(monitor: Preview | Evaluator, state: TrainState, gather: Gather) -> None:
    monitor.try_out(gather_ema(state, state.emas[0]), gather)


def gather_ema(state: TrainState, ema: SiT) -> SiT:
    """Return a network with the weights of an EMA that does not communicate when it is run.

    If the EMA is sharded, this is an unsharded copy; all processes must call this.
    """
    if state.sharding is None:
        return ema
    with torch.device("meta"):
        network = SiT(ema.config)
    allocate(network, state.sharding.device)
    exchange_status()  # the allocation may fail on one process only
    state.sharding.gather(ema, network)
    return network.eval().requires_grad_(False)


def _run_trial(kind: str, work: Callable[[], None], is_main_process: bool) -> None:
    try:
        with fail_jointly():
            work()
    except JointWorkError as error:
        if not is_main_process:
            raise SystemExit(2) from None
        raise UserError(
            f"the trial {kind} before the first step failed ({error}): fix the problem, or pass "
            f"{DISABLING_FLAGS[kind]}"
        ) from None


def ema_suffixes(decays: tuple[float, ...]) -> list[str]:
    """Return the suffix of each EMA in file names and trackers, "" for the primary one."""
    return ["", *(f"-ema{decay}" for decay in decays[1:])]
