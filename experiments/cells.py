"""What studies share: many runs of train.py, each a process of its own. results.py gathers and compares what they measured.

Runs of one seed have the same images, noise, timesteps and initial weights (train.py's --seed decides them), so a difference
between two of them is that of their flags.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.measure import describe_machine
from common.cli import UserError
from common.files import lock, write_file
from common.machine import available_cores
from evaluations.runs import read_json, read_log
from training.config import check_args, parse_args
from training.preemption import EXIT_STOPPED, stop_on_signal

ROOT = Path(__file__).resolve().parent.parent
POLL, LOOK = 0.1, 2.0  # seconds between looks at the processes, and at their metrics.jsonl


class Cell(NamedTuple):
    """One run. Cells of one name differ in their seed alone."""

    name: str
    seed: int
    flags: tuple[
        str, ...
    ]  # of train.py, --max-train-steps among them, but not --exp-name, --output-dir, --seed

    @property
    def run(self) -> str:
        """The name of its folder, and of its .log and .json beside it."""
        return f"{self.name}-seed{self.seed}"

    def words(self, folder: Path) -> list[str]:
        """What stands behind train.py on the command line."""
        return [
            *self.flags,
            "--exp-name",
            self.run,
            "--output-dir",
            str(folder),
            "--seed",
            str(self.seed),
        ]

    def args(self, processes: int = 1) -> argparse.Namespace:
        """What train.py makes of its flags. Raises UserError."""
        args = parse_args("train.py", self.words(Path("exps")))
        check_args(args, processes)
        return args


def check(cells: list[Cell], folder: Path) -> None:
    """Mistakes that can be seen before anything runs: flags that train.py would refuse, runs that were started with others.
    Raises UserError.
    """
    for cell in cells:
        cell.args()
        then, now = record(cell, folder).get("flags"), portable(cell.flags)
        if then and parsed(then) != parsed(now):
            raise UserError(
                f"{folder / cell.run} was started with other flags ({difference(then, now)}): choose another "
                "--output-dir, or go back to those flags"
            )


def parsed(words: list[str]) -> dict | list[str]:
    """What train.py makes of flags, which may be given twice; the flags themselves where it knows one of them no more."""
    try:
        return vars(parse_args("train.py", [*words, "--exp-name", ""]))
    except UserError:
        return words


def difference(then: list[str], now: list[str]) -> str:
    """What of two lists of flags differs, in words: of a flag given twice the last."""
    was, new = ({flag: " ".join(values) for flag, *values in split(words)} for words in (then, now))
    changed = [flag for flag in {**was, **new} if was.get(flag) != new.get(flag)]
    return "; ".join(
        f"{flag} was {was.get(flag, 'not given')}, is {new.get(flag, 'not given')}"
        for flag in changed
    )


def split(words: Iterable[str]) -> list[list[str]]:
    """--a 1 2 --b -> [[--a, 1, 2], [--b]]."""
    found: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


def record(cell: Cell, folder: Path) -> dict:
    """What is known of a run beside its own files: flags, machine, commits, seconds, and whether it is finished."""
    return read_json(folder / f"{cell.run}.json")


def finished(cell: Cell, folder: Path) -> bool:
    return record(cell, folder).get("finished", False)


def portable(words: Iterable[str]) -> list[str]:
    """Without the paths of this machine: below the working folder relative to it, elsewhere the last part alone."""
    here, found = Path.cwd(), []
    for word in words:
        flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        path = Path(value)
        if path.is_absolute():
            value = str(path.relative_to(here)) if path.is_relative_to(here) else path.name
        found.append(flag + equals + value)
    return found


def commit() -> str | None:
    """Of the code, with -dirty behind it if files differ from it; None outside of a repository."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    return None


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not visible.startswith("-"):  # -1: none
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


class Child:
    """A cell's process. It has a session of its own, so that Ctrl-C reaches it only through `stop`."""

    def __init__(self, cell: Cell, folder: Path, slot: int, jobs: int, gpus: list[str]):
        self.cell, self.folder, self.begun = cell, folder, time.monotonic()
        threads = max(1, available_cores() // jobs)
        quiet = {
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
            "TQDM_MININTERVAL": "60",
        }  # the log's last line is what went wrong
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | quiet
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        before = record(cell, folder)
        made = describe_machine(torch.device("cuda" if gpus else "cpu")) | {"cpu_threads": threads}
        commits = list(dict.fromkeys([*before.get("commits", []), commit()]))
        self.seconds = before.get("seconds", 0.0)
        self.known = {"flags": portable(cell.flags), "machine": made, "commits": commits}
        self.note(False)
        self.log = folder / f"{cell.run}.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *cell.words(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def note(self, done: bool) -> None:
        """Writes what `record` reads."""
        seconds = self.seconds + time.monotonic() - self.begun
        told = self.known | {"seconds": round(seconds, 1), "finished": done}
        write_file(self.folder / f"{self.cell.run}.json", json.dumps(told).encode())

    def stop(self, number: int = signal.SIGTERM) -> None:
        """train.py saves on SIGTERM, and leaves."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> str | None:
        """What went wrong with a process that has ended; None if nothing did."""
        code = self.process.returncode
        self.note(code == 0)
        if code == 0:
            return None
        if code == EXIT_STOPPED or code == -signal.SIGTERM:
            return "was stopped"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").replace("\r", "\n").split("\n")
        return next(
            (line.strip() for line in reversed(lines) if line.strip()),
            f"ended with exit code {code}",
        )


def busy(cell: Cell, folder: Path) -> bool:
    """Whether a process still trains it that an earlier call left behind when it was killed: it will be waited for."""
    path = folder / cell.run / ".lock"
    try:
        with lock(path) if path.exists() else nullcontext():
            return False
    except BlockingIOError:
        return True


def images(cell: Cell, folder: Path) -> int:
    """Seen by the network so far, as far as it has logged."""
    with suppress(UserError):
        steps, evaluations = read_log(folder / cell.run)
        return max(row["images"] for row in (*steps, *evaluations))
    return 0


def run(cells: list[Cell], folder: Path, jobs: int) -> dict[str, str]:
    """Runs the cells that are not finished, `jobs` at a time. Returns what went wrong, by the name of the run; the others go
    on. On Ctrl-C, or a signal to stop, all save and stop, and the next call goes on. Raises UserError.
    """
    waiting, running, failed = [cell for cell in cells if not finished(cell, folder)], {}, {}
    goal = {cell: cell.args().max_train_steps * cell.args().batch_size for cell in cells}
    seen = {cell: images(cell, folder) if cell in waiting else goal[cell] for cell in cells}
    gpus, told, looked, done = devices(), False, 0.0, len(cells) - len(waiting)
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / ".lock"))
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at it; stop that, or choose another --output-dir"
            ) from None
        bar = held.enter_context(
            tqdm(
                total=sum(goal.values()),
                initial=sum(seen.values()),
                unit="img",
                unit_scale=True,
                smoothing=0,
            )
        )
        request = held.enter_context(stop_on_signal())
        held.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, request.note))
        held.callback(lambda: [child.stop(signal.SIGKILL) for child in running.values()])
        while running or (waiting and not request.name):
            for slot in range(jobs):
                free = (
                    next((cell for cell in waiting if not busy(cell, folder)), None)
                    if slot not in running
                    else None
                )
                if free and not request.name:
                    waiting.remove(free)
                    running[slot] = Child(free, folder, slot, jobs, gpus)
            if request.name and not told:
                told = True
                tqdm.write(f"stopping: {len(running)} runs save what they have")
                signal.signal(
                    signal.SIGINT, signal.default_int_handler
                )  # a second Ctrl-C does not wait for them
                for child in running.values():
                    child.stop()
            time.sleep(POLL)
            for slot, child in [*running.items()]:
                if child.process.poll() is None:
                    continue
                del running[slot]
                wrong, looked = child.ended(), 0.0
                done += wrong is None
                seen[child.cell] = images(child.cell, folder)
                if wrong and not told:
                    failed[child.cell.run] = wrong
                    tqdm.write(f"{child.cell.run}: {wrong} ({child.log})")
            if time.monotonic() - looked > LOOK:
                ended, looked = looked == 0, time.monotonic()
                seen |= {child.cell: images(child.cell, folder) for child in running.values()}
                bar.set_description(
                    f"{done} of {len(cells)} runs" + f", {len(failed)} failed" * bool(failed),
                    refresh=ended,
                )
                bar.update(sum(seen.values()) - bar.n)
    if request.name == "SIGINT":
        raise KeyboardInterrupt
    if request.name:
        sys.exit(EXIT_STOPPED)
    return failed
