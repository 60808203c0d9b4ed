"""Execute the runs of a study in train.py processes, several at a time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from benchmarks.measure import describe_machine
from common.cli import EXIT_STOPPED, UserError
from common.files import lock, write_file
from common.logs import get_logger
from common.machine import count_available_cores
from common.progress import ProgressBar
from experiments.cells import (
    Cell,
    count_images,
    is_finished,
    is_running,
    make_portable,
    read_record,
)
from training.preemption import StopRequest, stop_on_signal

logger = get_logger(__name__)

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1  # interval between checks of the processes
PROGRESS_SECONDS = 2.0  # interval between updates of the progress bar


def get_current_commit() -> str | None:
    """Return the commit of the code, with the suffix "-dirty" if files are modified, or None."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    return None


def list_visible_gpus() -> list[str]:
    """Return the GPUs of this process in the notation of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not visible.startswith("-"):  # -1 hides all GPUs
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


class TrainingProcess:
    """A train.py process that executes a cell, and the record of the run.

    The process runs in a new session, so that it does not receive Ctrl-C from the terminal.

    Args:
        cell: The run to execute.
        folder: The output directory of the study.
        num_threads: Number of CPU threads of the process.
        gpu: The GPU of the process, or None to use the CPU.
    """

    def __init__(self, cell: Cell, folder: Path, num_threads: int, gpu: str | None):
        self.cell = cell
        self.record_path = folder / f"{cell.run_name}.json"
        previous = read_record(cell, folder)
        self.start_time = time.monotonic() - previous.get("seconds", 0.0)
        machine = describe_machine(torch.device("cuda" if gpu else "cpu"))
        self.record = {
            "flags": make_portable(cell.flags),
            "machine": machine | {"cpu_threads": num_threads},
            "commits": list(dict.fromkeys([*previous.get("commits", []), get_current_commit()])),
        }
        self.write_record(finished=False)

        environment = os.environ | {
            "OMP_NUM_THREADS": str(num_threads),
            "PYTHONUNBUFFERED": "1",
        }
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.log_path = folder / f"{cell.run_name}.log"
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *cell.make_train_flags(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def write_record(self, finished: bool) -> None:
        """Write the record of the run (see `read_record`)."""
        seconds = round(time.monotonic() - self.start_time, 1)
        record = self.record | {"seconds": seconds, "finished": finished}
        write_file(self.record_path, json.dumps(record).encode())

    def close(self) -> str | None:
        """Record the outcome of an exited process, and return its error message or None."""
        code = self.popen.returncode
        self.write_record(finished=code == 0)
        if code == 0:
            return None
        if code in (EXIT_STOPPED, -signal.SIGTERM):
            return "was stopped"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        lines = re.findall(r"\S[^\r\n]*", self.log_path.read_text(errors="replace"))
        return lines[-1].rstrip() if lines else f"exited with code {code}"


class Scheduler:
    """Starts one process per unfinished run, at most `jobs` at a time, and shows the progress.

    Args:
        cells: The runs of the study.
        folder: The output directory of the study.
        jobs: Maximum number of simultaneous processes.
    """

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.folder = folder
        self.gpus = list_visible_gpus()
        self.num_threads = max(1, count_available_cores() // jobs)
        self.pending = [cell for cell in cells if not is_finished(cell, folder)]
        self.slots: list[TrainingProcess | None] = [None] * jobs
        self.errors_by_run: dict[str, str] = {}  # name of a failed run -> error message
        self.is_stopping = False
        self.progress_time = 0.0  # time of the last update of the progress bar
        loops = {cell: cell.parse_settings().loop for cell in cells}
        self.total_images = {cell: loop.num_steps * loop.batch_size for cell, loop in loops.items()}

    @property
    def running_processes(self) -> list[TrainingProcess]:
        """The processes whose outcome has not been recorded yet."""
        return [process for process in self.slots if process]

    def run(self, request: StopRequest, bar: ProgressBar) -> None:
        """Execute all runs. After a stop request, stop the running processes and wait for them."""
        while self.running_processes or (self.pending and not request.name):
            if not request.name:
                self.start_processes()
            elif not self.is_stopping:
                self.stop_processes()
            time.sleep(POLL_SECONDS)
            has_changed = self.close_processes()
            if has_changed or time.monotonic() - self.progress_time > PROGRESS_SECONDS:
                self.show_progress(bar, has_changed)

    def start_processes(self) -> None:
        """Start pending runs in the free slots."""
        for slot, process in enumerate(self.slots):
            startable_cells = (cell for cell in self.pending if not is_running(cell, self.folder))
            if not process and (cell := next(startable_cells, None)):
                self.pending.remove(cell)
                gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
                self.slots[slot] = TrainingProcess(cell, self.folder, self.num_threads, gpu)

    def stop_processes(self) -> None:
        """Send SIGTERM to all processes; train.py then saves a checkpoint and exits."""
        self.is_stopping = True
        num_running = len(self.running_processes)
        logger.info("stopping: %d runs are saving checkpoints", num_running)
        # A second Ctrl-C raises KeyboardInterrupt instead of waiting for the processes.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        """Send a signal to all processes that still exist, and to their children."""
        for process in self.running_processes:
            with suppress(ProcessLookupError):
                os.killpg(process.popen.pid, number)

    def close_processes(self) -> bool:
        """Free the slots of exited processes, and return whether any process has exited."""
        exited_processes = [
            process for process in self.running_processes if process.popen.poll() is not None
        ]
        for process in exited_processes:
            self.slots[self.slots.index(process)] = None
            error = process.close()
            if error and not self.is_stopping:
                self.errors_by_run[process.cell.run_name] = error
                logger.info("%s: %s (%s)", process.cell.run_name, error, process.log_path)
        return bool(exited_processes)

    def count_images(self) -> int:
        """Return the total number of images that the runs have been trained on so far."""
        return sum(
            total if is_finished(cell, self.folder) else count_images(cell, self.folder)
            for cell, total in self.total_images.items()
        )

    def show_progress(self, bar: ProgressBar, refresh: bool) -> None:
        """Update the progress bar from the records and logs of the runs."""
        self.progress_time = time.monotonic()
        num_finished = sum(is_finished(cell, self.folder) for cell in self.total_images)
        description = f"{num_finished} of {len(self.total_images)} runs"
        if self.errors_by_run:
            description += f", {len(self.errors_by_run)} failed"
        bar.set_description(description, refresh=refresh)
        bar.update(self.count_images() - bar.n)


def run_cells(cells: list[Cell], folder: Path, jobs: int) -> dict[str, str]:
    """Execute the unfinished runs.

    A failed run does not affect the other runs. On Ctrl-C or a stop signal, all runs save a
    checkpoint and stop, and the next call resumes them.

    Args:
        cells: The runs of the study.
        folder: The output directory of the study.
        jobs: Maximum number of simultaneous runs.

    Returns:
        The error messages of the failed runs, by the name of the run.

    Raises:
        UserError: If another process is running a study in the folder.
    """
    scheduler = Scheduler(cells, folder, jobs)
    with ExitStack() as resources:
        busy = UserError(
            f"--output-dir {folder}: another process is running a study there; stop it or "
            "choose another folder"
        )
        resources.enter_context(lock(folder / ".lock", busy))
        bar = ProgressBar(
            total=sum(scheduler.total_images.values()),
            initial=scheduler.count_images(),
            unit="img",
            unit_scale=True,
            smoothing=0,
        )
        resources.enter_context(bar)
        request = resources.enter_context(stop_on_signal())
        previous_handler = signal.signal(signal.SIGINT, request.handle)
        resources.callback(signal.signal, signal.SIGINT, previous_handler)
        resources.callback(scheduler.send_signal, signal.SIGKILL)
        scheduler.run(request, bar)
    if request.name == "SIGINT":
        raise KeyboardInterrupt
    if request.name:
        sys.exit(EXIT_STOPPED)
    return scheduler.errors_by_run


def check_no_failures(errors_by_run: dict[str, str], num_cells: int) -> None:
    """Raise UserError if runs failed. `errors_by_run` is the return value of `run_cells`."""
    if errors_by_run:
        raise UserError(
            f"{len(errors_by_run)} of {num_cells} runs failed ({', '.join(errors_by_run)}); rerun "
            "the same command to retry them"
        )
