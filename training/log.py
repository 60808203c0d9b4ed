"""The log of a run: one call writes the console, metrics.jsonl and the tracker."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import LineWriter, write_file
from training.guard import NonFiniteGuard
from training.state import TrainState

T = TypeVar("T")


def every(step: int, period: int) -> bool:
    """Whether something done every `period` steps is due; a period of 0 is never."""
    return period > 0 and step % period == 0


class Log:
    """Running means on the device, brought over every --log-every steps."""

    @staticmethod
    def names(methods: list[str]) -> list[str]:
        """The numbers of a step, in this order: the first method's as align, cosine and token_norm, those of further ones with
        their name behind.
        """
        names = ["loss", "denoising"]
        for i, method in enumerate(methods):
            names += [
                f"{name}_{method}" if i else name for name in ("align", "cosine", "token_norm")
            ]
        return [*names, "grad_norm"]

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        state: TrainState,
        device: torch.device,
        main: bool,
        reduce: Callable[[Tensor, str], Tensor],
        guard: NonFiniteGuard,
        utilisation: float,
        tracker: Any = None,
    ):
        """utilisation is the mfu that one image a second would be; reduce(tensor, "mean") averages over processes; the
        tracker has log(row, step), image(path, step) and finish().
        """
        self.args, self.folder, self.main, self.reduce, self.tracker = (
            args,
            folder,
            main,
            reduce,
            tracker,
        )
        self.terms = self.names([] if args.align == ["none"] else args.align)
        self.sums = torch.tensor(
            state.extra.get("log_sums", [0.0] * len(self.terms)), device=device
        )
        self.good = torch.tensor(state.extra.get("log_good", 0.0), device=device)
        self.skipped = state.extra.get("log_skipped", 0)
        self.guard, self.utilisation, self.waited = guard, utilisation, 0.0
        self.clock, self.clock_step = time.perf_counter(), state.step
        self.lines, self.text = LineWriter(folder / "metrics.jsonl"), LineWriter(folder / "log.txt")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if main:
            self._take_up(state.step, state.extra.get("log_waiting", ""))
            total, done = args.max_train_steps * args.batch_size, state.step * args.batch_size
            self.bar = tqdm(
                total=total,
                initial=done,
                unit="img",
                unit_scale=True,
                desc=args.exp_name,
                smoothing=0.05,
            )

    def _take_up(self, step: int, waiting: str) -> None:
        """A run that stopped after its last checkpoint repeats some steps: their old lines go. Those come back that waited in
        memory when it was saved, and were not written since.
        """
        kept = [json.dumps(row) + "\n" for row in read_rows(self.folder) if row["step"] <= step]
        kept += [line for line in waiting.splitlines(keepends=True) if line not in kept]
        if kept or self.lines.path.exists():
            write_file(self.lines.path, "".join(kept).encode())

    def say(self, text: str) -> None:
        """One line for people: above the bar and in log.txt."""
        if self.main:
            tqdm.write(text)
            self.text.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def step(self, step: int, terms: Tensor, good: Tensor) -> None:
        """Ends a step: its terms of this process, on the device, which count in the means if `good` is 1. Every --log-every
        steps reduces over processes and writes.
        """
        self.sums += torch.where(good > 0, terms, 0)
        self.good += good
        if self.main:
            self.bar.update(self.args.batch_size)
        if every(step, self.args.log_every):
            self._write(step)

    def _write(self, step: int) -> None:
        self._hear_guard()
        sums, good = self._reduced()
        now = time.perf_counter()
        means = dict.fromkeys(
            self.names(["none"])
        )  # so that every run's lines have the same first columns
        means |= {key: total / good if good else None for key, total in zip(self.terms, sums)}
        row = {
            "step": step,
            "images": step * self.args.batch_size,
            **means,
            "skipped": self.skipped,
        }
        row |= self._gauges(step - self.clock_step, now - self.clock)
        self.clock, self.clock_step, self.skipped, self.waited = now, step, 0, 0.0
        self.sums.zero_()
        self.good.zero_()
        if self.main:
            self._append(row)
            self.bar.set_postfix(
                {key: f"{value:.4f}" for key, value in means.items() if value is not None}
            )
            self._track("log", row, step)

    def _append(self, row: dict) -> None:
        if not self.lines.append(json.dumps(row) + "\n"):
            self.say(
                f"could not write to {self.lines.path}: its lines wait in memory, training goes on"
            )

    def _track(self, method: str, *args: Any) -> None:
        """Tells the tracker; one that fails is let go, and training goes on."""
        try:
            if self.tracker:
                getattr(self.tracker, method)(*args)
        except Exception as error:  # whatever a service far away may raise
            self.tracker = None
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.say(
                f"--report-to {self.args.report_to} failed ({reason}): training goes on without it, metrics.jsonl has all"
            )

    def _gauges(self, steps: int, seconds: float) -> dict[str, float]:
        """step_s: seconds a step, of which the host waited data_s for batches, and compute_s is the rest (a GPU may have been
        busy with earlier steps while the host waited); mfu: share of the machine's matrix products that the run's own FLOPs
        fill; peak_memory_gib: of the device, in training. Saving, previews and evaluations do not count.
        """
        rate = steps * self.args.batch_size / seconds
        step_s, data_s = seconds / steps, self.waited / steps
        gauges = {
            "images_per_s": rate,
            "step_s": step_s,
            "data_s": data_s,
            "compute_s": step_s - data_s,
        }
        gauges["mfu"] = rate * self.utilisation
        if self.sums.is_cuda:
            gauges["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.sums.device) / 2**30
        return gauges

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, noting how long each was waited for."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _hear_guard(self) -> None:
        lines, bad = self.guard.report(self.reduce)
        self.skipped += bad
        for line in lines:
            self.say(line)

    def _reduced(self) -> tuple[list[float], float]:
        *sums, good = self.reduce(torch.cat((self.sums, self.good.reshape(1))), "mean").tolist()
        return sums, good

    def unfinished(self) -> dict:
        """The means begun since the last line; kept in checkpoints, so that a resumed run logs what an unbroken one does."""
        self._hear_guard()
        sums, good = self._reduced()
        if self.main:
            self.lines.append(
                sync=True
            )  # a power cut after the checkpoint must not take lines from before it
        return {
            "log_sums": sums,
            "log_good": good,
            "log_skipped": self.skipped,
            "log_waiting": self.lines.pending,
            "bad_in_a_row": (self.guard.streak, self.guard.overflows),
        }

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens in here counts neither in the times nor in the peak memory. Waits for the device."""
        if self.sums.is_cuda:
            torch.cuda.synchronize(self.sums.device)
        started = time.perf_counter()
        yield
        if self.sums.is_cuda:
            torch.cuda.synchronize(self.sums.device)
            torch.cuda.reset_peak_memory_stats(self.sums.device)
        self.clock += time.perf_counter() - started

    def image(self, path: Path, step: int) -> None:
        """A preview was drawn."""
        self.say(f"drew {path}")
        self._track("image", path, step)

    def evaluation(
        self, step: int, decay: float, numbers: dict[str, float | None], identity: dict
    ) -> None:
        """The averaged model was measured: a line of its own, with all that identifies the numbers."""
        if self.main:
            row = {"step": step, "images": step * self.args.batch_size, **numbers}
            self._append(row | {"evaluation": {"ema_decay": decay, **identity}})
            told = ", ".join(
                f"{key} {value:.4g}" for key, value in numbers.items() if value is not None
            )
            self.say(f"step {step:,}, EMA {decay}: {told}")
            name = "eval" if decay == self.args.ema_decay[0] else f"eval-ema{decay}"
            self._track("log", {f"{name}/{key}": value for key, value in numbers.items()}, step)

    def close(self) -> None:
        """Ends the bar and the tracker's run."""
        if self.main:
            self.bar.close()
            if not self.lines.append() or not self.text.append():
                print(
                    f"{self.folder}: the last lines of metrics.jsonl or log.txt could not be written",
                    file=sys.stderr,
                )
            self._track("finish")


def read_rows(folder: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl; a killed process may leave half a one at the end."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def evaluated(folder: Path, step: int) -> set[float]:
    """The --ema-decay of which metrics.jsonl holds an evaluation at this step."""
    return {
        row["evaluation"]["ema_decay"]
        for row in read_rows(folder)
        if row["step"] == step and "evaluation" in row
    }
