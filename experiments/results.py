"""Collect the measurements of a study in a JSON file, and compare runs with the same seeds."""

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from common.cli import UserError
from common.files import write_file
from common.logs import get_logger
from evaluations.runs import read_json, read_log
from experiments.cells import Cell, describe_changes, is_finished, normalize_flags, read_record
from experiments.tasks import make_portable

logger = get_logger(__name__)

RESULT_VERSION = 1  # version of the JSON format
CONFIDENCE_LEVEL = 0.95  # of all intervals
# The ends of an interval are the quantiles of these probabilities.
TAILS = ((1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2)


def find_recorded_runs(cells: list[Cell], path: Path, study: str) -> dict[Cell, dict]:
    """Return the runs of an earlier result that equal runs of this study.

    Runs are equal if they have the same name and seed, and if train.py parses the same settings
    from their flags. Unfinished runs are ignored.

    Args:
        cells: The runs of this study.
        path: The JSON file of the earlier result.
        study: The required kind of the result (see `load_result`).

    Returns:
        The entries of the earlier result.

    Raises:
        UserError: If the file is not such a result, or if it contains none of the runs.
    """
    entries = {
        (run["name"], run["seed"]): run
        for run in load_result(path, study)["runs"]
        if run.get("finished", True)
    }
    recorded: dict[Cell, dict] = {}
    changes = ""
    for cell in cells:
        entry = entries.get((cell.name, cell.seed))
        if entry is None:
            continue
        flags = make_portable(cell.flags)
        recorded_flags = entry.get("flags", [])
        if normalize_flags(recorded_flags) == normalize_flags(flags):
            recorded[cell] = entry
        else:
            changes = f" ({cell.run_name}: {describe_changes(recorded_flags, flags)})"
    if not recorded:
        raise UserError(
            f"--reuse {path} contains no finished run with the name, seed and flags of a run of "
            f"this study{changes}; pass another file, or omit --reuse"
        )
    logger.info("%d of %d runs are taken from %s%s", len(recorded), len(cells), path, changes)
    return recorded


def collect_runs(
    cells: list[Cell],
    folder: Path,
    include_unfinished: bool = False,
    recorded: Mapping[Cell, dict] | None = None,
) -> list[dict]:
    """Return the settings and the measurements of each run.

    Args:
        cells: The runs of the study.
        folder: The output directory of the study.
        include_unfinished: Whether to include runs that have been evaluated but are not recorded as
            finished, for example because they ran on a cluster.
        recorded: Entries of an earlier result for runs that are not finished in the folder (see
            `find_recorded_runs`).

    Returns:
        One entry per run in the order of `cells`. If a run evaluates several EMAs, the entry
        contains only the metrics of the first EMA.
    """
    runs = []
    for cell in cells:
        is_done = is_finished(cell, folder)
        if not is_done and recorded and cell in recorded:
            runs.append(recorded[cell])
        elif is_done or (include_unfinished and has_evaluations(folder / cell.run_name)):
            runs.append(summarize_run(cell, folder, is_done))
    return runs


def has_evaluations(run: Path) -> bool:
    """Return whether the log of a run contains an evaluation."""
    path = run / "metrics.jsonl"
    return path.exists() and '"evaluation"' in path.read_text()


def summarize_run(cell: Cell, folder: Path, is_done: bool) -> dict:
    """Return the settings of a run, its metrics per evaluation and its losses per logged step."""
    ema_decay = cell.parse_settings().optimizer.ema_decay[0]
    steps, evaluations = read_log(folder / cell.run_name)
    evaluations = [row for row in evaluations if row["evaluation"]["ema_decay"] == ema_decay]
    settings = evaluations[-1]["evaluation"] if evaluations else {}
    metrics = [*evaluations[0]] if evaluations else []
    # Alignment methods have the columns align/METHOD and cosine/METHOD; old logs omit /METHOD.
    losses = [key for key in steps[-1] if re.match("align|(denoising|cosine)(/|$)", key)]

    record = read_record(cell, folder) or {"flags": make_portable(cell.flags)}
    return {
        "name": cell.name,
        "seed": cell.seed,
        **({} if is_done else {"finished": False}),
        **{key: record.get(key) for key in ("flags", "seconds", "machine", "commits")},
        "command": shlex.join(
            ["python", "train.py", *make_portable(cell.make_train_flags(folder))]
        ),
        "evaluation": {key: settings[key] for key in settings if key != "reference"},
        "metrics": to_columns(
            evaluations, [key for key in metrics if key not in ("schema", "step", "evaluation")]
        ),
        "losses": to_columns(steps, ["images", *losses]),
    }


def to_columns(rows: list[dict], keys: list[str]) -> dict[str, list]:
    """Convert log lines to one list per key, with floats rounded to six significant digits."""
    return {key: [round_float(row.get(key)) for row in rows] for key in keys}


def round_float(value: object) -> object:
    """Round a float to six significant digits. Return any other value unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save_result(path: Path, study: str, settings: dict, runs: list[dict]) -> None:
    """Write a result to a JSON file with one run per line.

    Args:
        path: The file to write.
        study: The kind of result, which `load_result` checks: the module name of the study, with
            the suffix -knobs for a result of --tune.
        settings: Further entries of the result.
        runs: The entries of the runs, from `collect_runs`.
    """
    module = f"experiments.{study.removesuffix('-knobs')}"
    head = {
        "study": study,
        "version": RESULT_VERSION,
        "command": shlex.join(["python", "-m", module, *make_portable(sys.argv[1:])]),
        **settings,
    }
    lines = ",\n".join(json.dumps(run) for run in runs)
    write_file(path, f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n'.encode())


def load_result(path: Path, study: str) -> dict:
    """Load a result that `save_result` has written.

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
    if not all({"name", "seed"} <= {*run} for run in result.get("runs", [{}])):
        raise UserError(
            f"{path} is damaged: the runs, or their names or seeds, are missing; pass another file"
        )
    return result


def write_report(
    path: Path,
    result: dict,
    format_table: Callable[[dict], str],
    draw_figure: Callable[[dict, Path], None],
) -> None:
    """Write the Markdown table and the figure of a result, and print the table.

    Args:
        path: The JSON file of the result; the other files have the suffixes .md and .png.
        result: The content of the JSON file.
        format_table: Function that returns the table of a result.
        draw_figure: Function that writes the figure of a result to a path.
    """
    try:
        table = format_table(result)
    except KeyError as error:
        raise UserError(
            f"{path} is damaged, or was written by another version of the code: the entry {error} "
            "is missing; rerun the study"
        ) from error
    markdown = path.with_suffix(".md")
    figure = path.with_suffix(".png")
    write_file(markdown, table.encode())
    draw_figure(result, figure)
    print(f"{table}\n{path}, {markdown.name}, {figure.name}")


def group_runs(runs: list[dict], measure: Callable[[dict], Any]) -> dict[str, dict[int, Any]]:
    """Return a quantity of each run, by the name and the seed of the run.

    Args:
        runs: The runs of a result.
        measure: Function that returns the quantity of a run, or None to omit the run.
    """
    grouped: dict[str, dict[int, Any]] = {}
    for run in runs:
        value = measure(run)
        if value is not None:
            grouped.setdefault(run["name"], {})[run["seed"]] = value
    return grouped


def collect_final_values(runs: list[dict], metric: str) -> dict[str, dict[int, float]]:
    """Return the metric at the last evaluation of each run, by the name and the seed of the run."""
    return group_runs(runs, lambda run: (run["metrics"].get(metric) or [None])[-1])


class Estimate(NamedTuple):
    """A mean over seeds and its 95% interval. The ends are NaN if there is a single seed."""

    mean: float
    low: float = math.nan
    high: float = math.nan


def compute_t_interval(values: list[float] | np.ndarray) -> Estimate:
    """Return the mean of normal values and its 95% t interval, mean +- t s / sqrt(n)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    half_width = float(stats.t.ppf(TAILS[1], len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half_width, mean + half_width)


def compute_paired_difference(
    values: dict[int, float], baseline: dict[int, float]
) -> Estimate | None:
    """Return the mean difference of two runs over their common seeds, with a t interval.

    Runs with the same seed use the same random numbers. The difference per seed therefore does not
    contain the variation that both runs share.

    Args:
        values: The values of one run by seed.
        baseline: The values that are subtracted, by seed.

    Returns:
        The estimate of values - baseline, or None without common seeds.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return compute_t_interval(differences) if differences else None
