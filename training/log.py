"""Log of a run: metrics.jsonl, log.txt, the progress bar and the trackers."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import LineWriter, write_file
from common.metrics_log import METRICS_SCHEMA
from training.guard import NonFiniteGuard
from training.throughput import Throughput
from training.trackers import Trackers


def is_due(step: int, period: int) -> bool:
    """Return whether an action of every `period` steps is due; a period of 0 disables it."""
    return period > 0 and step % period == 0


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
        progress: dict | None = None,
    ):
        progress = progress or {}
        self.names = names
        self.reduce = reduce
        self.sums = torch.tensor(progress.get("log_sums", [0.0] * len(names)), device=device)
        self.num_finite_steps = torch.tensor(progress.get("log_good", 0.0), device=device)

    def add(self, scalars: dict[str, Tensor], is_finite: Tensor) -> None:
        """Add one step's scalars of this process; they count only if `is_finite` is 1."""
        values = torch.stack([scalars[name] for name in self.names])
        self.sums += torch.where(is_finite > 0, values, 0)
        self.num_finite_steps += is_finite

    def compute(self) -> dict[str, float | None]:
        """Return the means over steps and processes, None if no step was finite, and reset them."""
        *sums, num_steps = self._reduced()
        self.sums.zero_()
        self.num_finite_steps.zero_()
        return {
            name: total / num_steps if num_steps else None for name, total in zip(self.names, sums)
        }

    def state_dict(self) -> dict:
        """Return the sums so far, for a checkpoint."""
        *sums, num_steps = self._reduced()
        return {"log_sums": sums, "log_good": num_steps}

    def _reduced(self) -> list[float]:
        packed = torch.cat((self.sums, self.num_finite_steps.reshape(1)))
        return self.reduce(packed, "mean").tolist()


class Console:
    """Progress bar and log.txt of the main process; silent on the others.

    Args:
        folder: The run folder.
        total: Number of images of the run.
        initial: Number of images before this start.
        is_main_process: Whether to write anything.
    """

    def __init__(self, folder: Path, total: int, initial: int, is_main_process: bool = True):
        self.lines = LineWriter(folder / "log.txt")
        self.is_main_process = is_main_process
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit="img",
            unit_scale=True,
            desc=folder.name,
            smoothing=0.05,
            disable=not is_main_process,
        )

    def info(self, text: str) -> None:
        """Write one message above the progress bar and to log.txt."""
        if self.is_main_process:
            tqdm.write(text)
            self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def advance(self, num_images: int) -> None:
        """Advance the progress bar."""
        self.bar.update(num_images)

    def show(self, values: dict[str, float | None]) -> None:
        """Show numbers behind the progress bar."""
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items() if v is not None})

    def close(self) -> bool:
        """Close the bar. Return whether log.txt is complete."""
        self.bar.close()
        return self.lines.append()


class MetricsFile:
    """metrics.jsonl of a run. While the disk is full, lines are buffered in memory.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = LineWriter(folder / "metrics.jsonl")

    def truncate_to_checkpoint(self, step: int, buffered: str) -> None:
        """Drop lines newer than the checkpoint, because those steps are repeated.

        Args:
            step: Step of the checkpoint.
            buffered: Lines that were buffered in memory when the checkpoint was written; those
                that were not written later are restored.
        """
        path = self.lines.path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        kept += [line for line in buffered.splitlines(keepends=True) if line not in kept]
        if kept or path.exists():
            write_file(path, "".join(kept).encode())

    def append(self, row: dict) -> bool:
        """Append a line. Return False if the disk did not take it."""
        return self.lines.append(json.dumps({"schema": METRICS_SCHEMA, **row}) + "\n")

    def sync(self) -> bool:
        """Write buffered lines and fsync the file. Return False if the disk did not take them."""
        return self.lines.append(sync=True)


class RunLog:
    """Records the metrics of a run every `log_every` steps.

    Args:
        console: Progress bar and messages.
        file: metrics.jsonl.
        trackers: Experiment trackers.
        means: Means of the scalars of the steps.
        throughput: Speed of the steps.
        guard: Reports skipped steps.
        log_every: Steps between lines.
    """

    def __init__(
        self,
        console: Console,
        file: MetricsFile,
        trackers: Trackers,
        means: MetricMeans,
        throughput: Throughput,
        guard: NonFiniteGuard,
        log_every: int,
    ):
        self.console = console
        self.file = file
        self.trackers = trackers
        self.means = means
        self.throughput = throughput
        self.guard = guard
        self.log_every = log_every
        self.num_skipped = 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.file.folder

    def restore(self, step: int, progress: dict) -> None:
        """Continue the log at a checkpoint, given what `collect_progress` returned."""
        self.num_skipped = progress.get("log_skipped", 0)
        if self.console.is_main_process:
            self.file.truncate_to_checkpoint(step, progress.get("log_waiting", ""))

    def collect_progress(self) -> dict:
        """Collect what a checkpoint keeps, so that a resumed run logs what an unbroken one does.

        All processes must call this. It also reports skipped steps, which may end the run.
        """
        self._collect_skipped_steps()
        values = self.means.state_dict()
        if self.console.is_main_process:
            self.file.sync()  # a power failure after the checkpoint must not remove older lines
        guard = self.guard
        return {
            **values,
            "log_skipped": self.num_skipped,
            "log_waiting": self.file.lines.pending,
            "bad_in_a_row": (guard.bad_in_a_row, guard.overflows_in_a_row),
        }

    def info(self, text: str) -> None:
        """Write one message to the console and log.txt."""
        self.console.info(text)

    def record_step(self, step: int, scalars: dict[str, Tensor], is_finite: Tensor) -> None:
        """Record a step; every `log_every` steps, reduce over the processes and write a line.

        Args:
            step: Number of updates so far.
            scalars: Scalars of this process, on the device.
            is_finite: 1 if the scalars count in the means, else 0, on the device.
        """
        self.means.add(scalars, is_finite)
        self.console.advance(self.throughput.batch_size)
        if is_due(step, self.log_every):
            self._write_line(step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Record a preview."""
        self.info(f"saved {path}")
        self.trackers.log_image(name, path, step)

    def evaluation(self, name: str, step: int, metrics: dict, identity: dict) -> None:
        """Record an evaluation on a line of its own.

        Args:
            name: Prefix of the metrics in the trackers.
            step: Number of updates so far.
            metrics: Numbers of the evaluation.
            identity: Everything that identifies the numbers, "ema_decay" among it.
        """
        if not self.console.is_main_process:
            return
        self._append({**self._position(step), **metrics, "evaluation": identity})
        values = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None)
        self.info(f"step {step:,}, EMA {identity['ema_decay']}: {values}")
        self.trackers.log({f"{name}/{key}": value for key, value in metrics.items()}, step)

    def close(self) -> None:
        """Write what is buffered, and close the bar and the trackers."""
        is_main = self.console.is_main_process
        is_complete = self.console.close()
        if is_main and not (self.file.lines.append() and is_complete):
            print(
                f"{self.folder}: the last lines of metrics.jsonl or log.txt could not be written",
                file=sys.stderr,
            )
        self.trackers.close()

    def _write_line(self, step: int) -> None:
        self._collect_skipped_steps()
        means = self.means.compute()
        row: dict[str, Any] = {**self._position(step), **means, "skipped": self.num_skipped}
        row |= self.throughput.measure(step)
        self.num_skipped = 0
        if self.console.is_main_process:
            self._append(row)
            self.console.show(means)
            self.trackers.log(row, step)

    def _position(self, step: int) -> dict[str, int]:
        return {"step": step, "images": step * self.throughput.batch_size}

    def _append(self, row: dict) -> None:
        if not self.file.append(row):
            self.info(
                f"could not write to {self.file.lines.path}: its lines are buffered in memory, "
                "training continues"
            )

    def _collect_skipped_steps(self) -> None:
        messages = self.guard.report(self.means.reduce)
        self.num_skipped += len(messages)
        for message in messages:
            self.info(message)
