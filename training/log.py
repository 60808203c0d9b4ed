"""Write the log of a run: metrics.jsonl, messages, the progress and the trackers."""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpointing.storage import RunOwner
from common.files import LineWriter, write_file
from common.logs import get_logger
from common.metrics_log import METRICS_SCHEMA, is_zeroed, split_lines
from common.progress import ProgressBar
from common.watchdog import waiting_for_processes
from training.guard import NonFiniteGuard
from training.schedule import LearningRateSchedule
from training.throughput import Throughput
from training.trackers import Trackers

logger = get_logger(__name__)


def is_due(step: int, period: int, last_step: int = 0) -> bool:
    """Return whether an action is due: every `period` steps, and at `last_step` if it is given.

    A period of 0 disables the action.
    """
    return step > 0 and period > 0 and (step % period == 0 or step == last_step)


class MetricMeans:
    """Means of named scalars since the last log line, accumulated on the device.

    Args:
        names: Names of the scalars.
        device: Device of the scalars.
        reduce: `reduce(tensor, "mean")` averages over the processes.
        progress: Values that `state_dict` returned when the checkpoint was written.
    """

    def __init__(
        self,
        names: list[str],
        device: torch.device,
        reduce: Callable[[Tensor, str], Tensor],
        progress: dict,
    ):
        self.names = names
        self.reduce = reduce
        sums = [*progress.get("log_sums", ()), progress.get("log_good", 0.0)]
        if len(sums) != len(names) + 1:  # a new run, or older code logged methods of weight 0
            sums = [0.0] * (len(names) + 1)
        # The last element counts the finite steps.
        self.sums = torch.tensor(sums, device=device)

    def add(self, scalars: dict[str, Tensor], is_finite: Tensor) -> None:
        """Add one step's scalars of this process; they count only if `is_finite` is 1."""
        values = torch.stack([*(scalars[name] for name in self.names), is_finite])
        self.sums += torch.where(is_finite > 0, values, 0)

    def compute(self) -> dict[str, float | None]:
        """Return the means over steps and processes, and reset them; None if no step was finite."""
        *sums, num_steps = self._reduce_sums()
        self.sums.zero_()
        return {
            name: total / num_steps if num_steps else None for name, total in zip(self.names, sums)
        }

    def state_dict(self) -> dict:
        """Return the sums so far, for a checkpoint."""
        *sums, num_steps = self._reduce_sums()
        return {"log_sums": sums, "log_good": num_steps}

    def _reduce_sums(self) -> list[float]:
        with waiting_for_processes("the metrics of all processes"):
            return self.reduce(self.sums, "mean").tolist()


def make_log_path(folder: Path, rank: int) -> Path:
    """Return the path of the messages of a process: log.txt or rank-N.log."""
    return folder / (f"rank-{rank}.log" if rank else "log.txt")


def log_start(rank: int, num_processes: int, device: torch.device) -> None:
    """Record in the file of this process where it runs."""
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    logger.debug(
        "started rank %d of %d on %s, process %d, device %s",
        rank,
        num_processes,
        socket.gethostname(),
        os.getpid(),
        name,
    )


def format_line(
    step: int,
    num_steps: int,
    images_per_s: float,
    remaining_seconds: float | None,
    means: dict[str, float | None],
    learning_rate: float | None = None,
) -> str:
    """Return the line that shows the progress without a terminal.

    It contains only the losses and, if given, the learning rate.

    Args:
        step: Number of updates so far.
        num_steps: Number of steps of the run.
        images_per_s: Images per second without pauses.
        remaining_seconds: Estimate of the remaining time, or None.
        means: Losses and other scalars; None if no step was finite.
        learning_rate: Learning rate of the last update.
    """
    remaining = "?"
    if remaining_seconds is not None:
        remaining = ProgressBar.format_interval(remaining_seconds)
    losses = [
        f"{name} {value:.4f}"
        for name, value in means.items()
        if value is not None and (name in ("loss", "denoising") or name.startswith("align/"))
    ]
    numbers = losses or ["no finite step"]
    if learning_rate is not None:
        numbers = [*numbers, f"lr {learning_rate:.3g}"]
    return (
        f"step {step:,} of {num_steps:,}, {images_per_s:.2f} images/s, {remaining} remaining: "
        f"{', '.join(numbers)}"
    )


class Console:
    """Shows the progress on the main process: a bar on a terminal, and lines of text otherwise.

    Args:
        name: Name of the run.
        num_steps: Number of steps of the run.
        initial_step: Number of steps before this session.
        batch_size: Global batch size.
        is_main_process: Whether to show anything.
    """

    def __init__(
        self, name: str, num_steps: int, initial_step: int, batch_size: int, is_main_process: bool
    ):
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.is_main_process = is_main_process
        self.bar = ProgressBar(
            total=num_steps * batch_size,
            initial=initial_step * batch_size,
            unit="img",
            unit_scale=True,
            desc=name,
            smoothing=0.05,
            line_seconds=None,
            disable=not is_main_process,
        )
        # Step and time after the first step of this session, which may include a compilation.
        self.reference_point: tuple[int, float] | None = None

    def advance(self, step: int) -> None:
        """Count a step."""
        self.bar.update(self.batch_size)
        if self.reference_point is None:
            self.reference_point = (step, time.monotonic())

    def show(
        self,
        step: int,
        means: dict[str, float | None],
        images_per_s: float,
        learning_rate: float | None = None,
    ) -> None:
        """Show numbers next to the progress bar, or write a line.

        Args:
            step: Number of updates so far.
            means: Losses and other scalars; None if no step was finite.
            images_per_s: Images per second without pauses.
            learning_rate: Learning rate of the last update, if it is to be shown.
        """
        if self.bar.writes_lines and self.is_main_process:
            seconds = self.estimate_remaining_seconds(step)
            self.bar.write_line(
                format_line(step, self.num_steps, images_per_s, seconds, means, learning_rate)
            )
        else:
            numbers = {k: f"{value:.4f}" for k, value in means.items() if value is not None}
            if learning_rate is not None:
                numbers["lr"] = f"{learning_rate:.3g}"
            self.bar.set_postfix(numbers)

    def estimate_remaining_seconds(self, step: int) -> float | None:
        """Return the remaining seconds if pauses are as frequent as before, or None if unknown."""
        if self.reference_point is None:
            return None
        first_step, first_time = self.reference_point
        if step == first_step:
            return None
        seconds_per_step = (time.monotonic() - first_time) / (step - first_step)
        return seconds_per_step * (self.num_steps - step)

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()


def drop_repeated_lines(path: Path, step: int, buffered_lines: str) -> int:
    """Drop lines newer than the checkpoint from metrics.jsonl, because those steps are repeated.

    Lines with NUL bytes are dropped as well: a power failure damages only lines that are newer
    than the checkpoint, because older lines were flushed to the disk with it.

    Args:
        path: metrics.jsonl.
        step: Step of the checkpoint.
        buffered_lines: Lines that were buffered in memory when the checkpoint was written; those
            that were not written later are restored.

    Returns:
        Number of lines with NUL bytes.
    """
    lines = split_lines(path.read_bytes()) if path.exists() else []
    valid_lines = [line for line in lines if not is_zeroed(line)]
    kept_lines = [line for line in valid_lines if json.loads(line)["step"] <= step]
    kept_lines += [
        line for line in buffered_lines.encode().splitlines(keepends=True) if line not in kept_lines
    ]
    if kept_lines or path.exists():
        write_file(path, b"".join(kept_lines))
    return len(lines) - len(valid_lines)


@dataclass
class RunLog:
    """Records the metrics of a run every `log_every` steps.

    While the disk is full, lines of metrics.jsonl are buffered in memory. If another process trains
    the run, the next write raises a CheckpointError.

    Args:
        folder: The run folder.
        console: Shows the progress.
        trackers: Experiment trackers.
        means: Running means of the logged scalars.
        throughput: Measures the throughput.
        guard: Reports skipped steps.
        schedule: The learning rate of each update.
        log_every: Steps between lines.
        owner: Confirms on the main process that no other process trains the run.
    """

    folder: Path
    console: Console
    trackers: Trackers
    means: MetricMeans
    throughput: Throughput
    guard: NonFiniteGuard
    schedule: LearningRateSchedule
    log_every: int
    owner: RunOwner | None = None
    num_skipped: int = 0

    def __post_init__(self) -> None:
        self.lines = LineWriter(self.folder / "metrics.jsonl")
        self.resumed_step: int | None = None  # None once lines of repeated steps are dropped

    def restore(self, step: int, progress: dict) -> None:
        """Continue the log at a checkpoint, given the return value of `collect_progress`.

        Lines of repeated steps are dropped by the first write, when the owner is confirmed.
        """
        self.num_skipped = progress.get("log_skipped", 0)
        self.lines.pending = progress.get("log_waiting", "")
        self.resumed_step = step

    def collect_progress(self) -> dict:
        """Return the state that a resumed run needs to write the same log as an uninterrupted run.

        All processes must call this. It also reports skipped steps, which may end the run.
        """
        self._collect_skipped_steps()
        values = self.means.state_dict()
        if self.console.is_main_process:
            # A power failure after the checkpoint must not remove older lines.
            self._write(sync=True)
        return {
            **values,
            "log_skipped": self.num_skipped,
            "log_waiting": self.lines.pending,
            "bad_in_a_row": (self.guard.bad_in_a_row, self.guard.overflows_in_a_row),
        }

    def info(self, text: str) -> None:
        """Write one message to the console of the first process and to the file of each process."""
        logger.info(text)

    def record_step(self, step: int, scalars: dict[str, Tensor], is_finite: Tensor) -> None:
        """Record a step; every `log_every` steps, reduce over the processes and write a line.

        Args:
            step: Number of updates so far.
            scalars: Scalars of this process, on the device.
            is_finite: 1 if the scalars count in the means, else 0, on the device.
        """
        self.means.add(scalars, is_finite)
        self.console.advance(step)
        if is_due(step, self.log_every):
            self._write_line(step)

    def record_image(self, name: str, path: Path, step: int) -> None:
        """Record a preview."""
        self.info(f"saved {path}")
        self.trackers.log_image(name, path, step)

    def record_evaluation(self, name: str, step: int, metrics: dict, identity: dict) -> None:
        """Record an evaluation on a separate line.

        Args:
            name: Prefix of the metrics in the trackers.
            step: Number of updates so far.
            metrics: Metrics of the evaluation.
            identity: Everything that identifies the numbers, including "ema_decay".
        """
        if not self.console.is_main_process:
            return
        self._append({**self._position(step), **metrics, "evaluation": identity})
        values = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None)
        self.info(f"step {step:,}, EMA {identity['ema_decay']}: {values}")
        self.trackers.log({f"{name}/{key}": value for key, value in metrics.items()}, step)

    def close(self) -> None:
        """Flush buffered lines, and close the progress bar and the trackers."""
        self.console.close()
        if self.console.is_main_process and not self._write():
            logger.warning("%s: the last lines could not be written", self.lines.path)
        self.trackers.close()

    def _write_line(self, step: int) -> None:
        self._collect_skipped_steps()
        means = self.means.compute()
        speed = self.throughput.measure(step)
        learning_rate = self.schedule.compute(step - 1)
        row = {
            **self._position(step),
            **means,
            "lr": learning_rate,
            "skipped": self.num_skipped,
            **speed,
        }
        self.num_skipped = 0
        if self.console.is_main_process:
            self._append(row)
            shown_rate = None if self.schedule.is_fixed else learning_rate
            self.console.show(step, means, speed["images_per_s"], shown_rate)
            self.trackers.log(row, step)

    def _position(self, step: int) -> dict[str, int]:
        return {"step": step, "images": step * self.throughput.batch_size}

    def _append(self, row: dict) -> None:
        if not self._write(json.dumps({"schema": METRICS_SCHEMA, **row}) + "\n"):
            self.info(
                f"could not write to {self.lines.path}: its lines are buffered in memory; "
                "training continues"
            )

    def _write(self, text: str = "", sync: bool = False) -> bool:
        """Write pending and new lines to metrics.jsonl, and return whether all were written."""
        if self.owner is not None:
            self.owner.confirm()
        if self.resumed_step is not None:
            try:
                num_zeroed = drop_repeated_lines(
                    self.lines.path, self.resumed_step, self.lines.pending
                )
            except OSError:
                self.lines.pending += text
                return False
            self.lines.pending = ""
            self.resumed_step = None
            if num_zeroed:
                self.info(
                    f"{self.lines.path}: removed {num_zeroed} lines that a power failure damaged"
                )
        return self.lines.append(text, sync)

    def _collect_skipped_steps(self) -> None:
        messages = self.guard.report(self.means.reduce)
        self.num_skipped += len(messages)
        for message in messages:
            self.info(message)
