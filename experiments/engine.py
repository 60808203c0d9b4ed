"""Run the cells and tasks of a study, collect measurements, and write the result and the report."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import UserError
from common.logs import get_logger
from common.progress import ProgressBar
from experiments.cells import Cell, check_cells
from experiments.results import collect_runs, find_recorded_runs, save_result
from experiments.scheduler import check_no_failures, lock_folder, run_tasks
from experiments.tasks import Task

logger = get_logger(__name__)


@dataclass
class Study:
    """The runs of a study, and the functions that describe and report its result.

    Attributes:
        kind: The kind of the result (see `save_result`).
        cells: The runs.
        folder: The output directory.
        path: The JSON file of the result.
        describe: Returns all entries of the result except the runs. It receives the entries of the
            runs, and may add values to them.
        report: Writes the table and the figure of the file. It is called if the runs include the
            baseline.
        baseline: Name of the runs that the others are compared with, or None.
        recorded: Entries of an earlier result, which replace runs of this study.
        first_cells: Runs that others need. They start first, and are not part of the result.
        find_inputs: Returns the files of `first_cells` that a run needs.
    """

    kind: str
    cells: list[Cell]
    folder: Path
    path: Path
    describe: Callable[[list[dict]], dict]
    report: Callable[[Path], None] = lambda path: None
    baseline: str | None = None
    recorded: dict[Cell, dict] = field(default_factory=dict)
    first_cells: list[Cell] = field(default_factory=list)
    find_inputs: Callable[[Cell], tuple[Path, ...]] = lambda cell: ()

    @property
    def missing_cells(self) -> list[Cell]:
        """The runs that the earlier result does not contain."""
        return [cell for cell in self.cells if cell not in self.recorded]

    def reuse(self, path: Path | None) -> None:
        """Take runs from an earlier result, if a path is given (see `find_recorded_runs`)."""
        if path:
            self.recorded = find_recorded_runs(self.cells, path, self.kind)

    def print_commands(self, gpus: int = 1) -> None:
        """Print one training command per run."""
        for cell in (*self.first_cells, *self.missing_cells):
            print(cell.make_command(self.folder, gpus))

    def check(self) -> None:
        """Check the flags of all runs (see `check_cells`)."""
        check_cells([*self.first_cells, *self.missing_cells], self.folder)

    def run(self, jobs: int, measure: Callable[[], None] = lambda: None) -> None:
        """Execute the unfinished runs, and write the result.

        Args:
            jobs: Maximum number of simultaneous runs.
            measure: Called after the runs, for further measurements.

        Raises:
            UserError: If a run fails. The result then contains the other runs, unless the baseline
                is missing.
        """
        self.check()
        tasks = [
            cell.make_task(self.folder, self.find_inputs(cell))
            for cell in (*self.first_cells, *self.missing_cells)
        ]
        errors = run_tasks(tasks, self.folder, jobs)
        measure()
        runs = collect_runs(self.cells, self.folder, recorded=self.recorded)
        if not errors or self.has_baseline(runs):
            self.write(runs)
        check_no_failures(errors, len(tasks))

    def gather(self) -> None:
        """Write the measurements that exist so far, without running anything.

        Raises:
            UserError: If the baseline has not been evaluated.
        """
        self.check()
        runs = collect_runs(
            self.cells, self.folder, include_unfinished=True, recorded=self.recorded
        )
        if not self.has_baseline(runs):
            raise UserError(
                f"--output-dir {self.folder} contains no evaluation of {self.baseline}; rerun "
                "after its first evaluation"
            )
        self.write(runs)

    def write(self, runs: list[dict]) -> None:
        """Write the result, and the report if the runs include the baseline."""
        save_result(self.path, self.kind, self.describe(runs), runs)
        if self.has_baseline(runs):
            self.report(self.path)

    def has_baseline(self, runs: list[dict]) -> bool:
        """Return whether the baseline is among the runs."""
        return any(run["name"] == self.baseline for run in runs)


def run_in_this_process(tasks: Sequence[Task], folder: Path) -> dict[str, str]:
    """Execute the unfinished tasks one after the other in this process.

    The start of a separate process would take longer than a small task.

    Args:
        tasks: Tasks whose command is sample_ddp.py or a module with a function `main`.
        folder: The output directory of the study.

    Returns:
        The error messages of the failed tasks, by the name of the task.

    Raises:
        UserError: If another process is running a study in the folder.
    """
    errors = {}
    bar = ProgressBar(total=len(tasks), unit="task", disable=not tasks)
    with lock_folder(folder), bar:
        for task in tasks:
            missing = task.find_missing_input()
            if missing:
                errors[task.name] = f"needs {missing}, which does not exist"
            elif not task.is_finished(folder):
                try:
                    call_command(task.command)
                except UserError as error:
                    errors[task.name] = str(error)
                    logger.info("%s: %s", task.name, error)
            bar.update(1)
    return errors


def call_command(command: tuple[str, ...]) -> None:
    """Call the function `main` of a script or module with the arguments of a command."""
    name, *arguments = command[1:] if command[0] == "-m" else command
    module = importlib.import_module(name.removesuffix(".py"))
    previous = sys.argv
    sys.argv = [name, *arguments]
    try:
        module.main()
    finally:
        sys.argv = previous
