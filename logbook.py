"""The log of a run: one call writes the console, metrics.jsonl and the tracker."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from files import write_file
from guard import Guard
from train_state import TrainState

TERMS = ("loss", "velocity", "align", "cosine", "grad_norm")


T = TypeVar("T")


def every(step: int, period: int) -> bool:
    """Whether something done every `period` steps is due; a period of 0 is never."""
    return period > 0 and step % period == 0


class Log:
    """Running means on the device, brought over every --log-every steps."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        state: TrainState,
        device: torch.device,
        main: bool,
        reduce: Callable[[Tensor, str], Tensor],
        guard: Guard,
        utilisation: float,
        tracker: Any = None,
    ):
        """utilisation is the mfu that one image a second would be; reduce(tensor, "mean") averages over processes; the
        tracker has log(row, step=), image(path, step) and finish()."""
        self.args, self.folder, self.main, self.reduce, self.tracker = args, folder, main, reduce, tracker
        self.sums = torch.tensor(state.extra.get("log_sums", [0.0] * len(TERMS)), device=device)
        self.current = torch.zeros(len(TERMS) - 1, device=device)
        self.good = torch.tensor(state.extra.get("log_good", 0.0), device=device)
        self.skipped = state.extra.get("log_skipped", 0)
        self.guard, self.utilisation, self.waited = guard, utilisation, 0.0
        self.clock, self.clock_step = time.perf_counter(), state.step
        if main:
            self._drop_lines_after(state.step)
            total, done = args.max_train_steps * args.batch_size, state.step * args.batch_size
            self.bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, desc=args.exp_name, smoothing=0.05)

    def _drop_lines_after(self, step: int) -> None:
        """A run that stopped after its last checkpoint repeats some steps; their old lines go."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            write_file(path, "".join(kept).encode())

    def say(self, text: str) -> None:
        """One line for people: above the bar and in log.txt."""
        if self.main:
            tqdm.write(text)
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def add(self, terms: Tensor) -> None:
        """One part's share of the step's loss terms; stays on the device."""
        self.current += terms

    def losses(self) -> Tensor:
        """The step's velocity and alignment loss so far, (2,), on the device."""
        return self.current[1:3]

    def step(self, step: int, grad_norm: Tensor, good: Tensor) -> None:
        """Ends a step, which counts in the means if `good` is 1; every --log-every steps reduces over processes and writes."""
        self.sums += torch.where(good > 0, torch.cat((self.current, grad_norm.reshape(1))), 0)
        self.good += good
        self.current.zero_()
        if self.main:
            self.bar.update(self.args.batch_size)
        if every(step, self.args.log_every):
            self._write(step)

    def _write(self, step: int) -> None:
        self._hear_guard()
        sums, good = self._reduced()
        now = time.perf_counter()
        rate = (step - self.clock_step) * self.args.batch_size / (now - self.clock)
        means = {key: total / good if good else None for key, total in zip(TERMS, sums)}
        row = {"step": step, "images": step * self.args.batch_size, **means, "skipped": self.skipped, "images_per_s": rate}
        row |= self._gauges(rate, now - self.clock)
        self.clock, self.clock_step, self.skipped, self.waited = now, step, 0, 0.0
        self.sums.zero_()
        self.good.zero_()
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.bar.set_postfix({key: f"{value:.4f}" for key, value in means.items() if value is not None})
            if self.tracker:
                self.tracker.log(row, step=step)

    def _gauges(self, images_per_s: float, seconds: float) -> dict[str, float]:
        """mfu: share of the machine's matrix products that the run's own FLOPs fill; data_share: of the time, spent waiting for
        batches; peak_memory_gib: of the device."""
        gauges = {"mfu": images_per_s * self.utilisation, "data_share": self.waited / seconds}
        if self.sums.is_cuda:
            gauges["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
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
        return {"log_sums": sums, "log_good": good, "log_skipped": self.skipped, "streak": self.guard.streak}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Previews and checkpoints happen in here, and do not count in images_per_s."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def image(self, path: Path, step: int) -> None:
        """A preview was drawn."""
        self.say(f"drew {path}")
        if self.tracker:
            self.tracker.image(path, step)

    def close(self) -> None:
        """Ends the bar and the tracker's run."""
        if self.main:
            self.bar.close()
        if self.tracker:
            self.tracker.finish()
