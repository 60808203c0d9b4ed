"""Execute the cells of a study, which are runs of train.py, each in a separate process.

Runs with the same seed have the same images, noise, timesteps and initial weights, because these
depend only on the --seed of train.py. Differences between such runs are therefore caused by their
other flags.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.measure import describe_machine
from common import cli
from common.cli import UserError
from common.files import lock, write_file
from common.machine import available_cores
from evaluations.runs import read_json, read_log
from latents.cache import CacheError, LatentCache
from models.sit import PRESETS
from training.config import (
    Settings,
    check_batch_size,
    parse_settings,
)
from training.preemption import EXIT_STOPPED, StopRequest, stop_on_signal
from training.resume import build_args_json

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1  # between checks of the processes
PROGRESS_SECONDS = 2.0  # between updates of the progress bar
# Flags of train.py that are set by the study.
RESERVED_FLAGS = (
    "--data-dir",
    "--model",
    "--max-train-steps",
    "--exp-name",
    "--output-dir",
    "--seed",
    "--encoder-depth",
    "--proj-coeff",
    "--eval-every",
    "--checkpointing-steps",
)


class Cell(NamedTuple):
    """A run of a study. Cells with the same name differ only in the seed.

    Attributes:
        name: Name of the configuration, such as the method.
        seed: Value of --seed.
        flags: The other flags of train.py, without --exp-name and --output-dir.
    """

    name: str
    seed: int
    flags: tuple[str, ...]

    @property
    def run_name(self) -> str:
        """The name of the run folder, and of the .log and .json files next to it."""
        return f"{self.name}-seed{self.seed}"

    def train_flags(self, folder: Path) -> list[str]:
        """Return the complete command line of train.py, for a run in `folder`."""
        run = ["--exp-name", self.run_name, "--output-dir", str(folder), "--seed", str(self.seed)]
        return [*self.flags, *run]

    def settings(self, num_processes: int = 1) -> Settings:
        """Parse and check the flags as train.py does.

        Raises:
            UserError: If train.py would reject the flags with this number of processes.
        """
        settings = parse_settings(self.train_flags(Path("exps")))
        check_batch_size(settings.loop, num_processes)
        return settings

    def command(self, folder: Path, gpus: int = 1) -> str:
        """Return the command that executes the run on all GPUs of a machine.

        Raises:
            UserError: If train.py would reject the flags.
        """
        self.settings(gpus)
        launcher = "python"
        if gpus > 1:
            launcher = f"accelerate launch --multi_gpu --num_processes {gpus}"
        return f"{launcher} train.py {shlex.join(self.train_flags(folder))}"


def add_study_flags(parser: argparse.ArgumentParser, defaults: dict[str, str]) -> None:
    """Add the flags that all studies share.

    Args:
        parser: The parser of the study.
        defaults: Descriptions of the default values, for the help of the flags.
    """

    def add(flag: str, text: str, **options: Any) -> None:
        default = f" (default: {defaults[flag]})" if flag in defaults else ""
        parser.add_argument(flag, help=text + default, **options)

    plot_help = "existing result from which to regenerate the table and the figure"
    add("--plot", plot_help, type=Path, metavar="FILE.json")
    add("--print", "print the commands instead of running them", action="store_true")
    add("--data-dir", "latent cache, or folder that contains the caches", type=Path)
    add("--model", "preset of models/sit.py", choices=PRESETS, metavar="NAME")
    add("--seeds", "seeds; every configuration runs with every seed", type=cli.seed, nargs="+")
    add("--max-train-steps", "training steps per run", type=cli.positive_int)
    evaluations_help = (
        "evaluations per run, evenly spaced; the last evaluation follows the last step"
    )
    add("--evaluations", evaluations_help, type=cli.positive_int)
    add("--jobs", "number of simultaneous runs", type=cli.positive_int)
    gpus_help = "number of GPUs per machine of the cluster, for --scale imagenet"
    add("--gpus", gpus_help, type=cli.positive_int, default=8)
    add("--output-dir", "parent folder of the runs", type=Path)
    add(
        "--out",
        "file for the result; the table and the figure are written next to it",
        type=Path,
        metavar="FILE.json",
    )


def parse_study_flags(
    parser: argparse.ArgumentParser, argv: list[str], *reserved_prefixes: str
) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line at "--" into the flags of the study and the flags of train.py.

    Args:
        parser: The parser of the study.
        argv: The command line.
        reserved_prefixes: Prefixes of flags of train.py that the user must not pass, in addition
            to `RESERVED_FLAGS`.

    Raises:
        UserError: If a flag of the study is invalid, or if the user passed a flag of train.py that
            is set by the study.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    train_flags = argv[end + 1 :]
    for argument in train_flags:
        if argument.split("=")[0] in RESERVED_FLAGS or argument.startswith(reserved_prefixes):
            raise UserError(f"-- {argument}: this flag is set by the study; remove it")
    return args, train_flags


def set_defaults(args: argparse.Namespace, **defaults: Any) -> None:
    """Set the unset flags of a study to their defaults, and check the flags.

    Raises:
        UserError: If a seed occurs twice, or if --out does not end in .json.
    """
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: pass each seed only once")
    if args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")


def open_cache(*folders: Path) -> LatentCache:
    """Open a latent cache; raise UserError if it is missing or damaged."""
    try:
        return LatentCache(*folders)
    except CacheError as error:
        raise UserError(f"--data-dir: {error}") from None


def check_cells(cells: list[Cell], folder: Path) -> None:
    """Check the flags of all runs before the first run starts.

    Raises:
        UserError: If train.py would reject the flags of a run, or if a run was started with other
            flags.
    """
    for cell in cells:
        cell.settings()
        recorded_flags = read_record(cell, folder).get("flags")
        current = make_portable(cell.flags)
        if recorded_flags and normalize_flags(recorded_flags) != normalize_flags(current):
            raise UserError(
                f"{folder / cell.run_name} was started with other flags "
                f"({describe_changes(recorded_flags, current)}); choose another --output-dir, or "
                "restore the flags"
            )


def normalize_flags(arguments: list[str]) -> dict | list[str]:
    """Return the values that train.py parses from flags, so that equivalent flags compare equal.

    If this version of train.py cannot parse the flags, return them unchanged.
    """
    try:
        return build_args_json(parse_settings([*arguments, "--exp-name", "any"]))
    except UserError:
        return arguments


def describe_changes(before: list[str], after: list[str]) -> str:
    """Describe the differences between two command lines, using the last value of each flag."""
    old = group_by_flag(before)
    new = group_by_flag(after)
    return "; ".join(
        f"{flag} was {old.get(flag, 'not passed')} and is now {new.get(flag, 'not passed')}"
        for flag in old | new
        if old.get(flag) != new.get(flag)
    )


def group_by_flag(arguments: Iterable[str]) -> dict[str, str]:
    """Convert ["--a", "1", "2", "--b"] to {"--a": "1 2", "--b": ""}."""
    values = {}
    for option in " ".join(arguments).removeprefix("--").split(" --"):
        flag, _, value = option.partition(" ")
        values[f"--{flag}"] = value
    return values


def make_portable(arguments: Iterable[str]) -> list[str]:
    """Remove paths that are specific to this machine from a command line.

    Absolute paths are replaced by paths relative to the working directory, or by the file name if
    they are outside of it.
    """
    portable = []
    for argument in arguments:
        flag, equals, value = (
            argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        )
        path = Path(value)
        if path.is_relative_to(Path.cwd()):
            value = str(path.relative_to(Path.cwd()))
        elif path.is_absolute():
            value = path.name
        portable.append(flag + equals + value)
    return portable


def read_record(cell: Cell, folder: Path) -> dict:
    """Return the record that this module writes for a run, or {} if there is none.

    The record contains the flags, the machine, the commits, the elapsed seconds, and whether the
    run is finished.
    """
    return read_json(folder / f"{cell.run_name}.json")


def is_finished(cell: Cell, folder: Path) -> bool:
    """Return whether a run is recorded as finished."""
    return read_record(cell, folder).get("finished", False)


def is_running(cell: Cell, folder: Path) -> bool:
    """Return whether a process is training this run, for example one left by a killed study."""
    path = folder / cell.run_name / ".lock"
    try:
        with lock(path) if path.exists() else nullcontext():
            return False
    except BlockingIOError:
        return True


def count_images(cell: Cell, folder: Path) -> int:
    """Return the number of training images in the log of a run, or 0 without a log."""
    with suppress(UserError):
        steps, evaluations = read_log(folder / cell.run_name)
        return max(row["images"] for row in (*steps, *evaluations))
    return 0


def current_commit() -> str | None:
    """Return the commit of the code, with "-dirty" if files were modified, or None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    return None


def visible_gpus() -> list[str]:
    """Return the GPUs of this process in the notation of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not visible.startswith("-"):  # -1 hides all GPUs
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


class TrainingProcess:
    """A process of train.py that executes a cell, and the record of the run.

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
            "commits": list(dict.fromkeys([*previous.get("commits", []), current_commit()])),
        }
        self.write_record(finished=False)

        environment = os.environ | {
            "OMP_NUM_THREADS": str(num_threads),
            "PYTHONUNBUFFERED": "1",
            # Hide progress bars, so that the last line of a failed run's log is the error.
            "TQDM_DISABLE": "1",
        }
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.log = folder / f"{cell.run_name}.log"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *cell.train_flags(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def write_record(self, finished: bool) -> None:
        """Write the record of the run, see `read_record`."""
        seconds = round(time.monotonic() - self.start_time, 1)
        record = self.record | {"seconds": seconds, "finished": finished}
        write_file(self.record_path, json.dumps(record).encode())

    def close(self) -> str | None:
        """Record the outcome of an exited process, and return the error or None."""
        code = self.popen.returncode
        self.write_record(finished=code == 0)
        if code == 0:
            return None
        if code in (EXIT_STOPPED, -signal.SIGTERM):
            return "was stopped"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        lines = re.findall(r"\S[^\r\n]*", self.log.read_text(errors="replace"))
        return lines[-1].rstrip() if lines else f"exited with code {code}"


class Scheduler:
    """Starts one process per unfinished run, at most `jobs` at a time, and shows the progress."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.folder = folder
        self.gpus = visible_gpus()
        self.num_threads = max(1, available_cores() // jobs)
        self.pending = [cell for cell in cells if not is_finished(cell, folder)]
        self.slots: list[TrainingProcess | None] = [None] * jobs
        self.errors_by_run: dict[str, str] = {}  # name of a failed run -> error message
        self.is_stopping = False
        self.progress_time = 0.0  # time of the last update of the progress bar
        loops = {cell: cell.settings().loop for cell in cells}
        self.total_images = {cell: loop.num_steps * loop.batch_size for cell, loop in loops.items()}

    @property
    def running_processes(self) -> list[TrainingProcess]:
        """The processes whose outcome has not been recorded yet."""
        return [process for process in self.slots if process]

    def run(self, request: StopRequest, bar: tqdm) -> None:
        """Execute all runs; after a stop request, only wait until the running processes exit."""
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
        tqdm.write(f"stopping: {len(self.running_processes)} runs are saving checkpoints")
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
                tqdm.write(f"{process.cell.run_name}: {error} ({process.log})")
        return bool(exited_processes)

    def count_images(self) -> int:
        """Return the number of training images that all runs have processed so far."""
        return sum(
            total if is_finished(cell, self.folder) else count_images(cell, self.folder)
            for cell, total in self.total_images.items()
        )

    def show_progress(self, bar: tqdm, refresh: bool) -> None:
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
        jobs: Number of simultaneous runs.

    Returns:
        The error messages of the failed runs, by the name of the run.

    Raises:
        UserError: If another process is running a study in the folder.
    """
    scheduler = Scheduler(cells, folder, jobs)
    with ExitStack() as resources:
        try:
            resources.enter_context(lock(folder / ".lock"))
        except BlockingIOError:
            raise UserError(
                f"--output-dir {folder}: another process is running a study there; stop it or "
                "choose another folder"
            ) from None
        bar = tqdm(
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


def check_no_failures(failed: dict[str, str], num_cells: int) -> None:
    """Raise UserError if runs failed; `failed` is the return value of `run_cells`."""
    if failed:
        raise UserError(
            f"{len(failed)} of {num_cells} runs failed ({', '.join(failed)}); rerun the same "
            "command to retry them"
        )
