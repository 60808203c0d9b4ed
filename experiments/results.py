"""What the runs of a study measured: gathered into one JSON, and compared seed by seed."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from common.cli import UserError
from common.files import write_file
from evaluations.runs import read_json, read_log
from experiments.cells import Cell, finished, portable, record

VERSION = 1  # of the JSON


def gather(cells: list[Cell], folder: Path, unfinished: bool = False) -> list[dict]:
    """What the finished ones measured, or with `unfinished` all that have measured something, also those that a cluster ran: an
    entry a run, its columns over images. Of several averages the first.
    """
    runs = []
    for cell in cells:
        done = finished(cell, folder)
        if not done and not (unfinished and begun(cell, folder)):
            continue
        args, known = cell.args(), record(cell, folder) or {"flags": portable(cell.flags)}
        steps, evaluations = read_log(folder / cell.run)
        evaluations = [
            row for row in evaluations if row["evaluation"]["ema_decay"] == args.ema_decay[0]
        ]
        how = evaluations[-1]["evaluation"] if evaluations else {}
        losses = [
            key for key in steps[-1] if key.partition("/")[0] in ("denoising", "cosine", "align")
        ]
        runs.append(
            {
                "name": cell.name,
                "seed": cell.seed,
                **({} if done else {"finished": False}),
                **{key: known.get(key) for key in ("flags", "seconds", "machine", "commits")},
                "command": shlex.join(["python", "train.py", *portable(cell.words(folder))]),
                "evaluation": {key: value for key, value in how.items() if key != "reference"},
                "metrics": columns(
                    evaluations,
                    [key for key in (*evaluations, {})[0] if key not in ("step", "evaluation")],
                ),
                "losses": columns(steps, ["images", *losses]),
            }
        )
    return runs


def begun(cell: Cell, folder: Path) -> bool:
    """Whether it has measured anything."""
    path = folder / cell.run / "metrics.jsonl"
    return path.exists() and '"evaluation"' in path.read_text()


def columns(rows: list[dict], keys: list[str]) -> dict[str, list]:
    """Of lines of metrics.jsonl, each number to six digits."""
    return {
        key: [
            float(f"{row[key]:.6g}") if isinstance(row.get(key), float) else row.get(key)
            for row in rows
        ]
        for key in keys
    }


def save(path: Path, study: str, about: dict, runs: list[dict]) -> None:
    """One JSON, a run a line."""
    head = {"study": study, "version": VERSION, "command": shlex.join(command()), **about}
    lines = ",\n".join(json.dumps(run) for run in runs)
    write_file(path, f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n'.encode())


def command() -> list[str]:
    """The one under way, as it would be typed here."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    return [
        "python",
        *(["-m", module] if module else portable(sys.argv[:1])),
        *portable(sys.argv[1:]),
    ]


def load(path: Path, study: str) -> dict:
    """What `save` wrote. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    found = read_json(path)
    if found.get("study") != study:
        raise UserError(
            f"{path} is no result of experiments.{study}"
            + f", but of {found['study']}" * ("study" in found)
        )
    if found.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {found.get('version')}, this code reads {VERSION}: run the study again"
        )
    return found


def last(runs: list[dict], metric: str) -> dict[str, dict[int, float]]:
    """Name of cells -> seed -> the metric at the end."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["metrics"].get(metric):
            found.setdefault(run["name"], {})[run["seed"]] = run["metrics"][metric][-1]
    return found


class Estimate(NamedTuple):
    """A mean over seeds with its interval; low and high are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(values: list[float], level: float = 0.95) -> Estimate:
    """Student's t: mean -+ t s / sqrt(n), of values that scatter normally."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired(
    values: dict[int, float], baseline: dict[int, float], level: float = 0.95
) -> Estimate | None:
    """values - baseline, seed by seed: what the seeds have in common falls out. None without a seed in common."""
    common = [seed for seed in values if seed in baseline]
    return estimate([values[seed] - baseline[seed] for seed in common], level) if common else None
