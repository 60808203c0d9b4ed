"""Define the tasks of a study: commands with the files that they need and create."""

import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from evaluations.runs import read_json, read_log


@dataclass(frozen=True)
class Task:
    """A command of a study. Its log and its record are files in the output directory.

    Attributes:
        name: Unique name of the task.
        command: Arguments of the Python interpreter, starting with a script or with -m MODULE.
        inputs: Files and folders that other tasks create. The task starts when all of them exist.
        outputs: Files and folders that exist if and only if the task has finished. For a task
            without outputs, the record states whether it has finished.
        flags: The flags in the record, without paths of this machine.
        run: Folder of the training run, if the task is a training run.
        total_images: Number of images of the whole training run.
        is_distributed: Whether the command runs with one process per GPU if there are several.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    run: Path | None = None
    total_images: int = 0
    is_distributed: bool = True

    def log_path(self, folder: Path) -> Path:
        """Return the path of the log in the output directory of the study."""
        return folder / f"{self.name}.log"

    def record_path(self, folder: Path) -> Path:
        """Return the path of the record in the output directory of the study."""
        return folder / f"{self.name}.json"

    def format_command(self, gpus: int = 1) -> str:
        """Return the command line that executes the task on all GPUs of a machine."""
        launcher = "python"
        if not self.is_distributed:
            gpus = 1
        if gpus > 1 and self.command[0] == "train.py":
            launcher = f"accelerate launch --multi_gpu --num_processes {gpus}"
        elif gpus > 1:
            launcher = f"torchrun --nproc_per_node {gpus}"
        return f"{launcher} {shlex.join(self.command)}"

    def read_record(self, folder: Path) -> dict:
        """Return the record that the scheduler has written, or {} if there is none.

        The record contains the flags, the machine, the commits, the elapsed seconds, and whether
        the task is finished.
        """
        return read_json(self.record_path(folder))

    def is_finished(self, folder: Path) -> bool:
        """Return whether the task has finished."""
        if self.outputs:
            return all(path.exists() for path in self.outputs)
        return self.read_record(folder).get("finished", False)

    def find_missing_input(self) -> Path | None:
        """Return the first input that does not exist, or None."""
        return next((path for path in self.inputs if not path.exists()), None)

    def count_images(self, folder: Path) -> int:
        """Return the number of images that a training run has been trained on so far."""
        if self.run is None:
            return 0
        return self.total_images if self.is_finished(folder) else count_images(self.run)


def count_images(run: Path) -> int:
    """Return the number of images that a run has been trained on, or 0 if it has no log."""
    with suppress(UserError):
        steps, evaluations = read_log(run)
        return max(row["images"] for row in (*steps, *evaluations))
    return 0


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
