"""The log of a run: one call writes the console, metrics.jsonl and the tracker."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cli import UserError
from files import write_file
from train_state import TrainState

TERMS = ("loss", "velocity", "align", "grad_norm")


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
        tracker: Any = None,
    ):
        """reduce(tensor, "mean") averages over processes; the tracker has log(row, step=), image(path, step), finish()."""
        self.args, self.folder, self.main, self.reduce, self.tracker = args, folder, main, reduce, tracker
        self.sums = torch.tensor(state.extra.get("log_sums", [0.0] * len(TERMS)), device=device)
        self.pending = state.extra.get("log_steps", 0)
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
        """One part's share of the loss terms; stays on the device."""
        self.sums[:-1] += terms

    def step(self, step: int, grad_norm: Tensor) -> None:
        """Ends a step; every --log-every steps averages over steps and processes and writes."""
        self.sums[-1] += grad_norm
        self.pending += 1
        if self.main:
            self.bar.update(self.args.batch_size)
        if not every(step, self.args.log_every):
            return
        means = self.reduce(self.sums / self.pending, "mean").tolist()
        self._check(means, step)
        now = time.perf_counter()
        rate = (step - self.clock_step) * self.args.batch_size / (now - self.clock)
        self.clock, self.clock_step, self.pending = now, step, 0
        self.sums.zero_()
        if self.main:
            terms = {key: value if math.isfinite(value) else None for key, value in zip(TERMS, means)}
            row = {"step": step, "images": step * self.args.batch_size, **terms, "images_per_s": rate}
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.bar.set_postfix({key: f"{value:.4f}" for key, value in zip(TERMS, means)})
            if self.tracker:
                self.tracker.log(row, step=step)

    def unfinished(self) -> dict:
        """The means begun since the last line; kept in checkpoints, so that a resumed run logs what an unbroken one does."""
        sums = self.reduce(self.sums, "mean").tolist()
        self._check(sums, None)
        return {"log_sums": sums, "log_steps": self.pending}

    def _check(self, means: list[float], step: int | None) -> None:
        """A loss that is no number ends the run, on every process alike, before it can be saved. A gradient norm may overflow
        under fp16: the scaler skips that step."""
        bad = [key for key, value in zip(TERMS, means) if key != "grad_norm" and not math.isfinite(value)]
        if bad:
            raise UserError(
                f"{', '.join(bad)} not finite{f' by step {step:,}' if step else ''}: nothing was saved since, the same command "
                "continues from the last checkpoint; a lower --learning-rate in a new run may help"
            )

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
