"""Define the cells of a study, which are runs of train.py, and read their records.

Runs with the same seed have the same images, noise, timesteps and initial weights, because these
depend only on the --seed of train.py. Differences between such runs are therefore caused by their
other flags.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.cli import UserError
from evaluations.runs import read_json
from experiments.tasks import Task, make_portable
from latents.cache import CacheError, LatentCache
from training.config import Settings, check_batch_size, parse_settings
from training.resume import build_args_json


class Cell(NamedTuple):
    """A run of train.py in a study. Cells with the same name differ only in the seed.

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
        """The name of the run folder. The .log and .json files next to it have the same name."""
        return f"{self.name}-seed{self.seed}"

    def make_train_flags(self, folder: Path) -> list[str]:
        """Return the complete command line of train.py, for a run in `folder`."""
        run = ["--exp-name", self.run_name, "--output-dir", str(folder), "--seed", str(self.seed)]
        return [*self.flags, *run]

    def parse_settings(self, num_processes: int = 1) -> Settings:
        """Parse and check the flags as train.py does.

        Raises:
            UserError: If train.py would reject the flags with this number of processes.
        """
        settings = parse_settings(self.make_train_flags(Path("exps")))
        check_batch_size(settings.loop, num_processes)
        return settings

    def make_task(
        self, folder: Path, inputs: tuple[Path, ...] = (), outputs: tuple[Path, ...] = ()
    ) -> Task:
        """Return the task that executes the run (see `Task`)."""
        loop = self.parse_settings().loop
        return Task(
            self.run_name,
            ("train.py", *self.make_train_flags(folder)),
            inputs,
            outputs,
            flags=tuple(make_portable(self.flags)),
            run=folder / self.run_name,
            total_images=loop.num_steps * loop.batch_size,
        )

    def make_command(self, folder: Path, gpus: int = 1) -> str:
        """Return the command that executes the run on all GPUs of a machine.

        Raises:
            UserError: If train.py would reject the flags.
        """
        self.parse_settings(gpus)
        return self.make_task(folder).format_command(gpus)


def open_cache(*folders: Path) -> LatentCache:
    """Open the latent cache of --data-dir. Raise UserError if it is missing or damaged."""
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
        cell.parse_settings()
        recorded_flags = read_record(cell, folder).get("flags")
        current = make_portable(cell.flags)
        if recorded_flags and normalize_flags(recorded_flags) != normalize_flags(current):
            raise UserError(
                f"{folder / cell.run_name} was started with other flags "
                f"({describe_changes(recorded_flags, current)}); choose another --output-dir, or "
                "restore the flags"
            )


def normalize_flags(arguments: list[str]) -> dict | list[str]:
    """Return the settings that train.py parses from flags, so that equivalent flags are equal.

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


def read_record(cell: Cell, folder: Path) -> dict:
    """Return the record of a run (see `Task.read_record`), or {} if there is none."""
    return read_json(folder / f"{cell.run_name}.json")


def is_finished(cell: Cell, folder: Path) -> bool:
    """Return whether a run is recorded as finished."""
    return read_record(cell, folder).get("finished", False)
