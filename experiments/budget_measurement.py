"""Measure the costs of the runs of a study with simultaneous processes of train.py.

The runs of the measurement are in OUTPUT_DIR/measurement, which is deleted afterwards. They share
the compiled graphs of the study, and compile them if necessary.
"""

import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks.run_steps import count_training_flops
from common.cli import EXIT_STOPPED, UserError
from common.compile_cache import FOLDER_NAME
from common.logs import get_logger
from common.machine import count_available_cores
from evaluations.runs import read_log
from experiments.budget import Costs
from experiments.cells import Cell
from experiments.scheduler import POLL_SECONDS, TaskProcess, list_visible_gpus, lock_folder
from experiments.study_plan import StudyPlan
from training.preemption import StopRequest, stop_on_signal

logger = get_logger(__name__)

LOG_EVERY = 5  # steps per row of the log
NUM_ROWS = 3  # rows of each run under full load
EVAL_EVERY = 20
NUM_STEPS = 10_000  # steps of the runs, which are stopped much earlier


class MeasuredRun:
    """A process of train.py, with the rows of its log.

    Args:
        cell: The run.
        folder: Folder of the measurement.
        num_threads: Number of CPU threads of the process.
        gpus: The GPUs of the process.
    """

    def __init__(self, cell: Cell, folder: Path, num_threads: int, gpus: list[str]):
        self.cell = cell
        self.folder = folder / cell.run_name
        self.gpus = gpus
        self.batch_size = cell.parse_settings().loop.batch_size
        self.process = TaskProcess(cell.make_task(folder), folder, num_threads, gpus)
        self.first_row_s = 0.0  # seconds from the start to the first row
        self.ignored_rows = 0  # rows before all runs were training

    def read_rows(self) -> list[dict]:
        """Return the rows of the training log.

        Raises:
            UserError: If the process has exited.
        """
        if self.process.popen.poll() is not None:
            error = self.process.close() or "exited"
            raise UserError(
                f"the measurement failed: {self.cell.name}: {error}; fix the problem and rerun the "
                "same command"
            )
        rows: list[dict] = []
        with suppress(UserError):
            rows, _ = read_log(self.folder)
        if rows and not self.first_row_s:
            self.first_row_s = time.monotonic() - self.process.start_time
        return rows

    def kill(self) -> None:
        """Kill the process and its children."""
        self.process.send_signal(signal.SIGKILL)
        self.process.popen.wait()


class Measurement:
    """Runs of all methods that train at the same time until their costs are known.

    Args:
        folder: Folder of the measurement.
        num_threads: Number of CPU threads per process.
        limit_s: Maximum number of seconds.
        request: Set by a stop signal.
    """

    def __init__(self, folder: Path, num_threads: int, limit_s: float, request: StopRequest):
        self.folder = folder
        self.num_threads = num_threads
        self.limit_s = limit_s
        self.deadline = time.monotonic() + limit_s
        self.request = request
        self.runs: list[MeasuredRun] = []

    def start(self, cells: list[Cell]) -> None:
        """Start the runs. Their names are those of methods."""
        gpus = list_visible_gpus()
        for index, cell in enumerate(cells):
            run_gpus = [gpus[index % len(gpus)]] if gpus else []
            self.runs.append(MeasuredRun(cell, self.folder, self.num_threads, run_gpus))

    def kill(self) -> None:
        """Kill all processes."""
        for run in self.runs:
            run.kill()

    def wait(self, is_complete: Callable[[], bool]) -> None:
        """Wait for a condition.

        Raises:
            UserError: If the time limit is exceeded or a process has failed.
        """
        while not is_complete():
            if self.request.name:
                sys.exit(EXIT_STOPPED)
            if time.monotonic() > self.deadline:
                raise UserError(
                    f"--minutes: the measurement did not end within {self.limit_s:.0f} s, a "
                    "quarter of the time; raise --minutes or lower --jobs"
                )
            time.sleep(POLL_SECONDS)

    def restart_first(self) -> float:
        """Stop the first run, and start a run of the same method in its place.

        Returns:
            The seconds until the stopped run had saved a checkpoint and exited.
        """
        stopped = self.runs[0]
        stop_time = time.monotonic()
        stopped.process.send_signal(signal.SIGTERM)
        self.wait(lambda: stopped.process.popen.poll() is not None)
        end_s = time.monotonic() - stop_time
        cell = stopped.cell._replace(seed=stopped.cell.seed + len(self.runs))
        self.runs[0] = MeasuredRun(cell, self.folder, self.num_threads, stopped.gpus)
        return end_s

    def measure(self) -> Costs:
        """Return the costs of the measured methods, without those of a probe."""
        self.wait(lambda: min(len(run.read_rows()) for run in self.runs) > 0)
        end_s = self.restart_first()
        self.wait(lambda: bool(self.runs[0].read_rows()))

        # All runs are training now, as in the study.
        for run in self.runs:
            run.ignored_rows = len(run.read_rows())
        self.wait(self.has_enough_rows)

        step_s: dict[str, list[float]] = {}
        evaluation_s: list[float] = []
        images_per_s = 0.0
        for run in self.runs:
            rows = run.read_rows()
            seconds = fmean(row["step_s"] for row in rows[run.ignored_rows :])
            step_s.setdefault(run.cell.name, []).append(seconds)
            evaluation_s += collect_evaluations(rows)
            images_per_s += run.batch_size / seconds
        means = {name: fmean(values) for name, values in step_s.items()}
        first = self.runs[0]
        start_s = max(0.0, first.first_row_s - LOG_EVERY * means[first.cell.name])
        return Costs(
            len(self.runs), images_per_s, means, start_s, fmean(evaluation_s), end_s, probe_s=0.0
        )

    def has_enough_rows(self) -> bool:
        """Return whether all runs have logged enough steps, and a run has been evaluated."""
        logs = [run.read_rows() for run in self.runs]
        are_long_enough = all(
            len(rows) >= run.ignored_rows + NUM_ROWS for run, rows in zip(self.runs, logs)
        )
        return are_long_enough and any(map(collect_evaluations, logs))


def collect_evaluations(rows: list[dict]) -> list[float]:
    """Return the seconds of all evaluations in a training log."""
    return [row["evaluation_s"] for row in rows if row.get("evaluation_s")]


def make_measured_cells(plan: StudyPlan, blocks: dict[str, int], jobs: int) -> list[Cell]:
    """Return one long run per slot, which cycle through the methods.

    If there are more methods than slots, the methods with the most FLOPs are measured.
    Self-Transcendence is not measured, because its frozen network does not exist yet.
    """
    long_plan = replace(plan, steps=NUM_STEPS)
    cells = {cell.name: cell for cell in long_plan.make_study_cells(blocks)}
    measured = [cell for cell in cells.values() if not plan.find_inputs(cell)]
    measured.sort(key=lambda cell: -count_training_flops(cell.parse_settings()))
    flags = ("--log-every", LOG_EVERY, "--eval-every", EVAL_EVERY)
    overrides = (*map(str, flags), "--checkpointing-steps", str(NUM_STEPS))
    return [
        cell._replace(seed=index, flags=(*cell.flags, *overrides))
        for index, cell in enumerate((measured * jobs)[:jobs])
    ]


def extrapolate(step_s: dict[str, float], flops: dict[str, float]) -> dict[str, float]:
    """Return the seconds per step of all methods.

    Methods that were not measured take as long per FLOP as the slowest measured method.

    Args:
        step_s: The measured seconds, by method.
        flops: FLOPs of all methods.
    """
    slowest = max(seconds / flops[name] for name, seconds in step_s.items())
    return {name: step_s.get(name, slowest * flops[name]) for name in flops}


def measure_costs(
    plan: StudyPlan,
    blocks: dict[str, int],
    jobs: int,
    limit_s: float,
    probe: Callable[[Path], None],
) -> Costs:
    """Measure the costs of the runs of a study.

    Args:
        plan: The study.
        blocks: The aligned blocks.
        jobs: Number of simultaneous runs.
        limit_s: Maximum number of seconds.
        probe: Probes the run in a folder.

    Raises:
        UserError: If a run fails, or if the time limit is exceeded.
    """
    folder = plan.output_dir / "measurement"
    cells = make_measured_cells(plan, blocks, jobs)
    logger.info("measuring the speed of %d simultaneous runs", jobs)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graphs = plan.output_dir / FOLDER_NAME
    graphs.mkdir(exist_ok=True)
    (folder / FOLDER_NAME).symlink_to(graphs.resolve())
    with ExitStack() as resources:
        resources.enter_context(lock_folder(plan.output_dir))
        resources.callback(shutil.rmtree, folder, ignore_errors=True)
        request = resources.enter_context(stop_on_signal())
        num_threads = max(1, count_available_cores() // jobs)
        measurement = Measurement(folder, num_threads, limit_s, request)
        resources.callback(measurement.kill)
        measurement.start(cells)
        costs = measurement.measure()
        measurement.kill()
        probe_s = time_probe(folder / cells[0].run_name, probe)
    flops = {
        cell.name: float(count_training_flops(cell.parse_settings()))
        for cell in plan.make_study_cells(blocks)
    }
    return replace(costs, step_s=extrapolate(costs.step_s, flops), probe_s=probe_s)


def time_probe(run: Path, probe: Callable[[Path], None]) -> float:
    """Return the seconds of a probe, after an untimed probe that initializes the device."""
    probe(run)
    (run / "probe.json").unlink(missing_ok=True)
    started = time.monotonic()
    probe(run)
    return time.monotonic() - started
