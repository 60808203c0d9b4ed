"""Execute the commands of a study in separate processes, several at a time."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from benchmarks.measure import describe_machine
from common.cli import EXIT_STOPPED, UserError
from common.files import lock, write_file
from common.logs import get_logger
from common.machine import count_available_cores
from common.progress import ProgressBar
from experiments.tasks import Task
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


def is_running(task: Task, folder: Path) -> bool:
    """Return whether a process is executing this task, for example after the study was killed.

    The process holds a lock on its log, which it inherits as its standard output.
    """
    path = task.log_path(folder)
    if not path.exists():
        return False
    with path.open("rb") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class TaskProcess:
    """A process that executes a task, and the record of the task.

    The process runs in a new session, so that it does not receive Ctrl-C from the terminal.

    Args:
        task: The task to execute.
        folder: The output directory of the study.
        num_threads: Number of CPU threads of the process.
        gpus: The GPUs of the process. Without GPUs, it uses the CPU.
    """

    def __init__(self, task: Task, folder: Path, num_threads: int, gpus: Sequence[str]):
        self.task = task
        self.folder = folder
        previous = task.read_record(folder)
        self.start_time = time.monotonic() - previous.get("seconds", 0.0)
        machine = describe_machine(torch.device("cuda" if gpus else "cpu"))
        self.record = {
            "flags": list(task.flags),
            "machine": machine | {"cpu_threads": num_threads},
            "commits": list(dict.fromkeys([*previous.get("commits", []), get_current_commit()])),
        }
        self.write_record(finished=False)

        environment = os.environ | {
            "OMP_NUM_THREADS": str(num_threads),
            "PYTHONUNBUFFERED": "1",
        }
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self.log_path = task.log_path(folder)
        with self.log_path.open("ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # see `is_running`
            self.popen = subprocess.Popen(
                make_command(task, len(gpus)),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def write_record(self, finished: bool) -> None:
        """Write the record of the task (see `Task.read_record`)."""
        seconds = round(time.monotonic() - self.start_time, 1)
        record = self.record | {"seconds": seconds, "finished": finished}
        write_file(self.task.record_path(self.folder), json.dumps(record).encode())

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it still exists, and to its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def close(self) -> str | None:
        """Record the outcome of an exited process, and return its error message or None."""
        code = self.popen.returncode
        missing = [path for path in self.task.outputs if not path.exists()]
        self.write_record(finished=code == 0 and not missing)
        if code == 0:
            return f"has ended without creating {missing[0]}" if missing else None
        if code in (EXIT_STOPPED, -signal.SIGTERM):
            return "was stopped"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        lines = re.findall(r"\S[^\r\n]*", self.log_path.read_text(errors="replace"))
        return lines[-1].rstrip() if lines else f"exited with code {code}"


def make_command(task: Task, num_gpus: int) -> list[str]:
    """Return the command that executes a task, with one process per GPU if it is distributed."""
    program, *arguments = task.command
    words = [program] if program == "-m" else [str(ROOT / program)]
    command = [sys.executable]
    if num_gpus > 1 and task.is_distributed:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command.append(str(num_gpus))
    return [*command, *words, *arguments]


class Scheduler:
    """Starts one process per unfinished task, at most `jobs` at a time, and shows the progress.

    Args:
        tasks: The tasks of the study.
        folder: The output directory of the study.
        jobs: Maximum number of simultaneous processes.
        gpus_per_task: Number of GPUs of a task. Without GPUs, a task uses the CPU.
    """

    def __init__(self, tasks: Sequence[Task], folder: Path, jobs: int, gpus_per_task: int = 1):
        self.folder = folder
        self.tasks = tasks
        self.total_images = sum(task.total_images for task in tasks)
        self.gpus = list_visible_gpus()
        self.gpus_per_task = gpus_per_task
        self.num_threads = max(1, count_available_cores() // jobs)
        self.pending = [task for task in tasks if not task.is_finished(folder)]
        self.slots: list[TaskProcess | None] = [None] * min(jobs, len(tasks))
        self.errors: dict[str, str] = {}  # name of a failed task -> error message
        self.is_stopping = False
        self.progress_time = 0.0  # time of the last update of the progress bar

    @property
    def running_processes(self) -> list[TaskProcess]:
        """The processes whose outcome has not been recorded yet."""
        return [process for process in self.slots if process]

    def run(self, request: StopRequest, bar: ProgressBar) -> None:
        """Execute all tasks. After a stop request, stop the running processes and wait for them."""
        while self.running_processes or (self.pending and not request.name):
            if not request.name:
                self.start_processes()
                if not self.running_processes and not self.can_continue():
                    break
            elif not self.is_stopping:
                self.stop_processes()
            time.sleep(POLL_SECONDS)
            has_changed = self.close_processes()
            if has_changed or time.monotonic() - self.progress_time > PROGRESS_SECONDS:
                self.show_progress(bar, has_changed)
        if not request.name:
            for task in self.pending:
                self.errors[task.name] = f"needs {task.find_missing_input()}, which does not exist"

    def can_continue(self) -> bool:
        """Return whether a pending task can start, or is being executed since an earlier call."""
        return any(
            not task.find_missing_input() or is_running(task, self.folder) for task in self.pending
        )

    def start_processes(self) -> None:
        """Start pending tasks in the free slots."""
        for slot, process in enumerate(self.slots):
            if process:
                continue
            # A process of a killed study may have finished a task in the meantime.
            self.pending = [task for task in self.pending if not task.is_finished(self.folder)]
            startable_tasks = (
                task
                for task in self.pending
                if not task.find_missing_input() and not is_running(task, self.folder)
            )
            if task := next(startable_tasks, None):
                self.pending.remove(task)
                gpus = self.select_gpus(slot)
                self.slots[slot] = TaskProcess(task, self.folder, self.num_threads, gpus)

    def select_gpus(self, slot: int) -> list[str]:
        """Return the GPUs of the processes in a slot."""
        if not self.gpus:
            return []
        first = slot * self.gpus_per_task
        return [self.gpus[(first + k) % len(self.gpus)] for k in range(self.gpus_per_task)]

    def stop_processes(self) -> None:
        """Send SIGTERM to all processes; train.py then saves a checkpoint and exits."""
        self.is_stopping = True
        num_running = len(self.running_processes)
        logger.info("stopping: waiting for %d processes to save their work", num_running)
        # A second Ctrl-C raises KeyboardInterrupt instead of waiting for the processes.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        """Send a signal to all processes."""
        for process in self.running_processes:
            process.send_signal(number)

    def close_processes(self) -> bool:
        """Free the slots of exited processes, and return whether any process has exited."""
        exited_processes = [
            process for process in self.running_processes if process.popen.poll() is not None
        ]
        for process in exited_processes:
            self.slots[self.slots.index(process)] = None
            error = process.close()
            if error and not self.is_stopping:
                self.errors[process.task.name] = error
                logger.info("%s: %s (%s)", process.task.name, error, process.log_path)
        return bool(exited_processes)

    def count_done(self) -> int:
        """Return the number of images trained on so far; without training, of finished tasks."""
        if self.total_images:
            return sum(task.count_images(self.folder) for task in self.tasks)
        return self.count_finished()

    def count_finished(self) -> int:
        """Return the number of finished tasks."""
        return sum(task.is_finished(self.folder) for task in self.tasks)

    def show_progress(self, bar: ProgressBar, refresh: bool) -> None:
        """Update the progress bar from the records and logs of the tasks."""
        self.progress_time = time.monotonic()
        parts = []
        if self.total_images:
            parts.append(f"{self.count_finished()} of {len(self.tasks)} tasks")
        if self.errors:
            parts.append(f"{len(self.errors)} failed")
        bar.set_description(", ".join(parts), refresh=refresh)
        bar.update(self.count_done() - bar.n)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the output directory of a study.

    Raises:
        UserError: If another process is running a study in the folder.
    """
    busy = UserError(
        f"{folder}: another process is running a study there; stop it or choose another folder"
    )
    with lock(folder / ".lock", busy):
        yield


def run_tasks(
    tasks: Sequence[Task], folder: Path, jobs: int, gpus_per_task: int = 1
) -> dict[str, str]:
    """Execute the unfinished tasks. A task starts when the inputs that it needs exist.

    A failed task affects only the tasks that need its outputs. On Ctrl-C or a stop signal, all
    processes are stopped; runs of train.py save a checkpoint. The next call resumes them.

    Args:
        tasks: The tasks of the study.
        folder: The output directory of the study.
        jobs: Maximum number of simultaneous processes.
        gpus_per_task: Number of GPUs of a task, if there are GPUs.

    Returns:
        The error messages of the failed tasks, by the name of the task.

    Raises:
        UserError: If another process is running a study in the folder.
    """
    scheduler = Scheduler(tasks, folder, jobs, gpus_per_task)
    with ExitStack() as resources:
        resources.enter_context(lock_folder(folder))
        has_images = scheduler.total_images > 0
        bar = ProgressBar(
            total=scheduler.total_images or len(tasks),
            initial=scheduler.count_done(),
            unit="img" if has_images else "task",
            unit_scale=has_images,
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
    return scheduler.errors


def check_no_failures(errors: dict[str, str], num_tasks: int) -> None:
    """Raise UserError if tasks failed. `errors` is the return value of `run_tasks`."""
    if errors:
        raise UserError(
            f"{len(errors)} of {num_tasks} tasks failed ({', '.join(errors)}); rerun "
            "the same command to retry them"
        )
