"""Read the folders of training runs: logs, flags and the configuration of the newest checkpoint."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cli import UserError
from common.metrics_log import read_rows

JsonObject = dict[str, Any]


class Run(NamedTuple):
    """A training run as stored on disk.

    Attributes:
        name: Name of the run in figures and tables.
        folder: Folder of the run.
        steps: Training lines of metrics.jsonl.
        evaluations: Evaluation lines of metrics.jsonl, which --eval-every writes.
        args: Content of args.json, or {} if the file does not exist.
        config: Content of config.json in the newest checkpoint, or {} if there is no checkpoint.
    """

    name: str
    folder: Path
    steps: list[JsonObject]
    evaluations: list[JsonObject]
    args: JsonObject
    config: JsonObject

    @property
    def images(self) -> int:
        """Return the number of images seen at the last training line."""
        return self.steps[-1]["images"]


def name_folders(folders: list[Path]) -> dict[str, Path]:
    """Return the folders by their names, or by their paths where several names are the same."""
    names = [folder.name or folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): folder
        for name, folder in zip(names, folders)
    }


def read_log(folder: Path) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return the training lines and the evaluation lines of a run's metrics.jsonl.

    The lines have the columns of the current schema (common.metrics_log).

    Raises:
        UserError: The folder is not a run, the run has not logged a step, or the log is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        if (folder / "args.json").exists():
            raise UserError(f"{folder} has not logged a step yet (see --log-every)")
        raise UserError(f"{folder} is not a run: pass a folder like exps/NAME")
    rows = read_rows(folder)
    steps = [row for row in rows if "evaluation" not in row]
    if not steps:
        raise UserError(f"{path} is empty: the run has not logged a step yet (see --log-every)")
    return steps, [row for row in rows if "evaluation" in row]


def read_json(path: Path) -> JsonObject:
    """Return the JSON object that a file contains, or {} if the file does not exist.

    Raises:
        UserError: The file does not contain a JSON object.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not contain a JSON object; remove it")
    return content


def read_run(name: str, folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        UserError: The folder is not a run, the run has not logged a step, or a file is damaged.
    """
    steps, evaluations = read_log(folder)
    configs = sorted(
        folder.glob("checkpoints/[0-9]*/config.json"),
        key=lambda path: (len(path.parent.name), path),
    )
    config = read_json(configs[-1]) if configs else {}
    return Run(name, folder, steps, evaluations, read_json(folder / "args.json"), config)


def label_columns(run: Run, quantity: str) -> dict[str, str]:
    """Return the columns of a quantity in a run's log, each with a label for plots.

    A quantity of alignment has a column per method, such as align/sra2. The label is the name of
    the run, followed by the method if the run has several methods.
    """
    columns = [key for key in run.steps[-1] if key.partition("/")[0] == quantity]
    if len(columns) == 1:
        return {columns[0]: run.name}
    return {column: f"{run.name}, {column.partition('/')[2]}" for column in columns}


def read_column(rows: list[JsonObject], key: str) -> np.ndarray:
    """Return a column of n rows, (n,) float64, with NaN for missing and null values."""
    return np.array([row.get(key) for row in rows], float)
