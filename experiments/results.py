"""Collect the measurements of a study's runs in a JSON file, and compare runs with equal seeds."""

import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from common.cli import UserError
from common.files import write_file
from evaluations.runs import read_json, read_log
from experiments.cells import Cell, is_finished, make_portable, read_record

RESULT_VERSION = 1  # version of the JSON format


def collect_runs(cells: list[Cell], folder: Path, include_unfinished: bool = False) -> list[dict]:
    """Return one entry per run with its settings and its measurements.

    Args:
        cells: The runs of the study.
        folder: The output directory of the study.
        include_unfinished: Whether to include evaluated runs that are not recorded as finished, for
            example because they ran on a cluster.

    Returns:
        The entries of the runs in the order of `cells`. If a run evaluates several EMAs, its entry
        contains the metrics of the first one only.
    """
    runs = []
    for cell in cells:
        finished = is_finished(cell, folder)
        if finished or (include_unfinished and has_evaluations(folder / cell.run_name)):
            runs.append(summarize_run(cell, folder, finished))
    return runs


def has_evaluations(run: Path) -> bool:
    """Return whether the log of a run contains an evaluation."""
    path = run / "metrics.jsonl"
    return path.exists() and '"evaluation"' in path.read_text()


def summarize_run(cell: Cell, folder: Path, finished: bool) -> dict:
    """Return the settings of a run, its metrics per evaluation and its losses per logged step."""
    ema_decay = cell.settings().optimizer.ema_decay[0]
    steps, evaluations = read_log(folder / cell.run_name)
    evaluations = [row for row in evaluations if row["evaluation"]["ema_decay"] == ema_decay]
    evaluation_settings: dict = {}
    metrics: list[str] = []
    if evaluations:
        evaluation_settings = dict(evaluations[-1]["evaluation"])
        evaluation_settings.pop("reference", None)
        metrics = [key for key in evaluations[0] if key not in ("schema", "step", "evaluation")]
    # Columns of alignment methods are align/METHOD and cosine/METHOD, or without names in old logs.
    losses = [
        key
        for key in steps[-1]
        if key.startswith("align") or key.split("/")[0] in ("denoising", "cosine")
    ]

    entry: dict = {"name": cell.name, "seed": cell.seed}
    if not finished:
        entry["finished"] = False
    record = read_record(cell, folder) or {"flags": make_portable(cell.flags)}
    for key in ("flags", "seconds", "machine", "commits"):
        entry[key] = record.get(key)
    command = ["python", "train.py", *make_portable(cell.train_flags(folder))]
    return entry | {
        "command": shlex.join(command),
        "evaluation": evaluation_settings,
        "metrics": to_columns(evaluations, metrics),
        "losses": to_columns(steps, ["images", *losses]),
    }


def to_columns(rows: list[dict], keys: list[str]) -> dict[str, list]:
    """Transpose log lines to one list per key, with floats rounded to six significant digits."""
    return {key: [round_float(row.get(key)) for row in rows] for key in keys}


def round_float(value: object) -> object:
    """Round a float to six significant digits; return any other value unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save_result(path: Path, study: str, settings: dict, runs: list[dict]) -> None:
    """Write a result as JSON with one run per line.

    Args:
        path: The file to write.
        study: Identifies the kind of result for `load_result`.
        settings: Further keys of the result.
        runs: The entries of the runs, from `collect_runs`.
    """
    head = {
        "study": study,
        "version": RESULT_VERSION,
        "command": shlex.join(current_command()),
        **settings,
    }
    lines = ",\n".join(json.dumps(run) for run in runs)
    write_file(path, f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n'.encode())


def current_command() -> list[str]:
    """Return the command line of this process, without paths of this machine."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    program = ["-m", module] if module else make_portable(sys.argv[:1])
    return ["python", *program, *make_portable(sys.argv[1:])]


def load_result(path: Path, study: str) -> dict:
    """Return a result that `save_result` wrote.

    Raises:
        UserError: If the file is missing or damaged, belongs to another study, or has another
            version.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    result = read_json(path)
    if result.get("study") != study:
        raise UserError(
            f"{path} is not a result of experiments.{study} (its study is {result.get('study')}); "
            "pass another file"
        )
    if result.get("version") != RESULT_VERSION:
        raise UserError(
            f"{path} has version {result.get('version')}, but this code reads version "
            f"{RESULT_VERSION}; rerun the study"
        )
    return result


def write_report(path: Path, table: str, draw: Callable[[Path], None]) -> None:
    """Write the Markdown table and the figure of a result, and print the table.

    Args:
        path: The JSON file of the result; the other files have the same name with .md and .png.
        table: The table.
        draw: Writes the figure to a path.
    """
    markdown = path.with_suffix(".md")
    figure = path.with_suffix(".png")
    write_file(markdown, table.encode())
    draw(figure)
    print(f"{table}\n{path}, {markdown.name}, {figure.name}")


def final_values(runs: list[dict], metric: str) -> dict[str, dict[int, float]]:
    """Return the metric at the last evaluation of each run, by the name of the run and its seed."""
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["metrics"].get(metric):
            values.setdefault(run["name"], {})[run["seed"]] = run["metrics"][metric][-1]
    return values


class Estimate(NamedTuple):
    """A mean over seeds and its interval, which is (None, None) for a single seed."""

    mean: float
    low: float | None
    high: float | None
    num_values: int


def student_interval(values: list[float], level: float = 0.95) -> Estimate:
    """Return the mean and Student's t interval, mean +- t s / sqrt(n), of normal values."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Estimate(mean, None, None, count)
    quantile = stats.t.ppf((1 + level) / 2, count - 1)
    half_width = float(quantile * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half_width, mean + half_width, count)


def paired_difference(
    values: dict[int, float], baseline: dict[int, float], level: float = 0.95
) -> Estimate | None:
    """Return the mean difference of two runs over their common seeds, with Student's interval.

    Runs with the same seed share their random numbers, so taking the difference per seed removes
    the variation that both have in common.

    Args:
        values: The values of one run by seed.
        baseline: The values that are subtracted, by seed.
        level: The confidence level of the interval.

    Returns:
        The estimate of values - baseline, or None if they have no seed in common.
    """
    common = [seed for seed in values if seed in baseline]
    if not common:
        return None
    return student_interval([values[seed] - baseline[seed] for seed in common], level)
